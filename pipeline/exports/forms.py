"""The forms of an export, and the act of writing them. Each form's own library is imported only when the form is asked for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.exports import (
    csv_files,
    folder,
    mlflow_files,
    parquet_files,
    runs,
    tables,
    tensorboard_events,
    wandb_runs,
)
from pipeline.exports.folder import Written
from pipeline.exports.reading import Reading

FORMS = ("csv", "parquet", "tensorboard", "mlflow", "wandb")


def export(reading: Reading, target: Path, forms: Sequence[str]) -> dict[str, Any]:
    """Write these forms into the folder `target`. Returns the content of its `export.json`.

    Raises ConfigError for a folder or form that is not valid, NotFound where a form's package is missing, IntegrityError where a file
    of the campaign is not the one that the log names, WorkFailed where the folder cannot be written.
    """
    if unknown := [form for form in forms if form not in FORMS]:
        raise ConfigError(f"--as {unknown[0]} is no form of an export", f"Valid: {', '.join(FORMS)}")
    folder.check_target(target, reading)
    made = {
        form: folder.replace(target, form, partial(_write, form, reading, target / form))
        for form in dict.fromkeys(forms)
    }
    return folder.write_index(target, reading, made, openers(target))


def _write(form: str, reading: Reading, final: Path, aside: Path) -> Sequence[Written]:
    """Write a form into the empty folder `aside`, which will then be renamed to `final`."""
    if form == "csv":
        return csv_files.write(tables.of_campaign(reading), aside)
    if form == "parquet":
        return parquet_files.write(tables.of_campaign(reading), aside)
    if form == "tensorboard":
        return tensorboard_events.write(runs.of_campaign(reading), aside)
    if form == "mlflow":
        return mlflow_files.write(runs.of_campaign(reading), aside, final, reading.name)
    return wandb_runs.write(runs.of_campaign(reading), aside, reading.name)


def openers(target: Path) -> dict[str, str]:
    """For each form, what a person types to look at it."""
    at = {form: shlex.quote(str(target / form)) for form in FORMS}
    arms = target / "parquet" / "arms.parquet"
    return {
        "csv": f"head -n 3 {at['csv']}/arms.csv",
        "parquet": f"python -c {shlex.quote(f'import pandas; print(pandas.read_parquet({str(arms)!r}))')}",
        "tensorboard": f"tensorboard --logdir {at['tensorboard']}",
        "mlflow": f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {at['mlflow']}",
        "wandb": f"wandb sync {at['wandb']}/wandb/offline-run-*",
    }
