"""The three tables of an export: item outcomes, arms, and decisions. A table is its columns and its rows, which are plain values.

Accuracies run from 0 to 1, and a lift is a difference of them. The floats are for people and programs beside the pipeline: nothing
that was decided rests on them. An empty cell (None) means that the value is not known or does not exist.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.files import file_digest
from pipeline.campaign.records import SETS, Arm, Outcome
from pipeline.decision import board_submissions
from pipeline.decision.history import REFERENCE
from pipeline.execution import results
from pipeline.exports.reading import FIRST, Reading
from pipeline.stats.lifts import accuracy, interval

Row = dict[str, Any]
MARKS = {"1": (True, False), "0": (False, False), "T": (False, True)}
"""(correct, truncated) of each character of an outcome string."""


@dataclass(frozen=True)
class Table:
    """A table that is made anew each time that its rows are asked for. `columns` maps a name to the type of its values."""

    name: str
    columns: Mapping[str, type]
    rows: Callable[[], Iterator[Row]]


ITEM_COLUMNS: Mapping[str, type] = {
    "campaign": str, "round": str, "arm": str, "role": str, "set": str, "family": str, "item": int, "item_id": str,
    "correct": bool, "truncated": bool, "num_tokens": int, "seed": int, "moved_key": str, "moved_value": str, "edited": bool,
}  # fmt: skip
ARM_COLUMNS: Mapping[str, type] = {
    "campaign": str, "round": str, "arm": str, "role": str, "axis": str, "moved_key": str, "moved_value": str, "replicate_of": str,
    "seed": int, "status": str, "exit_class": str, "edited": bool, "dev_right": int, "dev_items": int, "dev_accuracy": float,
    "fresh_right": int, "fresh_items": int, "fresh_accuracy": float, "board_score": float, "dev_lift": float, "fresh_lift": float,
    "fresh_lift_low": float, "fresh_lift_high": float, "value": float, "attempts": int, "gpu_seconds": int, "settings": str,
    "kept": bool, "set_aside": bool, "shown_worse": bool, "decision_says": str,
}  # fmt: skip
DECISION_COLUMNS: Mapping[str, type] = {
    "campaign": str, "round": str, "number": int, "state": str, "kept": str, "claimed": bool, "winner_round": str, "winner_arm": str,
    "external": str, "families": str, "standing": str, "reasons": str,
}  # fmt: skip


def of_campaign(reading: Reading) -> list[Table]:
    """The tables of every shown round."""
    return [
        Table("items", ITEM_COLUMNS, lambda: _items(reading)),
        Table("arms", ARM_COLUMNS, lambda: _arms(reading)),
        Table("decisions", DECISION_COLUMNS, lambda: _decisions(reading)),
    ]


def runs(reading: Reading, name: str) -> Iterator[tuple[str, Arm]]:
    """The arms of a round with the names under which they are exported, the reference first: it is judged anew in each round."""
    if name != FIRST:
        yield REFERENCE, next(arm for arm in reading.history.plans[FIRST].arms if arm.role == "reference")
    for arm in reading.history.plans[name].arms:
        yield arm.name, arm


def moved(arm: Arm) -> tuple[str | None, str | None]:
    """(key, value) of the setting that an arm moves; None for a repeat of a recipe, which moves nothing."""
    return arm.overrides[-1] if arm.overrides and not arm.replicate_of else (None, None)


def outcome_of(reading: Reading, name: str, arm: str) -> Outcome | None:
    """How an arm ended, by the log.

    The log has no outcome of the arms of r0000, so theirs come from their result files; without one, the reference's is that on dev
    items which the rounds have.
    """
    if name != FIRST:
        return reading.history.outcomes.get((name, arm))
    if path := _result_file(reading, FIRST, arm):
        return results.read_outcome(path, file_digest(path))
    is_reference = any(each.name == arm and each.role == "reference" for each in reading.history.plans[FIRST].arms)
    for at in reading.decided if is_reference else ():
        found = reading.history.outcomes.get((at, REFERENCE))
        if found and found.scored("dev"):
            return replace(found, arm=arm, outcomes={"dev": found.outcomes["dev"]})
    return None


def _items(reading: Reading) -> Iterator[Row]:
    for name in reading.shown:
        for label, arm in runs(reading, name):
            outcome = outcome_of(reading, name, label)
            if outcome is None or outcome.status != "completed":
                continue
            details = _details(reading, name, label)
            key, value = moved(arm)
            same = {"campaign": reading.name, "round": name, "arm": label, "role": arm.role}
            last = {"seed": arm.seed, "moved_key": key, "moved_value": value, "edited": outcome.edited}
            replaced = dict(reading.history.plans[name].policy.repaired)
            for item_set, families in sorted(outcome.outcomes.items()):
                for family, marks in sorted(families.items()):
                    if label == REFERENCE and item_set == "dev" and replaced.get(family) != name:
                        continue  # it answers dev items once: as a0 of r0000, or in the round in which a family's are new
                    known = details.get(item_set, {}).get(family)
                    if known is not None and "".join(mark for _, _, mark in known) != marks:
                        raise IntegrityError(
                            f"the result file of {name}/{label} has other outcomes for {family} on {item_set} than the log",
                            "Restore it from a copy; `audit` says what else differs",
                        )
                    for number, mark in enumerate(marks):
                        item_id, num_tokens, _ = known[number] if known else (None, None, mark)
                        correct, truncated = MARKS[mark]
                        own = {"set": item_set, "family": family, "item": number, "item_id": item_id}
                        yield same | own | {"correct": correct, "truncated": truncated, "num_tokens": num_tokens} | last


def _details(reading: Reading, name: str, label: str) -> dict[str, dict[str, list[tuple[str, int, str]]]]:
    """Set -> family -> (item id, number of tokens, mark) of each item, from an arm's result file; {} where the file is not there.

    A copy of a campaign without HDF5 files, such as a bundle, gives the other columns from the log alone.
    """
    path = _result_file(reading, name, label)
    if path is None:
        return {}
    found: dict[str, dict[str, list[tuple[str, int, str]]]] = {}
    for item_set, rows in results.item_marks(path).items():
        for family, item_id, num_tokens, mark in rows:
            found.setdefault(item_set, {}).setdefault(family, []).append((item_id, num_tokens, mark))
    return found


def _result_file(reading: Reading, name: str, label: str) -> Path | None:
    """The result file of an arm that the log names; None where there is no file of the arm.

    An arm that was started again has a newer published file before the log knows it; its earlier attempt still has the file that counts.
    Raises IntegrityError where files are there and the log names none of them.
    """
    folder = reading.round(name)
    outcome = reading.history.outcomes.get((name, label))
    known = {outcome.result_digest} if outcome and label != REFERENCE else reading.known_digests
    own = [attempt.result for attempt in folder.attempts(label)]
    candidates = [folder.folder / "reference.h5"] if label == REFERENCE else [folder.published(label), *own]
    there = [path for path in candidates if path.exists()]
    for path in there:
        if file_digest(path) in known:
            return path
    if there:
        raise IntegrityError(
            f"{there[0]} is not a file that the log names", "Restore it from a copy, or run `audit` to see what changed"
        )
    return None


def _arms(reading: Reading) -> Iterator[Row]:
    for name in reading.shown:
        decision = reading.history.decisions.get(name, {})
        evidence = reading.evidence(name) if name != FIRST else {}
        values = (evidence.get("look") or {}).get("values", {})
        lifts = {
            (each["arm"], each["item_set"]): each for each in evidence.get("lifts", ()) if each["baseline"] == REFERENCE
        }
        before = reading.history.plans[name].policy
        news = {
            field: [tuple(each) for each in decision["policy"][field] if tuple(each) not in getattr(before, field)]
            if decision
            else []
            for field in ("set_aside", "dead_ends")
        }
        for label, arm in runs(reading, name):
            outcome = outcome_of(reading, name, label) or Outcome(label, arm.role, "absent", "never_started")
            attempts = reading.attempts(name, label)
            row: Row = dict.fromkeys(ARM_COLUMNS)
            key, value = moved(arm)
            row |= {
                "campaign": reading.name, "round": name, "arm": label, "role": arm.role, "axis": arm.axis, "moved_key": key,
                "moved_value": value, "replicate_of": arm.replicate_of, "seed": arm.seed, "status": outcome.status,
                "exit_class": outcome.exit_class, "edited": outcome.edited, "board_score": board_score(reading, name, label),
                "attempts": len(attempts), "gpu_seconds": sum(each["gpu_seconds"] for each in attempts),
                "settings": json.dumps(dict(arm.overrides), sort_keys=True), "kept": decision.get("kept") == label,
                "set_aside": (key, value) in news["set_aside"], "shown_worse": (key, value) in news["dead_ends"],
                "decision_says": "; ".join(_about(label, decision.get("reasons", ()))) or None,
"value": float(values[label]) if label in values else None,
            }  # fmt: skip
            for item_set in SETS:
                if (share := accuracy(outcome, item_set)) is not None:
                    bits, num_items = outcome.right(item_set)
                    row |= {
                        f"{item_set}_right": bits.bit_count(),
                        f"{item_set}_items": num_items,
                        f"{item_set}_accuracy": float(share),
                    }
                if lift := lifts.get((label, item_set)):
                    row[f"{item_set}_lift"] = float(Fraction(lift["mean"]))
            if lift := lifts.get((label, "fresh")):
                spread = Fraction(lift["variance"]) + 2 * Fraction(evidence["seed_variance"])
                low, high = interval(Fraction(lift["mean"]), spread)
                row |= {"fresh_lift_low": float(low), "fresh_lift_high": float(high)}
            yield row


def _about(label: str, reasons: Iterable[str]) -> list[str]:
    """The reasons of a decision that name an arm; none for the reference, which nearly every reason names."""
    return [] if label == REFERENCE else [reason for reason in reasons if re.search(rf"\b{label}\b", reason)]


def board_score(reading: Reading, name: str, label: str) -> float | None:
    """The score that the board printed for an arm of a round, as a finalist where it was submitted as nothing else; of the reference's
    repeats their mean; None while there is none."""
    if label == REFERENCE:
        scores = list(reading.history.references.get(name, {}).values())
    else:
        found = (
            board_submissions.known_scores(reading.records, purpose).get(name, {}).get(label)
            for purpose in ("slot", "finalist")
        )
        scores = [score for score in found if score is not None][:1]
    return float(sum(scores) / len(scores)) if scores else None


def _decisions(reading: Reading) -> Iterator[Row]:
    """A row for each decision that was ever made of a shown round: a late arm may change one, and the newest counts."""
    for record in reading.records:
        if record["event"] != "decision" or record["round"] not in reading.decided:
            continue
        decision = record["decision"]
        winner = decision["winner"] or (None, None)
        yield {
            "campaign": reading.name, "round": record["round"], "number": record["number"], "state": decision["state"],
            "kept": decision["kept"], "claimed": decision["claimed"], "winner_round": winner[0], "winner_arm": winner[1],
            "external": decision["external"],
            "families": json.dumps({family: state["name"] for family, state in sorted(decision["families"].items())}),
            "standing": json.dumps(dict(decision["policy"]["standing"]), sort_keys=True), "reasons": json.dumps(decision["reasons"]),
        }  # fmt: skip
