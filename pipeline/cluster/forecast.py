"""Forecast the device-hours and the money that a round will cost, from rates in tokens per second.

Once the campaign has run, its rates are measured: training by the trainers' own clocks, decoding by the workers' clocks. Before that
the forecast uses the rates of the site's file (`cluster.capacity`) and the lengths that `tasks.expected` expects, and says so. Without rates
there is no forecast.

Decoding is forecast by playing it: each of `decode_batch_size` slots takes the next item as soon as its own has ended, and a step takes as long
as the rate for the number of busy slots says. So the few completions that reach the limit cost what they hold up, which is the end of the set.

A recipe that samples decodes in training too, and is played likewise. Its completions are expected to be as long as the judged ones, and cut at the
recipe's own limit. A rollout of n has none that reaches it with the probability (1 - share)^n, else the expected number, at least one. Measured
rates of training hold all of that already.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.facts import parse_yaml
from pipeline.campaign.layout import Attempt, Round
from pipeline.config import footprint, model_size
from pipeline.config.schema import Parallelism
from pipeline.config.settings import SOURCE, Settings
from pipeline.execution import results
from pipeline.execution.trial import number, phase_seconds, progress_lines

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
    """Device-hours and cost of a round. A device is a GPU; on a machine without GPUs it is the cores of one rank.

    reference_hours: of judging the reference on the round's fresh items. first_hours: of what the first round has beside its arms, which is
    the reference's training and its dev, and the base's. wall_hours: of one arm, from its start to its result. sample_hours_per_arm: the part of
    the training in which completions are drawn and scored; 0 where rates were measured, because it is in them.
    """

    train_hours_per_arm: float
    judge_hours_per_arm: float
    num_arms: int
    cost: float  # of a round after the first, in `currency`; 0 if cluster.capacity has no price
    currency: str
    source: str
    reference_hours: float = 0.0
    first_hours: float = 0.0
    wall_hours: float = 0.0
    sample_hours_per_arm: float = 0.0

    @property
    def hours(self) -> float:
        """Of a round after the first."""
        return self.num_arms * (self.train_hours_per_arm + self.judge_hours_per_arm) + self.reference_hours

    @property
    def first_round_hours(self) -> float:
        """Of the first round, reference and base included."""
        return self.hours + self.first_hours


def forecast(chosen: Settings, num_arms: int, rounds: Iterable[Round] = ()) -> Forecast | None:
    """The forecast for a round of `num_arms` arms; None if no rate is known. rounds: earlier rounds, whose attempts give measured rates."""
    rates = measured(chosen, rounds)
    if rates is None and not chosen.cluster.capacity.has_rates:
        return None
    tasks, recipe, capacity = chosen.tasks, chosen.recipe, chosen.cluster.capacity
    world, sampling = chosen.parallelism.world_size, 0.0
    num_dev, num_fresh = (len(tasks.families) * n for n in (tasks.num_dev_per_family, tasks.num_fresh_per_family))
    judged = (
        (num_dev + num_fresh, "worker"),
        (num_dev, "worker"),
        (num_fresh, "reference"),
    )  # items, and whose job decodes them
    if rates:
        train = recipe.num_steps * rates.train_tokens_per_step / rates.train_tokens_per_second / world / 3600
        item = rates.tokens_per_item / rates.decode_tokens_per_second / 3600
        both, dev, fresh = (n * item / chosen.judging_devices(role) for n, role in judged)
        source = rates.source
    else:
        sampling = assumed_sampling(chosen) / 3600
        train = (capacity.start_seconds + assumed_training(chosen)) / 3600 + sampling
        both, dev, fresh = ((capacity.start_seconds + assumed_decoding(chosen, *each)) / 3600 for each in judged)
        lengths = tasks.expected.row_tokens and tasks.expected.completion_tokens
        source = "assumed (cluster.capacity), " + (
            "with the lengths of tasks.expected" if lengths else "every sequence and completion as long as it may be"
        )
        if sampling:
            source += f"; drawing and scoring {math.prod(recipe.drawn):,} completions is {sampling / train:.0%} of the training"
    # An arm of several nodes is judged on the first of them, but its job holds all of its devices meanwhile.
    judge_hours, train_hours = world * both, world * train
    reference_hours = chosen.devices_of("reference") * fresh
    cost = (num_arms * (train_hours + judge_hours) + reference_hours) * capacity.price_per_gpu_hour
    first_hours = world * (train + 2 * dev)
    return Forecast(
        train_hours, judge_hours, num_arms, cost, capacity.currency, source, reference_hours, first_hours, train + both,
        world * sampling,
    )  # fmt: skip


def assumed_training(chosen: Settings, num_rows: int = 0) -> float:
    """Seconds of training on so many rows (0: on those of all steps), by the rates of the site's file. Rows are packed, so their tokens count."""
    recipe, capacity = chosen.recipe, chosen.cluster.capacity
    tokens = (num_rows or recipe.num_steps * recipe.batch_size) * (
        chosen.tasks.expected.row_tokens or recipe.sequence_length
    )
    return tokens / capacity.train_tokens_per_second / capacity.speed_up(chosen.parallelism.world_size)


def assumed_sampling(chosen: Settings) -> float:
    """Seconds in which an arm draws completions in training and scores them, by the rates of the site's file.

    Data-parallel ranks share the completions. A rollout is scored under two policies without gradients; both together count as one training pass.
    """
    recipe, capacity, layout, expected = chosen.recipe, chosen.cluster.capacity, chosen.parallelism, chosen.tasks.expected  # fmt: skip
    times, number = recipe.drawn
    if not times:
        return 0.0
    slots, limit = (int(recipe.options[name]) for name in ("decode_batch_size", "max_new_tokens"))
    mine, longest = (-(-each // layout.dp) for each in (number, max(1, round(expected.share_at_limit * number))))
    without, with_long = (
        played(expected.lengths(mine, limit, count), slots, capacity.decode_tokens_per_second) for count in (0, longest)
    )
    share = (1 - expected.share_at_limit) ** number
    drawing = (share * without + (1 - share) * with_long) / capacity.speed_up(layout.world_size // layout.dp)
    return times * (drawing + (assumed_training(chosen, number) if "updates_per_rollout" in recipe.options else 0.0))


def assumed_decoding(chosen: Settings, num_items: int, role: str = "worker") -> float:
    """Seconds that judging an adapter decodes so many items in a job of this role, by the rates of the site's file."""
    capacity, lengths, layout = chosen.cluster.capacity, expected_lengths(chosen, num_items), chosen.parallelism
    slots, replicas = chosen.tasks.decode_batch_size, layout.replicas(chosen.devices_of(role))
    return played(lengths, slots, capacity.decode_tokens_per_second, replicas) / capacity.speed_up(layout.judge_tp)


def expected_lengths(chosen: Settings, num_items: int) -> list[int]:
    """The tokens of each completion that is judged."""
    expected = chosen.tasks.expected
    return expected.lengths(num_items, chosen.tasks.max_new_tokens, round(expected.share_at_limit * num_items))


def played(lengths: Sequence[int], slots: int, rates: Mapping[int, float], replicas: int = 1) -> float:
    """Seconds of decoding with continuous batching. lengths: of the completions, in the order in which they are taken.

    slots: how many at once. rates: tokens per second by the number of sequences at once, both of one replica. Each replica takes every
    so-manieth completion (substrate/inference/queue.py), and the last of them to end counts.
    """
    if replicas > 1:
        return max(played(lengths[first::replicas], slots, rates) for first in range(replicas))
    waiting = iter(lengths)
    ends = list(islice(waiting, slots))  # the step at which each slot is free again
    heapq.heapify(ends)
    step, seconds = 0, 0.0
    while ends:
        end = ends[0]
        seconds += (end - step) * step_seconds(len(ends), rates)
        step = end
        following = next(waiting, None)
        if following is None:
            heapq.heappop(ends)
        else:
            heapq.heapreplace(ends, end + following)
    return seconds


def step_seconds(busy: int, rates: Mapping[int, float]) -> float:
    """Seconds of one decoding step with so many sequences: between two measured numbers on the line, beyond them as at the nearest.

    Beyond the largest, a step takes longer in proportion.
    """
    known = sorted(rates)
    times = [slots / rates[slots] for slots in known]
    above = bisect_left(known, busy)
    if above == len(known):
        return times[-1] * busy / known[-1]
    if above == 0:
        return times[0]
    low, high = known[above - 1], known[above]
    return times[above - 1] + (times[above] - times[above - 1]) * (busy - low) / (high - low)


@dataclass(frozen=True)
class Layout:
    """What a file of hydra_conf/parallelism means for a configuration. refusal: why it cannot be used, or empty.

    bytes_per_gpu: of its fullest rank, for "training" and "decoding", a reserve included. hours: device-hours of the first round.
    """

    name: str
    gpus: int  # of an arm
    nodes: int  # of an arm
    arms_on_node: int
    bytes_per_gpu: Mapping[str, int]
    expected: Forecast | None
    refusal: str

    def must_have(self, num_arms: int) -> str:
        """What the site must have, in words."""
        size = footprint.in_units(max(self.bytes_per_gpu.values()))
        where = "" if self.gpus == 1 else " of one node" if self.nodes == 1 else f" of {self.nodes} whole nodes"
        each = f"{self.gpus} GPU{'s' * (self.gpus > 1)}{where} with {size}{' each' * (self.gpus > 1)}"
        fabric = " and cluster.network=fabric" if self.nodes > 1 else ""
        return f"{each}{fabric} for an arm; {num_arms * self.gpus} GPUs for all {num_arms} arms at once"


def layouts(chosen: Settings, num_arms: int) -> Iterator[Layout]:
    """Yield every layout that ships, the smallest first, for the nodes that the configuration has."""
    on_node = chosen.cluster.gpus_per_node
    paths = (SOURCE / "parallelism").glob("*.yaml")
    files = [(path.stem, Parallelism(**parse_yaml(path.read_text()))) for path in paths]
    for name, layout in sorted(files, key=lambda each: (each[1].world_size, each[0])):
        world = layout.world_size
        here = min(world, on_node) or world
        cluster = chosen.cluster
        if on_node:
            cluster = replace(cluster, gpus=here, reference=replace(cluster.reference, gpus=layout.judge_tp))
        changed = replace(chosen, parallelism=layout, cluster=cluster)
        config = changed.to_dict()
        refusal = ""
        try:
            model_size.check_layout(config["model"], config["parallelism"], here if on_node else 0)
            if layout.judge_tp > here:
                raise ConfigError(f"judging takes {layout.judge_tp} GPUs of one node")
            footprint.check_memory(config)
        except ConfigError as error:
            refusal = error.what
        if config["parallelism"]["recompute"] == "auto":  # what a GPU must have, not what is used where it has more
            config["parallelism"]["recompute"] = "full"
        sizes = {work: held.peak + footprint.DEVICE_RESERVE_BYTES for work, held in footprint.of_arm(config).items()}
        expected = None if refusal else forecast(changed, num_arms)
        arms_on_node = 1 if chosen.cluster.is_exclusive else on_node // here
        yield Layout(name, world, max(1, world // here), arms_on_node, sizes, expected, refusal)


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
    world = chosen.parallelism.world_size
    return Rates(
        trained.tokens / trained.seconds / world, trained.tokens / trained.times,
        decoded.tokens / decoded.seconds / chosen.judging_devices("worker"), decoded.tokens / decoded.times,
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
    seconds = phase_seconds(attempt, "generate") if attempt.number == 0 else 0.0
    if seconds and results.has_score(attempt.result):
        tokens, items = results.num_tokens(attempt.result)
        count.tokens, count.times, count.seconds = count.tokens + tokens, count.times + items, count.seconds + seconds
