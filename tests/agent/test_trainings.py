"""Test the tool `train` where no process is started."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.agent.tool_runner import GpuMeter
from pipeline.agent.trainings import Trainings
from pipeline.config import settings


def test_a_start_that_no_time_is_left_for_costs_no_attempt_and_removes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "progress.jsonl").write_text("of the start before\n")
    job: Any = SimpleNamespace(chosen=settings.compose(["experiment=smoke", "worker=scripted"]))
    trainings = Trainings(job, None, tmp_path, {}, "", out, tmp_path, None, GpuMeter(0, 1), ())  # type: ignore[arg-type]
    for num_steps, failure in ((None, "budget_gpu_seconds"), (0, "bad_arguments")):
        assert trainings.train({"num_steps": num_steps}).failure == failure
    assert trainings.num_full == 0 and (out / "progress.jsonl").exists()
