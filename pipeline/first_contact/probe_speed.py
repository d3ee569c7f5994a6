"""What a round will take at the speed that the probe had.

The ten steps and some twenty items of the probe are too few to be multiplied: the first step compiles, and one completion that reaches the
limit holds up the rest of a small set. So only speeds are taken from it: tokens a second of training after the first step, and how
much faster or slower a decoding step is than the site's file says. With these the forecast plays a round as `plan-memory` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.campaign.errors import PipelineError
from pipeline.campaign.files import rows_of
from pipeline.campaign.layout import Attempt
from pipeline.cluster import forecast
from pipeline.config import decoding
from pipeline.config.settings import Settings
from pipeline.execution import results
from pipeline.execution.trial import number, phase_seconds, progress_lines


@dataclass(frozen=True)
class Speed:
    """What the probe's attempt measured, over all ranks of an arm.

    start_seconds: until the end of the first step. row_tokens: mean length of a row. decode_seconds: for completions of these `lengths` in
    tokens, in the order of the set; num_truncated of them reached the limit.
    """

    train_tokens_per_second: float
    row_tokens: float
    start_seconds: float
    lengths: Sequence[int]
    num_truncated: int
    decode_seconds: float


def measured(attempt: Attempt, batch_size: int) -> Speed | None:
    """The speed of an attempt that was trained and judged at once; None where it was resumed, or its clocks say nothing of use."""
    lines = [line for line in progress_lines(attempt, "train") if min(*_counts(line)) > 0]
    if attempt.number or len(lines) < 2 or not results.has_score(attempt.result):
        return None
    (_, tokens_before, before), (step, tokens, seconds) = _counts(lines[0]), _counts(lines[-1])
    began, rows = phase_seconds(attempt, "train_start"), rows_of(attempt.completions_dir / "dev.jsonl")
    decode_seconds = phase_seconds(attempt, "generate")
    if tokens <= tokens_before or seconds <= before or decode_seconds <= 0 or not rows:
        return None
    return Speed(
        (tokens - tokens_before) / (seconds - before), tokens / step / batch_size, began + before,
        [row["num_tokens"] for row in rows], sum(bool(row["truncated"]) for row in rows), decode_seconds,
    )  # fmt: skip


def as_measured(chosen: Settings, speed: Speed) -> Settings:
    """The settings with the measured speed in place of the site's file's, and measured lengths where `tasks.expected` has none."""
    tasks, capacity, layout = chosen.tasks, chosen.cluster.capacity, chosen.parallelism
    replicas = layout.replicas(chosen.devices_of("worker"))
    slots = min(tasks.decode_batch_size, -(-len(speed.lengths) // replicas))
    # Without rates of the site's file a step takes as long with fewer sequences, and longer in proportion with more.
    shape = dict(capacity.decode_tokens_per_second) or {slots: 1.0}
    slower = speed.decode_seconds / decoding.played(speed.lengths, tasks.decode_batch_size, shape, replicas)
    slower *= capacity.speed_up(layout.judge_tp)
    train = speed.train_tokens_per_second / capacity.speed_up(layout.world_size)
    expected = replace(tasks.expected, row_tokens=speed.row_tokens)
    if not tasks.expected.completion_tokens:
        ended = [length for length in speed.lengths if length < tasks.max_new_tokens] or speed.lengths
        share = speed.num_truncated / len(speed.lengths)
        expected = replace(expected, completion_tokens=sum(ended) / len(ended), share_at_limit=share)
    rates = {number: rate / slower for number, rate in shape.items()}
    measured_capacity = replace(
        capacity, train_tokens_per_second=train, decode_tokens_per_second=rates, start_seconds=speed.start_seconds
    )
    return replace(
        chosen,
        tasks=replace(tasks, expected=expected),
        cluster=replace(chosen.cluster, capacity=measured_capacity),
    )


def expected_hours(chosen: Settings, attempt: Attempt | None, num_arms: int) -> tuple[float, str]:
    """(device-hours of a round of so many arms, what they rest on); (0, why) where no rate is known. attempt: of the probe, if it made one."""
    speed = None
    if attempt:
        try:
            speed = measured(attempt, chosen.recipe.batch_size)
        except (PipelineError, KeyError, TypeError, OSError):  # a file that is damaged measures nothing
            speed = None
    expected = forecast.forecast(as_measured(chosen, speed) if speed else chosen, num_arms)
    if expected is None:
        return 0.0, "no rate is known yet"
    if speed is None:
        return expected.hours, expected.source
    lengths = (
        "completions as long as tasks.expected says"
        if chosen.tasks.expected.completion_tokens
        else f"completions as long as the probe's {len(speed.lengths)}"
    )
    return expected.hours, f"at the probe's speed, played with {lengths}"


def in_words(hours: float) -> str:
    """Hours with two digits at least, such as 0.0043 or 12.4."""
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def _counts(line: Mapping[str, Any]) -> tuple[float, float, float]:
    """(step, tokens, seconds) of a line of progress; 0 for what is no number."""
    step, tokens, seconds = (float(number(line.get(name)) or 0) for name in ("step", "tokens", "seconds"))
    return step, tokens, seconds
