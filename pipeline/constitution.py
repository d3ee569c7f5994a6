"""The rules that the loop cannot change: load, verify by digest, answer questions, refuse with the article's number.

`constitution/constitution.yaml` holds numbered articles; `constitution/DIGEST` and every campaign hold its sha256. The file is read
from beside this package (the checkout at `init`, the campaign's frozen code afterwards), never from a path that a configuration or
the environment could name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import IntegrityError, Refused
from pipeline.records import Setting

HERE = Path(__file__).resolve().parent.parent / "constitution"

_NUMBER = {"decimal": re.compile(r"-?\d{1,12}(\.\d{1,12})?"), "integer": re.compile(r"-?\d{1,12}")}


@dataclass(frozen=True)
class Constitution:
    """The articles of one file, known by their digest."""

    digest: str
    articles: dict[str, dict[str, Any]]

    @property
    def quorum(self) -> int:
        return int(self.articles["3"]["scored_arms"])

    @property
    def num_rounds(self) -> int:
        return int(self.articles["4"]["rounds"])

    @property
    def arms_per_round(self) -> int:
        return int(self.articles["4"]["arms_per_round"])

    @property
    def first_round_replicates(self) -> int:
        return int(self.articles["5"]["replicates_in_first_round"])

    @property
    def z(self) -> Decimal:
        return Decimal(self.articles["7"]["z"])

    def check_settings(self, overrides: Iterable[Setting]) -> None:
        """Refuse, by article 2, the first override that is not on the allow-list or out of its range."""
        allowed = self.articles["2"]["keys"]
        for key, value in overrides:
            if key not in allowed:
                raise Refused(
                    "2", "closed_key", f"{key!r} may not change between rounds", f"Open keys: {', '.join(allowed)}"
                )
            if not isinstance(value, str):
                raise Refused("2", "wrong_type", f"{key} = {value!r} is a {type(value).__name__}", "Values are strings")
            rule = allowed[key]
            if rule["type"] == "choice":
                if value not in rule["choices"]:
                    raise Refused(
                        "2", "not_a_choice", f"{key} = {value[:80]!r}", f"Valid: {', '.join(rule['choices'])}"
                    )
                continue
            if not _is_number(rule["type"], value):
                raise Refused(
                    "2",
                    "not_a_number",
                    f"{key} = {value[:80]!r}",
                    f"Valid: {rule['type']} {rule['low']} to {rule['high']}",
                )
            if not Decimal(rule["low"]) <= Decimal(value) <= Decimal(rule["high"]):
                raise Refused("2", "out_of_range", f"{key} = {value}", f"Valid: {rule['low']} to {rule['high']}")

    def check_coverage(self, report: Mapping[str, Any], num_nodes: int) -> None:
        """Refuse, by article 6, a probe that did not make every check that an arm of so many nodes must pass."""
        article = self.articles["6"]
        needed = [*article["checks"], *(article["checks_on_one_node"] if num_nodes == 1 else [])]
        missing = [name for name in needed if name not in report or report[name]["reached"]]
        if missing:
            raise Refused(
                "6",
                "coverage",
                f"the probe lacks {', '.join(missing)}",
                "`python -m pipeline doctor` shows what a node has",
            )

    def check_round(self, number: int) -> None:
        """Refuse, by article 4, a round beyond the budget."""
        if number > self.num_rounds:
            raise Refused(
                "4",
                "rounds_spent",
                f"round {number} is beyond the campaign's {self.num_rounds} rounds",
                "Start a new campaign",
            )


def load(expected_digest: str | None = None, folder: Path = HERE) -> Constitution:
    """Read and verify. Raises IntegrityError when the file does not match `DIGEST` or what the campaign froze."""
    path = folder / "constitution.yaml"
    try:
        if path.is_symlink():
            raise IntegrityError(f"{path} is a symbolic link", "The constitution is a plain file")
        content = path.read_bytes()
        stated = (folder / "DIGEST").read_text().strip()
    except OSError as error:
        raise IntegrityError(f"cannot read the constitution in {folder}: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    for expected, where in ((stated, f"{folder / 'DIGEST'}"), (expected_digest, "the campaign's frozen digest")):
        if expected is not None and found != expected:
            raise IntegrityError(
                f"{path} has digest {found[:16]}, {where} says {expected[:16]}",
                "A changed constitution needs a new campaign (and its new sha256 in constitution/DIGEST)",
            )
    return Constitution(found, yaml.safe_load(content)["articles"])


def _is_number(kind: str, value: str) -> bool:
    return value.isascii() and bool(_NUMBER[kind].fullmatch(value))
