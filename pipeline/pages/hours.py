"""The part of a page on cost: hours by what they were spent on, and how long arms waited in a queue."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from statistics import median

from pipeline.campaign.files import read_json, read_json_lines
from pipeline.campaign.layout import Campaign, Round
from pipeline.exports import runs
from pipeline.exports.reading import read_campaign
from pipeline.pages import arm_charts
from pipeline.pages.parts import Part, Rows
from pipeline.reporting.document import Table

HOW = (
    "A bar is what all attempts of one cause took: the roles of arms, trainings that failed, attempts that were started again, and "
    "those that were cut short. What failed or was started again is what a better site or setting could save.",
)


def part(campaign: Campaign | None, names: Sequence[str]) -> Part:
    """names: the rounds that count, in order; r0000, which ran beside the first, counts with them."""
    found = Part("Hours by cause, and waiting", HOW)
    if campaign is None:
        found.missing.append("Hours are not shown, because only the log was read, and not the campaign's folder.")
        return found
    try:
        reading = read_campaign(campaign)
        hours = runs.gpu_hours(reading, names[-1])
        unit = "GPU-hours"
        if not any(hours.values()):
            found.lines.append(
                "No GPU was used, so these are hours of arms by the clocks of their workers; arms that ran at once count each."
            )
            unit, hours = "hours", runs.clock_hours(reading, names[-1])
    except Exception as error:
        found.missing.append(
            f"Hours are not shown, because the campaign's files cannot be read ({type(error).__name__})."
        )
        return found
    chart = arm_charts.bars(hours, f"{unit} by cause, up to {names[-1]}", "h")
    if chart:
        found.charts.append(chart)
        table = [
            ["cause", unit],
            *([cause, f"{value:,.3f}"] for cause, value in hours.items()),
            ["all", f"{sum(hours.values()):,.3f}"],
        ]
        found.rows.append(Rows(f"{unit} by cause", table))
    else:
        found.missing.append("There is no chart of hours, because the log has no attempt.")
    found.rows += _waits(campaign, names, found)
    return found


def _waits(campaign: Campaign, names: Sequence[str], part: Part) -> list[Rows]:
    """How long the arms of each round waited from their submission to the first sign of their workers."""
    table: Table = [["round", "arms that began", "shortest", "middle", "longest"]]
    for name in names:
        try:
            waits = _of_round(campaign.round(name))
        except Exception as error:
            part.missing.append(
                f"Waiting in {name} is not shown, because its files cannot be read ({type(error).__name__})."
            )
            continue
        if waits:
            table.append(
                [name, str(len(waits)), *(f"{value:,.0f} s" for value in (min(waits), median(waits), max(waits)))]
            )
    if len(table) == 1:
        part.lines.append("No round was submitted to a queue, so nothing waited in one.")
        return []
    return [
        Rows(
            "Waiting in the queue",
            table,
            "From the submission of a round to the first sign of each arm's first worker.",
        )
    ]


def _of_round(folder: Round) -> list[float]:
    record = read_json(folder.submitted) if folder.submitted.exists() else {}
    if "submitted_at" not in record:
        return []
    began = datetime.fromisoformat(record["submitted_at"]).timestamp()
    firsts = [folder.attempts(arm.name)[:1] for arm in folder.frozen_plan().arms]
    marks = [read_json_lines(first[0].phases) for first in firsts if first and first[0].phases.exists()]
    return [max(0.0, float(each[0]["at"]) - began) for each in marks if each]
