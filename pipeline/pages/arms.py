"""The part of a page on the arms of one round: their scores, how each ended and what it cost, and their training
curves."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Attempt, Round
from pipeline.exports import curves
from pipeline.pages import arm_charts
from pipeline.pages.numbers import Records, RoundNumbers
from pipeline.pages.parts import Part, Rows, of_section
from pipeline.reporting.document import Section, Table
from pipeline.reporting.status import gpus_of_an_arm

LARGEST = 1_000_000  # a loss beyond it, on either side of 0, is not drawn: a training may write any number
MOST_BYTES = 32_000_000  # of a training's lines, some 200,000 steps: a page must not take a job's memory
WORDS = 200  # letters of a worker's message that a page shows
HOW = (
    "An arm is one training run. Most of them move one setting of the recipe; [[anchor]] and [[replicate]] move nothing and show "
    "how much luck does. The column [[lift|fresh lift]] is what an arm gained over the [[reference adapter]] on puzzles that nobody "
    "can have learned, with an interval for the choice of puzzles and for training again.",
)


def part(at: RoundNumbers, scores: Section, agents: Section | None, folder: Round | None, records: Records) -> Part:
    """scores, agents: the sections of the text page. folder: the round's; without it there is no cost and
    no curve. records: of the log."""
    chart = arm_charts.arms(at)
    found = Part(f"Arms of {at.name}", HOW, [chart] if chart else [], lines=list(scores.lines))
    found.rows.append(
        Rows(
            "Scores of the arms",
            scores.table,
            "`value` is what the choice goes by, in points above the reference adapter. Where a lift should stand and a word does, "
            "the arm has no score, and the word says why.",
        )
    )
    if not chart:
        found.missing.append("There is no chart of the arms, because none of them has a score.")
    if agents:
        found.parts.append(of_section(agents, caption="What each agent did and used"))
    if folder is None:
        found.missing.append(
            "Costs and training curves are not shown, because only the log was read, and not the campaign's folder."
        )
        return found
    found.rows.append(_endings(at, folder, records, found.missing))
    found.parts.append(_curves(at, folder))
    return found


def _endings(at: RoundNumbers, folder: Round, records: Records, missing: list[str]) -> Rows:
    try:
        gpus = gpus_of_an_arm(folder.config)
    except Exception as error:  # whatever is wrong with a file, a page must not fail on it
        missing.append(
            f"GPU-hours are not shown, because {folder.config.name} cannot be read ({type(error).__name__})."
        )
        gpus = 0
    logged = {
        (record["arm"], record["attempt"]): record["gpu_seconds"]
        for record in records
        if record["event"] == "attempt" and record["round"] == at.name
    }
    table: Table = [
        ["arm", "outcome", "cause", "attempts", "GPU-hours" if gpus else "hours", "what its worker said last"]
    ]
    for arm in at.plan.arms:
        outcome, seconds, last, attempts = at.outcome(arm.name), 0.0, "", 0
        try:
            for attempt in folder.attempts(arm.name):
                attempts += 1
                span, detail = _span(attempt)
                last = detail or last
                seconds += logged.get((arm.name, attempt.number), gpus * span) if gpus else span
        except Exception as error:
            missing.append(
                f"The cost of {arm.name} is not shown, because the marks of its worker cannot be read ({type(error).__name__})."
            )
            seconds = 0.0
        has_score = outcome is not None and outcome.scored("fresh")
        table.append([
            arm.name, outcome.status if outcome else "absent", "" if has_score or outcome is None else outcome.exit_class,
            str(attempts), f"{seconds / 3600:.3f}" if seconds else "-", "" if has_score else last[:WORDS],
        ])  # fmt: skip
    how = (
        "A crash has no score, never a score of 0. `cause` is the [[exit class]] of an arm that has none. All attempts of an arm "
        "count in its hours."
    )
    return Rows("How each arm ended, and what it cost", _without_empty_columns(table), how)


def _without_empty_columns(table: Table) -> Table:
    filled = [any(row[column] for row in table[1:]) for column in range(len(table[0]))]
    return [[cell for cell, is_filled in zip(row, filled, strict=True) if is_filled] for row in table]


def _span(attempt: Attempt) -> tuple[float, str]:
    """Seconds from the first mark of an attempt's worker to its last, and the newest detail that it gave."""
    marks = read_json_lines(attempt.phases) if attempt.phases.exists() else []
    details = [str(mark.get("detail", "")) for mark in marks]
    seconds = float(marks[-1]["at"] - marks[0]["at"]) if marks else 0.0
    return seconds, next((each for each in reversed(details) if each), "")


def _curves(at: RoundNumbers, folder: Round) -> Part:
    found = Part(
        f"Training curves of {at.name}",
        (
            "Each small chart is the loss of one arm by its training steps, as its training says itself; nobody checked these "
            "numbers, and no score comes from them. A loss that jumps or stays high is a sign of a training that went wrong.",
        ),
    )
    for arm in at.plan.arms:
        try:
            if (written := _written(folder, arm.name)) > MOST_BYTES:
                found.missing.append(
                    f"The training curve of {arm.name} is not shown, because its training wrote {written / 1e6:,.0f} MB of lines; a page reads "
                    f"at most {MOST_BYTES / 1e6:.0f} MB."
                )
                continue
            points = [(float(point.step), point.values["loss"]) for point in curves.of_arm(folder, arm.name, 0)]
        except Exception as error:
            found.missing.append(
                f"The training curve of {arm.name} is not shown, because its files cannot be read "
                f"({type(error).__name__})."
            )
            continue
        drawn = [point for point in points if abs(point[1]) <= LARGEST]
        if len(drawn) < len(points):
            found.missing.append(
                f"{len(points) - len(drawn)} of {len(points)} steps of {arm.name} are not drawn, because their loss is beyond {LARGEST:,}."
            )
        chart = arm_charts.curve(_name(arm.name, arm.overrides, arm.role), arm_charts.thinned(drawn))
        if chart:
            found.charts.append(chart)
        elif not points:
            found.missing.append(f"The training curve of {arm.name} is not shown, because it left no training step.")
    return found


def _written(folder: Round, arm: str) -> int:
    """Bytes of the longest file of training lines that an arm has."""
    found = [attempt.progress for attempt in folder.attempts(arm)]
    return max((path.stat().st_size for path in found if path.exists()), default=0)


def _name(arm: str, overrides: Sequence[tuple[str, str]], role: str) -> str:
    moved = overrides[-1][0].removeprefix("recipe.") if role == "axis" and overrides else role
    return f"{arm} {moved}"[:22]
