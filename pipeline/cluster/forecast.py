"""What a round will take, before it is spent: device-hours and money, from tokens per second.

Rates are measured where the campaign has run: the trainers' own clocks and tokens, and the workers' clocks around decoding. Before
that they are what the site's file assumes (`cluster.capacity`), and the forecast says so. Without either there is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Attempt, Round
from pipeline.config.settings import Settings
from pipeline.execution import results
from pipeline.execution.trial import number, progress_lines

LEAST_RATE, MOST_RATE = 1e-3, 1e9  # tokens per second of a whole arm: what a trial says beside that is no rate


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one device, how many a training step has, and how long a completion is."""

    train_tokens_per_second: float
    train_tokens_per_step: float
    decode_tokens_per_second: float
    tokens_per_item: float
    source: str


@dataclass(frozen=True)
class Forecast:
    """Device-hours; a device is a GPU, or a rank's cores where there are none."""

    train_hours_per_arm: float
    judge_hours_per_arm: float
    num_arms: int
    cost: float  # in `currency`, 0 without a price
    currency: str
    source: str

    @property
    def hours(self) -> float:
        return self.num_arms * (self.train_hours_per_arm + self.judge_hours_per_arm)


def forecast(chosen: Settings, num_arms: int, rounds: Iterable[Round] = ()) -> Forecast | None:
    """Of `num_arms` arms; None where no rate is known. rounds: those that may have measured."""
    rates = measured(chosen, rounds) or assumed(chosen)
    if rates is None:
        return None
    tasks, layout = chosen.tasks, chosen.parallelism
    train_tokens = chosen.recipe.num_steps * rates.train_tokens_per_step
    items = len(tasks.families) * (tasks.num_dev_per_family + tasks.num_fresh_per_family)
    train_hours = train_tokens / rates.train_tokens_per_second / 3600
    judge_hours = items * rates.tokens_per_item / rates.decode_tokens_per_second / 3600
    # The job holds its whole world while it is judged, of which decoding uses judge_tp.
    judge_hours *= max(1, layout.world_size // layout.judge_tp)
    capacity = chosen.cluster.capacity
    cost = num_arms * (train_hours + judge_hours) * capacity.price_per_gpu_hour
    return Forecast(train_hours, judge_hours, num_arms, cost, capacity.currency, rates.source)


def assumed(chosen: Settings) -> Rates | None:
    """Of the site's file; sequences and completions as long as they may be."""
    capacity, recipe = chosen.cluster.capacity, chosen.recipe
    if not (capacity.train_tokens_per_second and capacity.decode_tokens_per_second):
        return None
    return Rates(
        capacity.train_tokens_per_second, recipe.batch_size * recipe.sequence_length,
        capacity.decode_tokens_per_second, chosen.tasks.max_new_tokens,
        "assumed (cluster.capacity), every sequence and completion as long as it may be",
    )  # fmt: skip


def measured(chosen: Settings, rounds: Iterable[Round]) -> Rates | None:
    """Over all attempts that were trained and judged."""
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
    """Tokens, the seconds that they took, and the steps or items that they belong to."""

    tokens: float = 0.0
    seconds: float = 0.0
    times: int = 0


def _count_training(count: _Count, attempt: Attempt) -> None:
    """By the trainer's own word for all its steps."""
    names = ("step", "tokens", "seconds")
    for line in reversed(progress_lines(attempt, "train")):
        step, tokens, seconds = (number(line.get(name)) or 0 for name in names)
        if min(step, tokens, seconds) > 0 and LEAST_RATE < tokens / seconds < MOST_RATE:  # a trial may write anything
            count.times, count.tokens = count.times + int(step), count.tokens + float(tokens)
            count.seconds += float(seconds)
            return


def _count_decoding(count: _Count, attempt: Attempt) -> None:
    """By the worker's clock, of attempts that came to an end. A later one may have taken up what the first had decoded: its clock tells nothing."""
    seconds = _seconds(attempt, "generate") if attempt.number == 0 else 0.0
    if seconds and results.status_of(attempt.result) == "completed":
        tokens, items = results.num_tokens(attempt.result)
        count.tokens, count.times, count.seconds = count.tokens + tokens, count.times + items, count.seconds + seconds


def _seconds(attempt: Attempt, phase: str) -> float:
    """How long a phase lasted, by the worker's clock; 0 where it has not ended."""
    marks = read_json_lines(attempt.phases)
    pairs = zip(marks, marks[1:], strict=False)
    return float(sum(following["at"] - mark["at"] for mark, following in pairs if mark["phase"] == phase))
