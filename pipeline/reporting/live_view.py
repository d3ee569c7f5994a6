"""Tables on a terminal: the arms of a running round, the scores of a round, and memory. A file gets one line for each change instead."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.campaign.records import SETS, Lift, Outcome
from pipeline.cluster import slurm_jobs
from pipeline.cluster.forecast import Layout
from pipeline.config.footprint import in_units
from pipeline.reporting import status
from pipeline.reporting.status import ArmStatus, table
from pipeline.stats import lifts

REFRESH_SECONDS = 0.5


@contextmanager
def follow(rows: Callable[[], list[ArmStatus]]) -> Iterator[Callable[[], None]]:
    """Yield a function that updates the view. Call it often: it reads `rows` at most every half second and shows what has changed."""
    if sys.stdout.isatty():
        from rich.live import Live

        with Live(table(rows()), auto_refresh=False) as live:
            yield _seldom(lambda: live.update(table(rows()), refresh=True))
        return
    printed: dict[tuple[str, str], tuple[str, str]] = {}

    def print_changes() -> None:
        for row in rows():
            now = (row.state, row.phase)
            if row.state != "waiting" and printed.get((row.round, row.arm)) != now:
                printed[row.round, row.arm] = now
                print(
                    f"{row.round}/{row.arm} {row.role:<9} {row.state:<11} {row.phase} {status.step_in_words(row)} {row.detail}".rstrip(),
                    flush=True,
                )

    yield _seldom(print_changes)


class Asker:
    """Asks Slurm again soon after something changed, and else waits twice as long each time.

    query: asks for the states of these ids, as `launch.query`. shortest, longest: limits of the waiting time, in seconds.
    """

    def __init__(
        self, query: Callable[[Sequence[str]], slurm_jobs.Report], shortest: float = 2.0, longest: float = 60.0
    ) -> None:
        self._query, self._shortest, self._longest = query, shortest, longest
        self._wait, self._at = 0.0, 0.0
        self._found: dict[str, slurm_jobs.Job] = {}

    def states(self, ids: Sequence[str]) -> dict[str, slurm_jobs.Job]:
        """As `query`, but the states may be up to `longest` seconds old."""
        if set(ids) - set(self._found) or time.monotonic() - self._at >= self._wait:
            before, self._found = self._found, self._query(ids).jobs
            self._at = time.monotonic()
            self._wait = self._shortest if before != self._found else min(self._longest, 2 * self._wait)
        return self._found


def _seldom(show: Callable[[], None]) -> Callable[[], None]:
    """A function that calls `show` at most once in REFRESH_SECONDS."""
    last = 0.0

    def maybe() -> None:
        nonlocal last
        if time.monotonic() - last >= REFRESH_SECONDS:
            last = time.monotonic()
            show()

    return maybe


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
