"""The forms of an export, and the act of writing them. Each form's own library is imported only when the form is asked for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.exports import folder
from pipeline.exports.folder import Written
from pipeline.exports.reading import Reading

FORMS = ("csv", "parquet")


def export(reading: Reading, target: Path, forms: Sequence[str]) -> dict[str, Any]:
    """Write these forms into the folder `target`. Returns the content of its `export.json`.

    Raises ConfigError for a folder or form that is not valid, NotFound where a form's package is missing, IntegrityError where a file
    of the campaign is not the one that the log names, WorkFailed where the folder cannot be written.
    """
    if unknown := [form for form in forms if form not in FORMS]:
        raise ConfigError(f"--as {unknown[0]} is no form of an export", f"Valid: {', '.join(FORMS)}")
    folder.check_target(target, reading)
    made = {form: folder.replace(target, form, partial(_write, form, reading)) for form in dict.fromkeys(forms)}
    return folder.write_index(target, reading, made, openers(target))


def _write(form: str, reading: Reading, aside: Path) -> Sequence[Written]:
    from pipeline.exports import csv_files, parquet_files, tables

    if form == "csv":
        return csv_files.write(tables.of_campaign(reading), aside)
    return parquet_files.write(tables.of_campaign(reading), aside)


def openers(target: Path) -> dict[str, str]:
    """For each form, what a person types to look at it."""
    at = {form: shlex.quote(str(target / form)) for form in FORMS}
    return {
        "csv": f"head -n 3 {at['csv']}/arms.csv",
        "parquet": f"python -c \"import pandas; print(pandas.read_parquet('{target}/parquet/arms.parquet'))\"",
    }
