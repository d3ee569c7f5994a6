"""The page of a comparison: a column for each campaign. `document` lays it out as text or as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.decision import promotion
from pipeline.decision.family_states import UNPROVEN
from pipeline.exports.compare import NO_CLAIM, Comparison
from pipeline.exports.folder import counted
from pipeline.reporting.document import Section, Table

Side = Mapping[str, Any]
GROUPS = {"policy": "policy", "worker": "policy", "cluster": "site", "parallelism": "site", "campaign": "site"}
"""Where a setting is shown by the first word of its key."""


def sections(found: Comparison) -> list[Section]:
    """The sections of the page, the main point first."""
    sides = found.sides
    groups: dict[str, dict[str, tuple[str | None, ...]]] = {"policy": {}, "site": {}, "other": {}}
    for key, values in found.differing.items():
        groups[GROUPS.get(key.split(".")[0], "other")][key] = values
    head = [_stands(side) for side in sides] + [f"{folder} was left out: {why}." for folder, why in found.unread]
    return [
        Section(f"Comparison of {', '.join(side['campaign'] for side in sides)}", [*head, *NO_CLAIM]),
        Section("What cannot be compared", list(found.cannot)),
        _differences("Policies: the settings that differ", sides, groups["policy"], "The policies are the same."),
        _differences("Other settings that differ", sides, groups["other"], "All other settings are the same."),
        Section(
            "Recipes that stand",
            *_of(sides, "setting over the reference", lambda side: side["standing"], "Every reference recipe stands as it was."),
        ),
        Section("Rounds", *_of(sides, "round", lambda side: {each["round"]: _round(each) for each in side["rounds"]}, "No round is planned.")),
        Section(
            "Families: the newest state, and what led to it", *_of(sides, "family", _states, "No round is decided.")
        ),
        Section("Evidence at the newest decision", *_of(sides, "test", _evidence, "No round is decided.")),
        Section(
            "Scores of what goes out",
            *_of(sides, "score", _goes_out, "No arm would go out yet."),
        ),
        Section("Claims", *_of(sides, "statement", _claims, "No round is decided.")),
        Section(
            "GPU-hours by cause, without GPUs hours of arms",
            *_of(sides, "cause", _hours, "The log has no attempt."),
        ),
        _differences("Site and layout: the settings that differ", sides, groups["site"], "Site and layout are the same."),
    ]  # fmt: skip


def _stands(side: Side) -> str:
    decided = [each for each in side["rounds"] if each["state"] != "open"]
    claimed = side["claims"]["claimed_in"]
    words = f"{side['campaign']} ({side['model']}) has decided {len(decided)} of {counted(side['planned_rounds'], 'round')}; "
    words += f"an improvement is claimed in {', '.join(claimed)}" if claimed else "no improvement is claimed"
    if out := side["goes_out"]:
        words += f"; {out['arm']} of {out['round']} would go out"
    return f"{words}."


def _differences(
    title: str, sides: tuple[Side, ...], settings: Mapping[str, tuple[str | None, ...]], same: str
) -> Section:
    if not settings:
        return Section(title, [same])
    rows = [[key, *("-" if value is None else value for value in values)] for key, values in settings.items()]
    return Section(title, [], [["setting", *(side["campaign"] for side in sides)], *rows])


def _of(
    sides: tuple[Side, ...], first: str, get: Callable[[Side], Mapping[str, str]], nothing: str
) -> tuple[list[str], Table]:
    """A table with a row for each key that any campaign has, in the order in which they come; or the line `nothing`."""
    columns = [get(side) for side in sides]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if not keys:
        return [nothing], []
    return [], [
        [first, *(side["campaign"] for side in sides)],
        *([key, *(column.get(key, "-") for column in columns)] for key in keys),
    ]


def _round(each: Mapping[str, Any]) -> str:
    if each["state"] != "decided":
        return str(each["state"])
    kept = f"kept {each['kept']} ({each['setting']})" if each["kept"] else "nothing is kept"
    external = f", {each['external']}" if each["external"] != "EXTERNAL-CLEAR" else ""
    return f"{kept}{', improvement claimed' if each['claimed'] else ''}{external}"


def _states(side: Side) -> dict[str, str]:
    """For each family its states in order, each with the round in which it began; the first one alone where it stayed."""
    decided = [each for each in side["rounds"] if each.get("families")]
    found: dict[str, list[str]] = {}
    for before, each in zip([None, *decided], decided, strict=False):
        for family, state in each["families"].items():
            if before is None and state == UNPROVEN:
                continue
            if before is None or before["families"].get(family) != state:
                found.setdefault(family, []).append(f"{state} from {each['round']}")
    return {family: ", ".join(found.get(family, [state])) for family, state in side["families_now"].items()}


def _evidence(side: Side) -> dict[str, str]:
    found = side["evidence"]
    if found is None:
        return {}
    noise = f"{100 * found['retraining_noise']:.2f} points ({counted(found['repeats'], 'repeat')})"
    if not found["tests_ran"]:
        return {"round": found["round"], "tests": "did not run", "noise of retraining": noise}
    board = (
        "no board scores"
        if found["board_e"] is None
        else f"{'ALARM' if found['board_alarm'] else 'no alarm'}, E = {found['board_e']:.2f}"
    )
    return {
        "round": found["round"], "gap alarms (dev ahead of fresh)": ", ".join(found["gap_alarms"]) or "none",
        "arm alarms": ", ".join(found["arm_alarms"]) or "none", "board test": board,
        "leak test": "ALARM" if found["leak_alarm"] else "no alarm", "noise of retraining": noise,
    }  # fmt: skip


def _goes_out(side: Side) -> dict[str, str]:
    found = side["goes_out"]
    if found is None:
        return {}
    rows = {"arm": f"{found['arm']} of {found['round']}"}
    for item_set in ("dev", "fresh", "board"):
        for title, field in ((item_set, "scores"), (f"{item_set}, the reference", "reference_scores")):
            if one := found[field].get(item_set):
                rows[f"{title}, % (95 %)"] = (
                    f"{100 * one['accuracy']:.1f} ({100 * one['low']:.1f} to {100 * one['high']:.1f}, {one['items']} items)"
                )
    if lift := found.get("fresh_lift"):
        rows["fresh lift over the reference, points (95 %)"] = (
            f"{100 * lift['mean']:+.2f} ({100 * lift['low']:+.2f} to {100 * lift['high']:+.2f})"
        )
    return rows


def _claims(side: Side) -> dict[str, str]:
    if side["evidence"] is None:
        return {}
    claims = side["claims"]
    titles = {
        "claimed_in": "improvement claimed in",
        "shown_worse": "shown to be worse",
        "set_aside": "set aside after one run",
    }
    told = {title: ", ".join(claims[field]) or "none" for field, title in titles.items()}
    if side["choice"] == promotion.MAX_DEV:  # "none" would say that no test found any
        told |= {titles[field]: "closes no value (policy.choice=max_dev)" for field in ("shown_worse", "set_aside")}
    return told


def _hours(side: Side) -> dict[str, str]:
    """GPU-hours; where no GPU was used, hours by the clocks of the workers."""
    used_gpus = any(side["gpu_hours"].values())
    hours = side["gpu_hours"] if used_gpus else side["clock_hours"]
    if not hours:
        return {"all": "0.00 (no GPU was used)"} if side["gpu_hours"] else {}
    unit, digits = ("", 2) if used_gpus else (" h of arms, no GPU", 3)
    return {cause: f"{value:,.{digits}f}{unit}" for cause, value in {**hours, "all": sum(hours.values())}.items()}
