"""Test the forms other than CSV by the programs that people read them with; where one is not installed, the skip says so."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.campaign.layout import Campaign
from tests.support.decided import BEGAN, STEPS, attempt, decided_campaign, start, steps, with_open_round
from tests.support.paths import ROOT

LOSSES = [3 / n for n in range(1, 5)] + [7 / n for n in range(5, STEPS + 1)]  # of the resumed arm


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> Campaign:
    return with_open_round(decided_campaign(tmp_path_factory.mktemp("forms")))


def export(campaign: Campaign, target: Path, *forms: str) -> None:
    assert main(["export", str(campaign.folder), "--to", str(target), "--as", *forms]) == 0


def test_tensorboard_reads_curves_and_scores(campaign, tmp_path, capsys):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    export(campaign, tmp_path / "out", "tensorboard")
    printed = capsys.readouterr().out
    assert f"{tmp_path}/out/tensorboard/r0001/a2: {STEPS} steps\n" in printed
    assert printed.endswith(f"next: tensorboard --logdir {tmp_path}/out/tensorboard\n")

    def scalars(run: str, tag: str):
        read = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard" / run))
        read.Reload()
        return read.Scalars(tag)

    loss = scalars("r0001/a2", "train/loss")
    assert [event.step for event in loss] == list(range(1, STEPS + 1))
    assert [event.value for event in loss] == pytest.approx(LOSSES)
    assert loss[-1].wall_time == BEGAN + 3620 + 2 * (STEPS - 4)
    for tag in ("learning_rate", "grad_norm", "tokens", "seconds"):
        assert len(scalars("r0001/a2", f"train/{tag}")) == STEPS
    assert len(scalars("r0002/a0", "train/loss")) == 3
    fresh = scalars("scores/a2", "score/fresh_accuracy")
    assert [(event.step, event.value) for event in fresh] == [(1, pytest.approx(0.95))]
    assert [event.step for event in scalars("scores/reference", "score/dev_accuracy")] == [0, 1]
    assert [event.step for event in scalars("scores/a0", "score/fresh_accuracy")] == [1]  # r0002 is not decided


def test_curves_are_written_while_arms_train_and_no_step_twice(campaign, tmp_path, monkeypatch):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    from pipeline.exports import tensorboard_events
    from pipeline.exports.tensorboard_events import Follower

    campaign = Campaign.at(shutil.copytree(campaign.folder, tmp_path / "smoke"))
    export(campaign, tmp_path / "out", "tensorboard")
    folder = campaign.round("r0002")
    follower = Follower(folder, tmp_path / "out" / "tensorboard")

    def seen() -> list[tuple[int, float]]:
        read = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard" / "r0002" / "a0"))
        read.Reload()
        return [(event.step, pytest.approx(event.value)) for event in read.Scalars("train/loss")]

    assert follower.look() == 3 and seen() == [(n, 3 / n) for n in range(1, 4)]
    monkeypatch.setattr(
        tensorboard_events.curves, "of_arm", lambda *_: pytest.fail("it read a file that had not changed")
    )
    assert follower.look() == 0
    monkeypatch.undo()
    with (folder.folder / "a0" / "attempt_00" / "progress.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in steps(4, 6)))
    assert follower.look() == 3
    # The next attempt resumes from step 5 and makes step 6 again.
    attempt(folder, "a0", 1, BEGAN + 9000, [start(), *steps(1, 5), start(), *steps(6, STEPS)])
    folder.published("a0").unlink()  # of the first attempt
    assert follower.look() == STEPS - 6
    assert seen() == [(n, 3 / n) for n in range(1, STEPS + 1)]
    folder.closed.write_text("{}")
    follower.follow()  # ends at once
    assert len(seen()) == STEPS


def test_parquet_has_the_rows_of_the_csv(campaign, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    export(campaign, tmp_path / "out", "csv", "parquet")
    for name in ("items", "arms", "decisions"):
        with (tmp_path / "out" / "csv" / f"{name}.csv").open(newline="") as file:
            expected = list(csv.DictReader(file))
        rows = parquet.read_table(tmp_path / "out" / "parquet" / f"{name}.parquet").to_pylist()
        texts = [
            {key: "" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for key, v in row.items()}
            for row in rows
        ]
        assert texts == expected


def test_a_missing_package_is_named_with_the_command_that_brings_it(campaign, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["export", str(campaign.folder), "--to", str(tmp_path / "out"), "--as", "parquet"]) == 2
    err = capsys.readouterr().err
    assert "--as parquet needs the package pyarrow" in err and "pip install 'postrain[exports]'" in err
    assert not list((tmp_path / "out").iterdir())


def test_mlflow_reads_its_file_store(campaign, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking = pytest.importorskip("mlflow.tracking", reason="mlflow is not installed")
    export(campaign, tmp_path / "out", "mlflow")
    client = tracking.MlflowClient(tracking_uri=(tmp_path / "out" / "mlflow").as_uri())
    (experiment,) = client.search_experiments()
    assert experiment.name.startswith("smoke-")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    best = found["r0001-a2"]
    assert (best.data.params["recipe.lora.rank"], best.data.metrics["score.fresh_accuracy"]) == ("8", 0.95)
    assert best.data.tags["moved"] == "recipe.lora.rank=8"
    assert [found[name].info.status for name in ("r0001-a2", "r0002-a0")] == ["FINISHED", "RUNNING"]
    history = client.get_metric_history(best.info.run_id, "train.loss")
    assert [(point.step, point.value) for point in history] == list(zip(range(1, STEPS + 1), LOSSES, strict=True))
    assert history[-1].timestamp == 1000 * (BEGAN + 3620 + 2 * (STEPS - 4))
    assert not [name for name in found["r0002-a0"].data.metrics if name.startswith("score.")]


def test_the_file_store_is_what_mlflow_documents(campaign, tmp_path):
    """Checked without MLflow, so that a machine without it notices a change of the layout."""
    export(campaign, tmp_path / "out", "mlflow")
    (experiment,) = (tmp_path / "out" / "mlflow").iterdir()
    assert experiment.name.isdigit() and (experiment / "meta.yaml").is_file()
    names = {(run / "tags" / "mlflow.runName").read_text(): run for run in experiment.iterdir() if run.is_dir()}
    best = names["r0001-a2"]
    assert (best / "params" / "recipe.lora.rank").read_text() == "8"
    lines = [line.split() for line in (best / "metrics" / "train.loss").read_text().splitlines()]
    assert [int(step) for _, _, step in lines] == list(range(1, STEPS + 1))
    assert [float(value) for _, value, _ in lines] == LOSSES
    assert f"run_id: {best.name}\n" in (best / "meta.yaml").read_text()


def test_wandb_reads_its_offline_runs(campaign, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    target = tmp_path / "out"
    words = ["export", str(campaign.folder), "--to", str(target), "--as", "wandb", "--round", "r0001"]
    # In a process of its own, because wandb starts threads and a service.
    environment = {**os.environ, "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    read = subprocess.run(
        [sys.executable, "-c", READ_WANDB, str(target)], capture_output=True, text=True, env=environment
    )
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout)
    assert found["r0001-a2"]["loss"] == pytest.approx(LOSSES)
    assert found["r0001-a2"]["times"][-1] == BEGAN + 3620 + 2 * (STEPS - 4)
    assert found["r0001-a2"]["summary"]["score/fresh_accuracy"] == 0.95
    assert not any("PRIVATE KEY" in path.read_text(errors="replace") for path in target.rglob("*") if path.is_file())


READ_WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7  # of the log format of LevelDB, in which wandb keeps its records

def records(content):
    at, whole = HEADER, b""  # the file begins with seven bytes of its own
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + HEADER])
        if not kind:
            return
        whole += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # full, or the last part
            yield whole
            whole = b""

found = {}
for path in Path(sys.argv[1]).rglob("*.wandb"):
    run = {"loss": [], "times": [], "summary": {}}
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found[record.run.display_name] = run
        if kind == "history":
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            if "train/loss" in row:
                run["loss"].append(row["train/loss"])
                run["times"].append(row["_timestamp"])
        if kind == "summary":
            for i in record.summary.update:
                run["summary"][i.key or "/".join(i.nested_key)] = json.loads(i.value_json)
print(json.dumps(found))
"""
