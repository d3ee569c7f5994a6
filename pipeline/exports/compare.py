"""Several campaigns side by side: what each decided and what it cost. It reads what was decided and derives nothing anew.

Accuracies run from 0 to 1. Intervals are of 95 % and serve only to be shown. No difference between campaigns is a claim: `NO_CLAIM` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pipeline.campaign.errors import ConfigError, OtherVersion
from pipeline.campaign.layout import Campaign
from pipeline.campaign.records import SETS, Policy
from pipeline.decision.history import REFERENCE
from pipeline.exports import runs, tables
from pipeline.exports.reading import FIRST, Reading, read_campaign
from pipeline.stats.lifts import interval

NO_CLAIM = (
    "A difference between campaigns is no claim of the constitution. Article 7 bounds false claims within one campaign, where runs of the "
    "standing recipe and of the reference recipe answer the same items of a round and the number of looks was frozen before the first.",
    "Here neither holds: each campaign drew its own items and its own luck of training, and nobody froze beforehand which campaigns would "
    "be compared. To show that one policy is better than another takes several campaigns of each, planned before the first.",
)
Z = 1.96  # standard errors on either side, for 95 %
WRITTEN_BY_DECISIONS = ("has_control", *(name for name in Policy.__dataclass_fields__ if name != "axes"))
"""The parts of `policy` that a round's decision writes; a person chooses the others."""


@dataclass(frozen=True)
class Comparison:
    """Campaigns side by side.

    sides: what is known of each campaign (`_side`), in the order given. differing: the settings that are not the same in all of them,
    key -> one value for each side, None where a campaign has no such setting. cannot: sentences about what is not comparable.
    unread: (folder, why) of the campaigns that this version cannot read.
    """

    sides: tuple[Mapping[str, Any], ...]
    differing: Mapping[str, tuple[str | None, ...]]
    cannot: tuple[str, ...]
    unread: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        names = [side["campaign"] for side in self.sides]
        return {
            "campaigns": list(self.sides),
            "settings_that_differ": {
                key: dict(zip(names, values, strict=True)) for key, values in self.differing.items()
            },
            "not_comparable": list(self.cannot),
            "not_read": [{"folder": folder, "why": why} for folder, why in self.unread],
            "no_claim": list(NO_CLAIM),
        }


def compare(folders: Sequence[Campaign]) -> Comparison:
    """Compare campaigns. Raises ConfigError for fewer than two of them or one named twice, and NotFound and IntegrityError as
    `read_campaign`. A campaign that another version wrote is named and left out; OtherVersion if fewer than two are left.
    """
    if len(folders) < 2:
        raise ConfigError(
            f"compare takes two campaigns or more, and {len(folders)} came", "`report` shows one campaign"
        )
    sides, settings, unread = [], [], []
    for folder in folders:
        try:
            reading = read_campaign(folder)
            sides.append(_side(reading))
            settings.append(_settings(reading))
        except OtherVersion as error:
            unread.append((str(folder.folder), str(error)))
    names = [side["campaign"] for side in sides]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"{', '.join(twice)} is named twice", "Name each campaign once; a copy of a campaign is the same campaign"
        )
    if len(sides) < 2:
        raise OtherVersion(
            f"fewer than two of these campaigns can be read by this version: {unread[0][1]}", "Name others"
        )
    keys = sorted({key for each in settings for key in each})
    columns = {key: tuple(each.get(key) for each in settings) for key in keys}
    differing = {key: values for key, values in columns.items() if len(set(values)) > 1}
    return Comparison(tuple(sides), differing, tuple(_cannot(sides, differing)), tuple(unread))


def _settings(reading: Reading) -> dict[str, str]:
    """The settings that a person chose, as dotted keys with text; those of the first round, because decisions change later ones."""
    rounds = [name for name in sorted(reading.history.plans) if name != FIRST]
    config = dict(reading.config(rounds[0] if rounds else FIRST))
    policy = {key: value for key, value in config["policy"].items() if key not in WRITTEN_BY_DECISIONS}
    policy["axes"] = {axis["name"]: _axis(axis) for axis in policy["axes"]}
    settings = {key: value for key, value in config.items() if key not in ("round", "arm")}
    return runs.flat({**settings, "policy": policy})


def _axis(axis: Mapping[str, Any]) -> str:
    spread = ", ".join(axis["choices"]) if axis["kind"] == "choice" else f"{axis['low']} to {axis['high']}"
    return f"{axis['key']}, {axis['kind']}: {spread}"


def _side(reading: Reading) -> dict[str, Any]:
    """What is known of one campaign, as JSON values."""
    newest = reading.decided[-1] if reading.decided else None
    decision = reading.history.decisions[newest] if newest else None
    planned = reading.history.plans
    return {
        "campaign": reading.name, "folder": str(reading.campaign.folder), "log_head": str(reading.anchor),
        "model": reading.config(FIRST)["model"]["name"], "image": reading.facts["image"]["tree_digest"],
        "constitution": reading.facts["constitution_digest"], "families": list(reading.facts["families"]),
        "dev_commitment": reading.facts["commitments"]["dev"], "external": reading.facts["external"],
        "planned_rounds": reading.history.num_rounds, "confirmation": reading.history.confirmation, "choice": reading.history.choice,
        "rounds": [_round(reading, name) for name in sorted(planned) if name != FIRST],
        "standing": dict(decision["policy"]["standing"]) if decision else {},
        "claims": {
            "claimed_in": [name for name in reading.decided if reading.history.decisions[name]["claimed"]],
            "shown_worse": _texts(decision, "dead_ends"), "set_aside": _texts(decision, "set_aside"),
        },
        "families_now": {name: state["name"] for name, state in sorted(decision["families"].items())} if decision else {},
        "evidence": _evidence(reading, newest) if newest else None,
        "goes_out": _goes_out(reading, decision) if decision else None,
        "gpu_hours": runs.gpu_hours(reading), "clock_hours": runs.clock_hours(reading),
    }  # fmt: skip


def _texts(decision: Mapping[str, Any] | None, field: str) -> list[str]:
    return ["=".join(setting) for setting in decision["policy"][field]] if decision else []


def _round(reading: Reading, name: str) -> dict[str, Any]:
    if name not in reading.decided:
        return {"round": name, "state": "open"}
    decision = reading.history.decisions[name]
    kept = next((arm for arm in reading.history.plans[name].arms if arm.name == decision["kept"]), None)
    return {
        "round": name, "state": decision["state"], "kept": decision["kept"], "setting": "=".join(kept.overrides[-1]) if kept else None,
        "claimed": decision["claimed"], "external": decision["external"],
        "families": {family: state["name"] for family, state in sorted(decision["families"].items())},
    }  # fmt: skip


def _evidence(reading: Reading, name: str) -> dict[str, Any]:
    """What the tests said at the newest decision; numbers of alarms, E of the board test, and noise as a standard deviation."""
    found = reading.evidence(name)
    noise = {"retraining_noise": float(Fraction(found["seed_variance"])) ** 0.5, "repeats": found["num_replicates"]}
    if found["look"] is None:
        return {"round": name, "tests_ran": False, **noise}
    verdict = found["look"]["verdict"]
    has_board = any(found["board"].values())
    return {
        "round": name, "tests_ran": True, **noise, "gap_alarms": sorted({each["family"] for each in verdict["gap_alarms"]}),
        "arm_alarms": sorted({each["arm"] for each in verdict["arm_alarms"]}), "leak_alarm": verdict["leak_alarm"],
        "board_alarm": verdict["board_alarm"] if has_board else None, "board_e": float(verdict["e_value"]) if has_board else None,
    }  # fmt: skip


def _goes_out(reading: Reading, decision: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scores of the arm that would go out, beside those of the reference in its round; None while there is no such arm."""
    if decision["winner"] is None:
        return None
    name, label = decision["winner"]
    arm = next(each for each in reading.history.plans[name].arms if each.name == label)
    found: dict[str, Any] = {"round": name, "arm": label, "settings": dict(arm.overrides)}
    for title, who in (("scores", label), ("reference_scores", REFERENCE)):
        outcome = tables.outcome_of(reading, name, who)
        found[title] = {
            item_set: share(outcome.right(item_set)[0].bit_count(), outcome.right(item_set)[1])
            for item_set in SETS
            if outcome is not None and outcome.scored(item_set)
        }
        rows = reading.history.target.design.board_rows
        score = reading.history.reference_score if who == REFERENCE else tables.board_score(reading, name, who)
        if score is not None and rows:
            found[title]["board"] = share(float(score) * rows, rows)
    evidence = reading.evidence(name)
    for lift in evidence["lifts"]:
        if (lift["arm"], lift["baseline"], lift["item_set"]) == (label, REFERENCE, "fresh"):
            mean, spread = Fraction(lift["mean"]), Fraction(lift["variance"]) + 2 * Fraction(evidence["seed_variance"])
            low, high = interval(mean, spread)
            found["fresh_lift"] = {"mean": float(mean), "low": float(low), "high": float(high)}
    return found


def share(right: float, number: int) -> dict[str, float]:
    """A share of right answers with its 95 % interval by Wilson's formula, which stays within 0 and 1 (Wilson 1927)."""
    p, weight = right / number, Z**2 / number
    middle, half = (
        (p + weight / 2) / (1 + weight),
        Z * (p * (1 - p) / number + weight / (4 * number)) ** 0.5 / (1 + weight),
    )
    return {"accuracy": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "items": number}


def _cannot(sides: Sequence[Mapping[str, Any]], differing: Mapping[str, Any]) -> list[str]:
    """What keeps numbers of these campaigns from being compared, a sentence each."""

    def each(field: str, length: int | None = None) -> str:
        return "; ".join(f"{side['campaign']}: {_short(side[field], length)}" for side in sides)

    def differ(field: str) -> bool:
        return len({str(side[field]) for side in sides}) > 1

    lines = []
    if differ("model"):
        lines.append(f"The models differ ({each('model')}), so scores say nothing about policies or recipes.")
    if differ("families"):
        lines.append(f"The families differ ({each('families')}), so accuracies are of other tasks.")
    levels = [key for key in differing if key in ("tasks.level", "tasks.max_new_tokens")]
    if levels:
        lines.append(
            f"The items are drawn or answered in another way ({', '.join(levels)} differ), so accuracies are of other tasks."
        )
    if differ("dev_commitment"):
        lines.append(
            "Each campaign has items of its own, so no two scores are paired, and a difference holds the luck of the items, too."
        )
    else:
        lines.append("Dev items are the same; fresh items and training seeds are each campaign's own.")
    if differ("external"):
        lines.append(f"The external targets differ ({each('external')}), so board scores cannot be compared.")
    elif sides[0]["external"] == "none":
        lines.append("No campaign has an external target, so there is no board score to compare.")
    else:
        lines.append("Boards of one kind may still have other hidden items, so board scores are unpaired at best.")
    if differ("image"):
        lines.append(
            f"The images differ ({each('image', 16)}): code that trains and scores, or its data, is not the same."
        )
    if differ("constitution"):
        lines.append(
            f"The constitutions differ ({each('constitution', 16)}): what counts as kept or claimed is not the same."
        )
    if differ("planned_rounds") or differ("confirmation"):
        lines.append(f"Error rates are spread over other numbers of rounds ({each('planned_rounds')}) or confirmed in another way "
                     f"({each('confirmation')}), so a claim was not equally easy.")  # fmt: skip
    return lines


def _short(value: Any, length: int | None) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)[:length]
