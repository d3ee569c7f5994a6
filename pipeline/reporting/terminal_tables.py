"""Tables and sentences for a terminal: the arms of a round, the scores of a round, memory, layouts, hours and money, a lift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.campaign.records import SETS, Lift, Outcome
from pipeline.cluster.forecast import Layout
from pipeline.config.footprint import in_units
from pipeline.reporting.status import ArmStatus, step_in_words
from pipeline.stats import lifts

COLOURS = {"completed": "green", "failed": "red", "lost": "red", "running": "cyan", "starting": "cyan", "unknown": "magenta",
           "interrupted": "yellow", "requeued": "yellow", "cancelled": "yellow", "queued": "dim", "waiting": "dim"}  # fmt: skip


def scores(outcomes: Sequence[Outcome]) -> Any:
    """A rich table of accuracies in percent, one row for each arm: total dev, total fresh, and fresh by family (dev where there is no fresh)."""
    from rich.table import Table

    families = sorted({family for outcome in outcomes for marks in outcome.outcomes.values() for family in marks})
    view = Table(box=None, pad_edge=False)
    for column in ("arm", "role", "dev %", "fresh %", *families):
        view.add_column(column, justify="left" if column in ("arm", "role") else "right")
    for outcome in outcomes:
        totals = [_percent("".join(outcome.outcomes.get(item_set, {}).values())) for item_set in SETS]
        detailed = outcome.outcomes.get("fresh") or outcome.outcomes.get("dev") or {}
        by_family = [_percent(detailed.get(family, "")) for family in families]
        name = outcome.arm if outcome.role not in ("reference", "base") else outcome.role
        view.add_row(name, outcome.role if name == outcome.arm else "", *totals, *by_family)
    return view


def footprints(bytes_per_rank: Mapping[str, Mapping[str, int]]) -> Any:
    """A rich table of the memory on the fullest rank, in readable units: one row for training and one for decoding."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False)
    view.add_column("")
    for column in next(iter(bytes_per_rank.values())):
        view.add_column(column, justify="right")
    for work, parts in bytes_per_rank.items():
        view.add_row(work, *(in_units(size) for size in parts.values()))
    return view


def forecast(expected: Mapping[str, Any] | None, *, has_gpus: bool) -> str:
    """Hours of GPUs (else of ranks) and money in a sentence. expected: a forecast as plain values, or None where no speed is known."""
    if expected is None:
        return "The hours are unknown until a round has measured them or cluster.capacity gives tokens per second."
    hours = "GPU-hours" if has_gpus else "hours of a rank"
    first = expected["first_round_hours"]
    cost, first_cost = expected["cost"], expected["cost"] * first / (expected["hours"] or 1)
    server = expected["server_hours"]
    serving = f" The server of the agents' model has at most {server:,.3g} of them." if server else ""
    costs = [f" ({each:,.0f} {expected['currency']})" if each else "" for each in (first_cost, cost)]
    return (
        f"The first round of {expected['num_arms']} arms, with the reference's training and the base, takes {first:,.3g} {hours}{costs[0]}, "
        f"and each later one {expected['hours']:,.3g}{costs[1]}. Of one arm, training takes {expected['train_hours_per_arm']:,.3g} and judging "
        f"{expected['judge_hours_per_arm']:,.3g} {hours}, and it lasts {expected['wall_hours']:,.3g} hours ({expected['source']}).{serving}"
    )


def layouts(found: Iterable[Layout], num_arms: int) -> Any:
    """A rich table of layouts: memory of a GPU, GPU-hours of a later and of the first round, what the site must have, or a refusal."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False)
    for column in ("layout", "GPUs an arm", "arms a node", "training", "decoding", "later round", "first round"):
        view.add_column(column, justify="left" if column == "layout" else "right")
    view.add_column("the site must have")
    for each in found:
        held = [in_units(each.bytes_per_gpu[work]) for work in ("training", "decoding")]
        sizes = ["", ""] if each.refusal else held  # of a layout that the model cannot have they mean nothing
        hours = (
            [f"{each.expected.hours:,.3g}", f"{each.expected.first_round_hours:,.3g}"] if each.expected else ["", ""]
        )
        on_node = str(each.arms_on_node or "") if each.nodes == 1 else f"1 on {each.nodes}"
        view.add_row(each.name, str(each.gpus), on_node, *sizes, *hours, each.refusal or each.must_have(num_arms))
    return view


def lift_in_words(lift: Lift) -> str:
    """A lift with its 95 % interval, such as `+49.7 points (95 %: +44.0 to +55.3, 300 paired items)`."""
    low, mean, high = (100 * float(value) for value in sorted((lift.mean, *lifts.interval(lift.mean, lift.variance))))
    return f"{mean:+.1f} points (95 %: {low:+.1f} to {high:+.1f}, {lift.num_items} paired items)"


def _percent(marks: str) -> str:
    return f"{100 * marks.count('1') / len(marks):.1f}" if marks else "-"


def table(rows: Iterable[ArmStatus]) -> Any:
    """A rich table of arms, for `status` and the live view. Empty columns are left out."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False)
    right = ("step", "loss", "tokens/s", "GPU-hours", "seconds")
    cells = [
        {"round": row.round, "arm": row.arm, "role": row.role, "state": f"[{COLOURS[row.state]}]{row.state}[/]",
         "node": row.node, "job": row.job, "cores": f"[yellow]{row.cores} of {row.cores_asked}[/]" if row.cores_asked else "",
         "phase": row.phase, "step": step_in_words(row), "loss": "" if row.loss is None else f"{row.loss:.3f}",
         "tokens/s": f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "", "GPU-hours": f"{row.gpu_hours:.2f}" if row.gpu_hours else "",
         "seconds": f"{row.seconds:.0f}", "detail": row.detail}
        for row in rows
    ]  # fmt: skip
    columns = [name for name in (cells[0] if cells else ()) if any(cell[name] for cell in cells)]
    for column in columns:
        view.add_column(column, justify="right" if column in right else "left")
    for cell in cells:
        view.add_row(*(cell[name] for name in columns))
    return view
