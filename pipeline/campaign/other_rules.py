"""Tell a campaign that was frozen under other rules than this code has, and say which command judges it by the code that it carries.

Rules change between versions. Articles, records and critical values of another version may lack what this code reads, or mean something
else, so whatever this code derived from them would be about its own rules and not about the campaign.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.constitution import HERE
from pipeline.campaign.errors import OtherRules, PipelineError
from pipeline.campaign.files import tree_digest
from pipeline.campaign.layout import CODE_ROOT

Facts = Mapping[str, Any]
RULES = (
    "constitution", "pipeline/audit", "pipeline/campaign/canonical.py", "pipeline/campaign/constitution.py", "pipeline/campaign/heads.py",
    "pipeline/campaign/keys.py", "pipeline/campaign/records.py", "pipeline/campaign/strict_json.py", "pipeline/claims",
    "pipeline/decision", "pipeline/stats",
)  # fmt: skip
"""Files and folders of the code that say what follows from a log."""
SUFFIXES = (".py", ".json", ".yaml")
REVISION = re.compile("[0-9a-f]{7,40}")
"""A revision without `+changes`: another checkout can have exactly that code."""
HEX = re.compile("[0-9a-f]{64}")


def own_constitution() -> str:
    """The sha256 of this code's constitution."""
    return hashlib.sha256((HERE / "constitution.yaml").read_bytes()).hexdigest()


def other_constitution(facts: Facts) -> str:
    """That a campaign has another constitution than this code, as a clause; empty if it has not, or names none."""
    if not is_named(facts) or facts["constitution_digest"] == own_constitution():
        return ""
    return f"it was frozen under constitution {facts['constitution_digest'][:16]}, and this code has {own_constitution()[:16]}"


def other_code(folder: Path, facts: Facts) -> str:
    """That a campaign carries, unchanged since `init`, code whose rules differ from this code's, as a clause; empty if not.

    folder: of the campaign or bundle. Code that was changed since, or that lacks the part that decides, is no reason to ask another version:
    an audit reports it.
    """
    if not is_named(facts) or not (code_of(folder, facts) / "pipeline" / "decision").is_dir():
        return ""
    try:
        is_whole = tree_digest(code_of(folder, facts)) == facts["code_digest"]
        is_other = is_whole and _rules(code_of(folder, facts)) != _rules(CODE_ROOT)
    except (OSError, PipelineError):
        return ""
    return "this code derives something else than the code that it was frozen with" if is_other else ""


def code_of(folder: Path, facts: Facts) -> Path:
    """The folder of the frozen code. It need not exist: a bundle may lack it."""
    return folder / "code" / str(facts["code_digest"])[:16]


def _rules(root: Path) -> dict[str, bytes]:
    paths = [path for name in RULES for path in ([root / name] if "." in name else (root / name).rglob("*"))]
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in paths
        if path.suffix in SUFFIXES and path.is_file()
    }


def error(given: Path, folder: Path, facts: Facts, why: str, words: Sequence[str]) -> OtherRules:
    """The answer for a campaign under other rules: the digest of its code, where that code is, and the command that runs it.

    given: the campaign's folder or bundle as a person typed it. folder: where its files are. why: a clause, of one of the functions above.
    words: the command to run, as the words after `python -m pipeline`.
    """
    digest, revision = facts["code_digest"][:16], str(facts.get("revision"))
    unpack, place = "", given
    if not given.is_dir():
        place = given.with_name(f"{given.name}.unpacked")
        unpack = f"python -m zipfile -e {shlex.quote(str(given))} {shlex.quote(str(place))} && "
    own = f"PYTHONPATH={shlex.quote(str(code_of(place, facts)))} python -P -m pipeline {shlex.join(words)}"
    where = (
        f"`{unpack}{own}` runs the copy that it carries"
        if code_of(folder, facts).is_dir()
        else "These files do not hold that code"
    )
    known = (
        f"; whoever does not trust it takes revision {revision} of the project" if REVISION.fullmatch(revision) else ""
    )
    act = "Audit it" if words[0] == "audit" else f"Run `{words[0]}`"
    return OtherRules(
        f"{given} cannot be judged by this code, because {why}", f"{act} with the code of {digest}: {where}{known}"
    )


def facts_in(log: Path) -> dict[str, Any] | None:
    """The frozen facts in the first record of a log; None where they cannot be read."""
    try:
        with open(log, "rb") as lines:
            facts = strict_json.read(next(lines))["facts"]
        return facts if isinstance(facts, dict) else None
    except (OSError, StopIteration, ValueError, KeyError, TypeError):
        return None


def is_named(facts: Facts) -> bool:
    """Whether facts name a constitution and a code by sha256. (The code's digest becomes part of a path.)"""
    names = ("constitution_digest", "code_digest")
    return all(isinstance(facts.get(name), str) and HEX.fullmatch(facts[name]) for name in names)
