"""Test the entry that compiles and tunes: what it runs, what it says, and what it refuses. Eager kernels, because compiling takes a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from substrate import warm_up
from tests.support.paths import ROOT

GOLDEN = json.loads((ROOT / "tests/golden/warm_up_task.json").read_text())


def run(path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "substrate.warm_up", str(path)]
    quiet = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env={**os.environ, **quiet, **env}, capture_output=True, text=True, timeout=300)


def written(folder: Path, **changes: object) -> Path:
    (folder / "task.json").write_text(json.dumps({**GOLDEN, "paths": {"out": str(folder)}, **changes}))
    return folder / "task.json"


@pytest.mark.long
@pytest.mark.parametrize("judge_tp", [1, 2])
def test_it_trains_and_decodes_and_says_with_what(tmp_path, judge_tp):
    config = json.loads(json.dumps(GOLDEN["config"]))
    config["parallelism"] |= {"tp": 1, "judge_tp": judge_tp}
    config["recipe"]["micro_batch_tokens"] = 64
    done = run(written(tmp_path, config=config), SUBSTRATE_KERNELS="experts=grouped")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("kernels on CPU: scan torch, experts grouped") == judge_tp  # once for each number of ranks
    assert json.loads((tmp_path / "kernels.json").read_text()) == {
        "scan": "torch", "experts": "grouped", "packed": "padded", "elementwise": "eager", "reason": "no GPU",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "train"}, "valid is (1, 'warm_up')"),
        ({"config": {}}, "it must have config and paths of kind warm_up"),
        ({"config": {**GOLDEN["config"], "parallelism": {"tp": 0, "judge_tp": 1, "ep": 1}}}, "ranks [0, 1]"),
    ],
)
def test_a_wrong_task_is_refused_in_one_line(tmp_path, changes, said):
    done = run(written(tmp_path, **changes))
    assert done.returncode == 64 and done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1


def test_experts_are_spread_where_the_ranks_can_hold_them():
    assert warm_up.layout({"ep": 4}, 4)["ep"] == 4
    assert warm_up.layout({"ep": 4}, 2) == {"tp": 2, "pp": 1, "cp": 1, "dp": 1, "ep": 1}
