"""Write runs as offline runs of Weights & Biases, which `wandb sync` uploads. Only this module imports wandb.

wandb starts a process of its own that writes the files. It contacts nobody in offline mode.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.exports.folder import Written, counted, needs
from pipeline.exports.runs import Run

PROJECT = "postrain"


def write(runs: Iterable[Run], folder: Path, campaign: str) -> list[Written]:
    """Write one offline run for each run below `folder`. Raises NotFound without wandb, OSError as writing does."""
    with needs("wandb", "wandb"):
        import wandb
    written = []
    for run in runs:
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, disable_job_creation=True, x_disable_stats=True,
            x_disable_meta=True, x_save_requirements=False,
        )  # fmt: skip
        live = wandb.init(
            mode="offline", dir=str(folder), project=PROJECT, group=f"{campaign}/{run.round}", name=run.name, job_type=run.tags["role"],
            id=run.id_in(campaign), config={**run.settings, **run.tags}, settings=settings, reinit="finish_previous",
        )  # fmt: skip
        for point in run.curve:
            live.log(
                {**{f"train/{name}": value for name, value in point.values.items()}, "_timestamp": point.wall_time},
                step=point.step,
            )
        live.summary.update({f"score/{name}": value for name, value in run.scores.items()})
        place = Path(live.dir).parent
        live.finish()
        shutil.rmtree(place / "logs", ignore_errors=True)  # what wandb says of itself, with paths of this machine
        written.append(
            Written(place.relative_to(folder.resolve()).as_posix(), f"{run.name}, {counted(len(run.curve), 'step')}")
        )
    for extra in (folder / "wandb").glob("*"):
        if extra.is_symlink():
            extra.unlink()  # to the newest run and its logs, under the folder's name until it is renamed
    return written
