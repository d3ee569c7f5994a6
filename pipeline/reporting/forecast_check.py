"""The forecast that was frozen with a round, against what the round took by the workers' clocks.

    phase                   forecast  actual  forecast / actual - 1
    training of an arm        48.2 s  47.1 s                 +2.3 %

A forecast is made once, before the round's plan is logged, and never again (rounds/freeze.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Attempt, Round
from pipeline.campaign.log import Log
from pipeline.config.settings import Settings
from pipeline.execution import results
from pipeline.execution.trial import GROUPS, group_seconds
from pipeline.reporting.document import Section

TITLE = "Forecast and actual"
ARM, ROUND, DEVICES = "an arm", "round", "devices"


def forecast_of(folder: Round) -> dict[str, Any] | None:
    """Return what was forecast for a round before it was planned; None where no rate was known then.

    It is read in the sealed log, because forecast.json beside the plan can be edited, which only an audit finds.
    """
    about = ("forecast", folder.name)
    made = [each for each in Log(folder.campaign.log).records() if (each["event"], each.get("round")) == about]
    return made[-1]["forecast"] if made else None


def actual(folder: Round, world_size: int) -> dict[str, float]:
    """Return what the round took, in seconds: each group of phases and the whole of an arm, the round, and all its arms' devices.

    An arm's time is that of all its attempts, and the means are over the arms that have a score; without one they are left out. The round
    lasts from its first attempt's start to its last attempt's end. r0000 is counted with the first round, beside which it runs.
    """
    beside = [folder.campaign.round("r0000")] if folder.number == 1 else []
    marks = {
        (each.name, arm.name): [begun for attempt in each.attempts(arm.name) if (begun := _marks(attempt))]
        for each in (*beside, folder)
        for arm in each.frozen_plan().arms
    }
    ended = [arm.name for arm in folder.frozen_plan().arms if results.has_score(folder.published(arm.name))]
    arms = [marks[folder.name, arm] for arm in ended if marks[folder.name, arm]]
    if not arms:
        return {}
    groups = [[group_seconds(attempt) for attempt in attempts] for attempts in arms]
    found = {name: mean(sum(attempt[name] for attempt in attempts) for attempts in groups) for name in GROUPS}
    every = [attempt for attempts in marks.values() for attempt in attempts]
    found[ARM] = mean(sum(map(_seconds, attempts)) for attempts in arms)
    found[ROUND] = max(attempt[-1]["at"] for attempt in every) - min(attempt[0]["at"] for attempt in every)
    found[DEVICES] = world_size * sum(map(_seconds, every))
    return found


def _marks(attempt: Attempt) -> list[Any]:
    return read_json_lines(attempt.phases) if attempt.phases.exists() else []


def _seconds(marks: Sequence[Mapping[str, Any]]) -> float:
    return float(marks[-1]["at"] - marks[0]["at"])


def compare(folder: Round, chosen: Settings) -> dict[str, Any]:
    """Return the forecast, what happened and the relative error of each phase, for `report --json`. Seconds; null for what is not known."""
    frozen, took = forecast_of(folder), actual(folder, chosen.parallelism.world_size)
    expected: dict[str, float] = {}
    if frozen:
        expected = {
            name: value / 1000
            for name, value in (*frozen["arm"].items(), (ROUND, frozen["round"]), (DEVICES, frozen["devices"]))
        }
        expected[ARM] = expected.pop("arm")
    phases = {}
    for name in (*GROUPS, ARM, ROUND, DEVICES):
        forecast, seconds = expected.get(name), took.get(name)
        error = forecast / seconds - 1 if forecast is not None and seconds else None
        phases[name] = {"forecast": forecast, "actual": seconds, "error": error}
    return {"source": frozen["source"] if frozen else None, "phases": phases}


def section(folder: Round, chosen: Settings) -> Section:
    """Return the section of the page with the forecast beside what the round took."""
    found, what = compare(folder, chosen), "GPU" if chosen.cluster.gpus_per_node else "rank"
    counted = ", with the reference and the base" if folder.number == 1 else ""
    names = {name: f"{name} of an arm" for name in GROUPS} | {
        ARM: "an arm as a whole", ROUND: f"the round, first start to last end{counted}", DEVICES: f"{what}-hours of the arms{counted}",
    }  # fmt: skip
    if found["source"] is None:
        lines = ["No forecast was made before this round, because no rate was known then (cluster.capacity)."]
    else:
        lines = [
            f"The forecast was frozen before the round's plan; its rates were {found['source']}. It counts no waiting in a queue."
        ]
        if chosen.worker.agent == "llm":
            lines.append(
                "It counts no arm that fails, and of an agent's arm the full run alone, not what the agent does before and beside it."
            )
    table = [["phase", "forecast", "actual", "forecast / actual - 1"]]
    for name, each in found["phases"].items():
        error = "-" if each["error"] is None else f"{100 * each['error']:+.1f} %"
        table.append([names[name], *(_shown(each[side], name) for side in ("forecast", "actual")), error])
    return Section(TITLE, lines, table)


def _shown(seconds: float | None, name: str) -> str:
    """Return seconds, or for what devices worked hours, with a unit; a dash where it is not known."""
    if seconds is None:
        return "-"
    return f"{seconds / 3600:,.3f} h" if name == DEVICES else f"{seconds:,.1f} s"
