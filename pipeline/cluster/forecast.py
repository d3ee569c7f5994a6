"""Forecast the device-hours and the money that a round will cost, from rates in tokens per second.

Once the campaign has run, its rates are measured: training by the trainers' own clocks, decoding by the workers' clocks. Before that
the forecast uses the rates of the site's file (`cluster.capacity`) and says so. Without either there is no forecast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Attempt, Round
from pipeline.config.settings import Settings
from pipeline.execution import results
from pipeline.execution.trial import number, progress_lines

LEAST_RATE, MOST_RATE = 1e-3, 1e9
"""Tokens per second of a whole arm. A trial that reports a rate outside of these is not believed."""


@dataclass(frozen=True)
class Rates:
    """Speeds of one device, and sizes in tokens: of a training step, and of a completion."""

    train_tokens_per_second: float
    train_tokens_per_step: float
    decode_tokens_per_second: float
    tokens_per_item: float
    source: str


@dataclass(frozen=True)
class Forecast:
    """Device-hours and cost of a round. A device is a GPU; on a machine without GPUs it is the cores of one rank."""

    train_hours_per_arm: float
    judge_hours_per_arm: float
    num_arms: int
    cost: float  # in `currency`; 0 if cluster.capacity has no price
    currency: str
    source: str

    @property
    def hours(self) -> float:
        return self.num_arms * (self.train_hours_per_arm + self.judge_hours_per_arm)


def forecast(chosen: Settings, num_arms: int, rounds: Iterable[Round] = ()) -> Forecast | None:
    """The forecast for a round of `num_arms` arms; None if no rate is known. rounds: earlier rounds, whose attempts give measured rates."""
    rates = measured(chosen, rounds) or assumed(chosen)
    if rates is None:
        return None
    tasks, layout = chosen.tasks, chosen.parallelism
    train_tokens = chosen.recipe.num_steps * rates.train_tokens_per_step
    items = len(tasks.families) * (tasks.num_dev_per_family + tasks.num_fresh_per_family)
    train_hours = train_tokens / rates.train_tokens_per_second / 3600
    judge_hours = items * rates.tokens_per_item / rates.decode_tokens_per_second / 3600
    # Decoding uses judge_tp devices, but the job holds all devices of the arm while it is judged.
    judge_hours *= max(1, layout.world_size // layout.judge_tp)
    capacity = chosen.cluster.capacity
    cost = num_arms * (train_hours + judge_hours) * capacity.price_per_gpu_hour
    return Forecast(train_hours, judge_hours, num_arms, cost, capacity.currency, rates.source)


def assumed(chosen: Settings) -> Rates | None:
    """Rates from the site's file, with every sequence and completion at its longest; None if the file has no rates."""
    capacity, recipe = chosen.cluster.capacity, chosen.recipe
    if not (capacity.train_tokens_per_second and capacity.decode_tokens_per_second):
        return None
    return Rates(
        capacity.train_tokens_per_second, recipe.batch_size * recipe.sequence_length,
        capacity.decode_tokens_per_second, chosen.tasks.max_new_tokens,
        "assumed (cluster.capacity), every sequence and completion as long as it may be",
    )  # fmt: skip


def measured(chosen: Settings, rounds: Iterable[Round]) -> Rates | None:
    """Rates over the newest attempts of all arms of `rounds`; None if none of them was both trained and judged."""
    trained, decoded = _Count(), _Count()
    for folder in rounds:
        for arm in folder.frozen_plan().arms:
            for attempt in folder.attempts(arm.name)[-1:]:
                _count_training(trained, attempt)
                _count_decoding(decoded, attempt)
    if not (trained.seconds and decoded.seconds):
        return None
    world, judge_tp = chosen.parallelism.world_size, chosen.parallelism.judge_tp
    return Rates(
        trained.tokens / trained.seconds / world, trained.tokens / trained.times,
        decoded.tokens / decoded.seconds / judge_tp, decoded.tokens / decoded.times,
        "measured in this campaign",
    )  # fmt: skip


@dataclass
class _Count:
    """A sum of tokens, of the seconds that they took, and of the training steps or judged items (`times`) that they belong to."""

    tokens: float = 0.0
    seconds: float = 0.0
    times: int = 0


def _count_training(count: _Count, attempt: Attempt) -> None:
    """Add what the trainer itself reported for all of its steps."""
    names = ("step", "tokens", "seconds")
    for line in reversed(progress_lines(attempt, "train")):
        step, tokens, seconds = (number(line.get(name)) or 0 for name in names)
        if min(step, tokens, seconds) > 0 and LEAST_RATE < tokens / seconds < MOST_RATE:
            count.times, count.tokens = count.times + int(step), count.tokens + float(tokens)
            count.seconds += float(seconds)
            return


def _count_decoding(count: _Count, attempt: Attempt) -> None:
    """Add the decoding of a completed first attempt, by the worker's clock.

    A later attempt may have reused completions of the first, so that its clock does not cover them all.
    """
    seconds = _seconds(attempt, "generate") if attempt.number == 0 else 0.0
    if seconds and results.has_score(attempt.result):
        tokens, items = results.num_tokens(attempt.result)
        count.tokens, count.times, count.seconds = count.tokens + tokens, count.times + items, count.seconds + seconds


def _seconds(attempt: Attempt, phase: str) -> float:
    """How long a phase lasted, in seconds of the worker's clock; 0 if it has not ended."""
    marks = read_json_lines(attempt.phases)
    pairs = zip(marks, marks[1:], strict=False)
    return float(sum(following["at"] - mark["at"] for mark, following in pairs if mark["phase"] == phase))
