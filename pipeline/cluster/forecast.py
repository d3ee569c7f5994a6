"""Forecast the device-hours and the money that a round will cost, from rates in tokens per second.

Once a round has run, its rates and the lengths of its completions are measured by the workers' clocks. Before that the forecast uses the
rates of the site's file (`cluster.capacity`) and the lengths that `tasks.expected` expects, and says so. Without rates there is no forecast.

Decoding is forecast by playing it: each of `decode_batch_size` slots takes the next item as soon as its own has ended, and a step takes as long
as the rate for the number of busy slots says. So the few completions that reach the limit cost what they hold up.

A recipe that samples decodes in training too, and is played likewise, with the judged completions' lengths and its own limit. A rollout of n has
none that reaches it with the probability (1 - share)^n, else the expected number, at least one. Measured rates hold all of that already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.facts import parse_yaml
from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Attempt, Round
from pipeline.campaign.records import NUM_ARMS
from pipeline.cluster.local_runner import arms_at_once, makespan
from pipeline.config import footprint, model_size
from pipeline.config.decoding import AUTO, assumed_decoding, played, settle_judge_tp
from pipeline.config.schema import Parallelism
from pipeline.config.settings import SOURCE, Settings
from pipeline.execution import results
from pipeline.execution.trial import group_seconds, number, phase_seconds, progress_lines

LEAST_RATE, MOST_RATE = 1e-3, 1e9
"""Tokens per second of a whole arm. A trial that reports a rate outside of these is not believed."""


@dataclass(frozen=True)
class Rates:
    """What a round measured, as means over its arms.

    start_seconds, rest_seconds: of an arm beside training and decoding. lengths: tokens of each completion by set. slower: decoding over its play.
    """

    train_tokens_per_second: float  # of a whole arm
    train_tokens_per_step: float
    start_seconds: float
    rest_seconds: float
    lengths: Mapping[str, Sequence[int]]
    slower: float
    source: str


@dataclass(frozen=True)
class Forecast:
    """Device-hours and cost of a round. A device is a GPU; on a machine without GPUs it is the cores of one rank.

    reference_hours: of judging the reference on the round's fresh items. first_hours: of what the first round has beside its arms, which is
    the reference's training and its dev, and the base's. wall_hours: of one arm, from its start to its result. sample_hours_per_arm: the part of
    the training in which completions are drawn and scored; 0 where rates were measured, because it is in them. phases: seconds of one arm by
    group of phases. round_seconds, first_round_seconds: from the first start of an arm to the last end of one, without waiting in a queue.
    """

    train_hours_per_arm: float
    judge_hours_per_arm: float
    num_arms: int
    cost: float  # of a round after the first, in `currency`; 0 if cluster.capacity has no price
    currency: str
    source: str
    reference_hours: float
    first_hours: float
    wall_hours: float
    sample_hours_per_arm: float
    phases: Mapping[str, float]
    round_seconds: float
    first_round_seconds: float
    server_hours: float = 0.0  # at most, of the server of the agents' model, with all arms at once

    @property
    def hours(self) -> float:
        """Of a round after the first."""
        arms = self.num_arms * (self.train_hours_per_arm + self.judge_hours_per_arm)
        return arms + self.reference_hours + self.server_hours

    @property
    def first_round_hours(self) -> float:
        """Of the first round, reference and base included."""
        return self.hours + self.first_hours

    def as_record(self, is_first: bool) -> dict[str, Any]:
        """What is frozen of it for a round, in whole milliseconds: the log holds no fractions. is_first: r0000 runs beside the round."""
        seconds = dict(self.phases) | {"arm": 3600 * self.wall_hours}
        arms = self.num_arms * (self.train_hours_per_arm + self.judge_hours_per_arm)
        whole = {"round": self.first_round_seconds if is_first else self.round_seconds}
        whole["devices"] = 3600 * (arms + (self.first_hours if is_first else 0.0))
        return {
            "arm": {name: round(1000 * value) for name, value in seconds.items()},
            **{name: round(1000 * value) for name, value in whole.items()},
            "arms": self.num_arms, "source": self.source,
        }  # fmt: skip


def forecast(chosen: Settings, num_arms: int, rounds: Iterable[Round] = ()) -> Forecast | None:
    """The forecast for a round of `num_arms` arms; None if no rate is known. rounds: earlier rounds, whose attempts give measured rates."""
    rates = measured(chosen, rounds)
    if rates is None and not chosen.cluster.capacity.has_rates:
        return None
    recipe, capacity, sampling = chosen.recipe, chosen.cluster.capacity, 0.0
    # Sets, and whose job decodes them.
    judged = ((("dev", "fresh"), "worker"), (("dev",), "worker"), (("fresh",), "reference"))
    if rates:
        train, source = recipe.num_steps * rates.train_tokens_per_step / rates.train_tokens_per_second, rates.source
        both, dev, fresh = (_measured_decoding(chosen, rates, *each) for each in judged)
        start, rest = rates.start_seconds, rates.rest_seconds
    else:
        sampling = assumed_sampling(chosen)
        train, start, rest = assumed_training(chosen) + sampling, 2 * capacity.start_seconds, 0.0
        both, dev, fresh = (assumed_decoding(chosen, sum(map(chosen.items_of, sets)), role) for sets, role in judged)
        lengths = chosen.tasks.expected.row_tokens and chosen.tasks.expected.completion_tokens
        source = "assumed (cluster.capacity), " + (
            "with the lengths of tasks.expected" if lengths else "every sequence and completion as long as it may be"
        )
        if sampling:
            share = sampling / (capacity.start_seconds + train)
            source += f"; drawing and scoring {math.prod(recipe.drawn):,} completions is {share:.0%} of the training"
    # Half of what an arm spends beside training and decoding is before its training: the processes are as many, and load the same weights.
    half, world = (start + rest) / 2, chosen.parallelism.world_size
    arm, reference, base = start + rest + train + both, start + rest + train + dev, half + dev
    at_once, arms = _arms_at_once(chosen), [arm] * num_arms
    # An arm of several nodes is judged on the first of them, but its job holds all of its devices meanwhile.
    train_hours, judge_hours = (world * (half + each) / 3600 for each in (train, both))
    reference_hours = chosen.devices_of("reference") * (half + fresh) / 3600
    server_hours = chosen.serving_gpus * (chosen.worker.budget.wall_seconds + half + both) / 3600
    cost = (num_arms * (train_hours + judge_hours) + reference_hours + server_hours) * capacity.price_per_gpu_hour
    return Forecast(
        train_hours, judge_hours, num_arms, cost, capacity.currency, source, reference_hours, world * (reference + base) / 3600, arm / 3600,
        world * sampling / 3600, {"start-up": start, "training": train, "decoding": both, "rest": rest},
        makespan(arms, at_once), makespan([*arms, reference, base], at_once), server_hours,
    )  # fmt: skip


def _arms_at_once(chosen: Settings) -> int:
    """How many arms work at the same time: on Slurm all, where no limit is set."""
    cluster = chosen.cluster
    if cluster.kind == "slurm":
        return cluster.arms_at_once or NUM_ARMS + 2  # with those of r0000
    return arms_at_once(chosen, cluster.gpus_per_node // cluster.gpus if cluster.gpus else 0)


def _measured_decoding(chosen: Settings, rates: Rates, sets: Sequence[str], role: str) -> float:
    """Seconds that judging an adapter on these sets decodes, with completions as long as they were."""
    known, lengths = [length for lengths in rates.lengths.values() for length in lengths], list[int]()
    for name in sets:
        of_set = rates.lengths.get(name) or known
        lengths += [of_set[item % len(of_set)] for item in range(chosen.items_of(name))]
    return rates.slower * _played_by(chosen, lengths, role)


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
        layout.judge_tp, is_auto = (1, True) if str(layout.judge_tp) == AUTO else (layout.judge_tp, False)
        world = layout.world_size
        here = min(world, on_node) or world
        cluster = replace(chosen.cluster, gpus=here) if on_node else chosen.cluster
        changed = replace(chosen, parallelism=layout, cluster=cluster)
        if is_auto:
            layout.judge_tp, _ = settle_judge_tp(changed)
        if on_node:
            cluster.reference = replace(cluster.reference, gpus=layout.judge_tp)
        config = changed.to_dict()
        refusal = ""
        try:
            model_size.check_layout(config["model"], config["parallelism"], here if on_node else 0)
            if layout.judge_tp > here:
                raise ConfigError(f"judging takes {layout.judge_tp} GPUs of one node")
            footprint.check_memory(config)
        except ConfigError as error:
            refusal = error.what
        must_hold = footprint.of_arm(config, at_least=True).items()
        sizes = {work: held.peak + footprint.DEVICE_RESERVE_BYTES for work, held in must_hold}
        expected = None if refusal else forecast(changed, num_arms)
        arms_on_node = 1 if chosen.cluster.is_exclusive else on_node // here
        yield Layout(name, world, max(1, world // here), arms_on_node, sizes, expected, refusal)


def measured(chosen: Settings, rounds: Iterable[Round]) -> Rates | None:
    """What the newest of `rounds` measured in which an arm was trained and judged in one go; None if there is none.

    The base is left out, because it trains nothing and answers as no arm does. A trial's own numbers are believed within limits alone.
    """
    for folder in reversed([*rounds]):
        arms = [arm.name for arm in folder.frozen_plan().arms if arm.role != "base"]
        attempts = [attempt for arm in arms for attempt in folder.attempts(arm)[-1:]]
        whole = [attempt for attempt in attempts if _is_whole(attempt)]  # the worker's clock has all of them
        trained = [each for attempt in whole or attempts if (each := _training(attempt, chosen.recipe.num_steps))]
        judged = [each for each in map(_decoding, attempts) if each]
        if trained and judged:
            break
    else:
        return None
    steps, tokens, seconds = (sum(column) for column in zip(*trained, strict=True))
    names = max((set(lengths) for lengths, _ in judged), key=len)
    judged = [each for each in judged if set(each[0]) == names]  # a closed round has no fresh items
    mixed = {name: _mixed([lengths[name] for lengths, _ in judged]) for name in names}
    beside = [group_seconds(read_json_lines(attempt.phases)) for attempt in whole]
    start, rest = (mean(group[name] for group in beside) if beside else 0.0 for name in ("start-up", "rest"))
    decoding = mean(seconds for _, seconds in judged)
    took = _played_by(chosen, [length for name in sorted(names) for length in mixed[name]], "worker")
    return Rates(tokens / seconds, tokens / steps, start, rest, mixed, decoding / took, f"measured in {folder.name}")


def _played_by(chosen: Settings, lengths: Sequence[int], role: str) -> float:
    """Seconds that the play gives completions in a job of this role; without rates of the site a step takes one, however many are busy."""
    layout, slots = chosen.parallelism, chosen.tasks.decode_batch_size
    rates = chosen.cluster.capacity.decode_tokens_per_second or {slots: float(slots)}
    return played(lengths, slots, rates, layout.replicas(chosen.devices_of(role)))


def _mixed(lengths: Sequence[Sequence[int]]) -> list[int]:
    """One adapter's lengths: of each item those that one of the adapters had, in turn."""
    return [lengths[item % len(lengths)][item] for item in range(min(map(len, lengths)))]


def _is_whole(attempt: Attempt) -> bool:
    """Whether an attempt did all of its arm, with a mark for each phase: a later attempt may have taken up what the first one left."""
    is_whole = attempt.number == 0 and phase_seconds(attempt, "train") > 0 and phase_seconds(attempt, "generate") > 0
    return is_whole and results.has_score(attempt.result)


def _training(attempt: Attempt, most: int) -> tuple[float, float, float] | None:
    """(steps, tokens, seconds) of a training: steps, at most `most`, and tokens as the trainer says, seconds by the worker's clock if it has all."""
    for line in reversed(progress_lines(attempt, "train")):
        step, tokens, seconds = (float(number(line.get(name)) or 0) for name in ("step", "tokens", "seconds"))
        if min(step, tokens, seconds) > 0 and step <= most and LEAST_RATE < tokens / seconds < MOST_RATE:
            return step, tokens, phase_seconds(attempt, "train") if _is_whole(attempt) else seconds
    return None


def _decoding(attempt: Attempt) -> tuple[dict[str, list[int]], float] | None:
    """(lengths of the completions by set, seconds) of a first attempt that was judged, by the worker's clock."""
    seconds = phase_seconds(attempt, "generate") if attempt.number == 0 else 0.0
    if not seconds or not results.has_score(attempt.result):
        return None
    return results.lengths(attempt.result), seconds
