"""The folder of an export: a subfolder for each form, a README, and `export.json`, which says what each form was made from.

A form is written beside the folder and then renamed into it, so that a reader sees the old files or the new ones, and never a half.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError, NotFound, WorkFailed
from pipeline.campaign.files import read_json, write_file
from pipeline.exports.reading import Reading

INDEX, README = "export.json", "README.md"


@dataclass(frozen=True)
class Written:
    """A file or folder of a form, relative to the form's own folder, and how much is in it, in words."""

    path: str
    holds: str


def counted(number: int, what: str) -> str:
    """A number of things in words, such as `1 row` or `5,400 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@contextmanager
def needs(form: str, package: str) -> Iterator[None]:
    """Import a package of a form inside this context. Raises NotFound with the command to install it, where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise NotFound(
            f"--as {form} needs the package {package}, and {error.name} is not installed",
            f"`pip install {package}` brings it, or `pip install 'postrain[exports]'` all that exports may need; --as csv needs none",
        ) from error


def refuse_inside(path: Path, option: str) -> None:
    """Raise ConfigError for a path inside a campaign, of any campaign. option: that the path was given by."""
    whole = path.resolve()
    for above in (whole, *whole.parents):
        if (above / "campaign.yaml").is_file() and (above / "log.jsonl").is_file():
            raise ConfigError(
                f"{path} is inside the campaign {above}",
                f"Give {option} a path outside: an export never writes into a campaign",
            )


def check_target(target: Path, reading: Reading) -> None:
    """Refuse a folder that an export may not be written to. Raises ConfigError.

    Valid are a folder that does not exist or is empty, and one that holds an earlier export of the same campaign.
    """
    refuse_inside(target, "--to")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file", "Give a new folder to --to")
    if not target.is_dir() or not any(target.iterdir()):
        return
    index = target / INDEX
    made_from = read_json(index).get("campaign") if index.is_file() else None
    if made_from is None:
        raise ConfigError(
            f"{target} has files and is no export",
            "Give --to a new folder, an empty one, or an earlier export of this campaign",
        )
    if made_from != reading.name:
        raise ConfigError(
            f"{target} is an export of {made_from}, not of {reading.name}", "Give each campaign a folder of its own"
        )


def replace(target: Path, form: str, write: Callable[[Path], Sequence[Written]]) -> list[Written]:
    """Write one form by `write`, which gets an empty folder, and put it in place of the earlier one.

    Raises WorkFailed where the disk is full or the folder cannot be written; the earlier form then stays.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{form}.", dir=target))
        try:
            aside.chmod(0o755)
            written = list(write(aside))
            if (target / form).exists():
                os.rename(target / form, aside.with_suffix(".old"))
            os.rename(aside, target / form)
            return written
        finally:
            for left in (aside, aside.with_suffix(".old")):
                shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise WorkFailed(
            f"cannot write {target}: {error.strerror or error}", "Free space or get rights there, then run it again"
        ) from error


def write_index(
    target: Path, reading: Reading, forms: Mapping[str, Sequence[Written]], openers: Mapping[str, str]
) -> dict[str, Any]:
    """Write `export.json` and the README, which also name the forms of earlier calls. Returns the content of `export.json`.

    forms: what this call wrote, by form. openers: for each form that there is, what to do in order to look at it.
    """
    index = target / INDEX
    found: dict[str, Any] = read_json(index)["forms"] if index.is_file() else {}
    for form, written in forms.items():
        found[form] = {
            "log_head": str(reading.anchor), "rounds": list(reading.shown), "left_out": list(reading.left_out),
            "files": [asdict(each) | {"path": f"{form}/{each.path}"} for each in written],
        }  # fmt: skip
    content = {"schema": 1, "campaign": reading.name, "forms": dict(sorted(found.items()))}
    write_file(index, json.dumps(content, indent=1) + "\n")
    write_file(target / README, _readme(content, openers))
    return content


def _readme(content: Mapping[str, Any], openers: Mapping[str, str]) -> str:
    lines = [
        f"# An export of the campaign {content['campaign']}", "",
        "These files are a copy for people and their tools. They are no source of truth: nothing was decided from them, and nothing that is",
        "changed here changes the campaign. The campaign's sealed log is the source. `python -m pipeline audit CAMPAIGN` checks it, and",
        "`--anchor TEXT` checks that the log still has the head that a form below was made from.", "",
        "Outcomes and scores are those of rounds that are decided and closed. No file holds a prompt or an answer, or anything of the vault.",
        "A trial reports its training progress itself, and nobody checked it.",
    ]  # fmt: skip
    for form, made in content["forms"].items():
        lines += ["", f"## {form}", "", f"Made from the log head `{made['log_head']}`."]
        lines += [f"Rounds with outcomes: {', '.join(made['rounds']) or 'none'}."]
        if made["left_out"]:
            lines.append(f"Left out, because they are not decided and closed: {', '.join(made['left_out'])}.")
        lines += ["", *(f"- `{each['path']}`: {each['holds']}" for each in made["files"])]
        lines += ["", f"To look at it: `{openers[form]}`"]
    return "\n".join(lines) + "\n"
