"""Write runs in the layout of MLflow's file store, which `mlflow ui --backend-store-uri FOLDER` reads. It needs no package.

    mlruns/<experiment>/meta.yaml                     the campaign
    mlruns/<experiment>/<run>/meta.yaml               one arm of one round
    mlruns/<experiment>/<run>/metrics/loss            a line a step: milliseconds since the epoch, value, step
    mlruns/<experiment>/<run>/params/recipe.lora.rank, tags/round

MLflow 3.17 reads this layout only with MLFLOW_ALLOW_FILE_STORE=true, because it keeps the layout alive without extending it; `mlflow
migrate-filestore` copies it into a database.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.campaign.facts import dump_yaml
from pipeline.exports.folder import Written, counted
from pipeline.exports.runs import Run

STATUS = {"not decided": 1, "completed": 3, "failed": 4, "absent": 5}
"""MLflow's RunStatus (running, finished, failed, killed) of each status of an arm."""
LOCAL = 4  # of MLflow's SourceType
USER = "postrain"


def write(runs: Iterable[Run], folder: Path, final: Path, campaign: str) -> list[Written]:
    """Write an experiment with its runs below `folder`. final: where the folder will lie. Raises OSError as writing does."""
    runs = list(runs)
    # MLflow wants a number; eighteen digits of the name's digest are one that two campaigns do not share by chance.
    experiment = str(int(hashlib.sha256(campaign.encode()).hexdigest(), 16))[:18]
    at, uri = folder / experiment, (final / experiment).resolve().as_uri()
    ends = max((_milliseconds(run.ended) for run in runs), default=0)
    _meta(
        at, artifact_location=uri, creation_time=min((_milliseconds(run.began) for run in runs), default=0),
        experiment_id=experiment, last_update_time=ends, lifecycle_stage="active", name=campaign,
    )  # fmt: skip
    for run in runs:
        name = run.id_in(campaign)
        _meta(
            at / name, artifact_uri=f"{uri}/{name}/artifacts", end_time=_milliseconds(run.ended), entry_point_name="",
            experiment_id=experiment, lifecycle_stage="active", run_id=name, run_name=run.name, run_uuid=name, source_name="",
            source_type=LOCAL, source_version="", start_time=_milliseconds(run.began), status=STATUS[run.tags["status"]], tags=[], user_id=USER,
        )  # fmt: skip
        (at / name / "artifacts").mkdir()
        _texts(at / name / "params", run.settings)
        _texts(at / name / "tags", {**run.tags, "mlflow.runName": run.name, "mlflow.user": USER})
        lines: dict[str, list[str]] = {}
        for point in run.curve:
            for series, value in point.values.items():
                lines.setdefault(f"train.{series}", []).append(
                    f"{_milliseconds(point.wall_time)} {value!r} {point.step}\n"
                )
        for score, value in run.scores.items():
            lines[f"score.{score}"] = [f"{_milliseconds(run.ended)} {value!r} {run.number}\n"]
        _texts(at / name / "metrics", {series: "".join(text) for series, text in lines.items()})
    return [Written(experiment, f"the campaign as an experiment with {counted(len(runs), 'run')}")]


def _meta(folder: Path, **content: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "meta.yaml").write_text(dump_yaml(dict(sorted(content.items()))))


def _texts(folder: Path, texts: Any) -> None:
    """A file for each key. Keys are dotted names of settings; a family's name cannot hold a slash."""
    folder.mkdir()
    for key, text in texts.items():
        (folder / key).write_text(text)


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)
