"""Canaries are cheap warning signs beside the tests. Most compare arms with repeats of the reference recipe under other seeds.

    fired(family, arms, ...)                      the canaries of one look that fire for a family
    fires("truncation", value, repeats, floor)    is value > mean + t s sqrt(1 + 1/n) of the n repeats? (prediction interval, Student's t)

s^2 is the repeats' variance and at least `floor`, one run's variance by the choice of items: a few repeats that happen to be equal say
nothing about how far a run may lie from them. With fewer than four repeats a canary is not evaluated. If the arms' value is one more draw
from the repeats' normal distribution, a canary fires in at most 0.5 % of looks. Two canaries make a family SUSPECT, and none reverses
one. The simulated rate is in docs/evidence.md. The drift of the generator needs no repeats: the reference adapter does not change, so only
the difficulty of the items can move its accuracy from round to round. All values are exact rationals.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.records import Outcome
from pipeline.stats.alarms import RoundCounts
from pipeline.stats.counts import Counts
from pipeline.stats.lifts import paired_lift

UPWARDS = {
    "likelihood": "answer likelihood on dev minus on fresh",
    "length": "median completion length",
    "truncation": "share of truncated completions",
    "no_answer": "share of completions without an answer",
    "agreement": "agreement between samples minus accuracy",
    "worst_family": "mean fresh lift minus the family's",
    "second_generator": "dev lift minus the lift on a second implementation of the generator",
    "distance": "optimisation distance (adapter norm, KL)",
}
"""What each canary measures. Each fires when its value is too large."""
STUDENT = tuple(
    Fraction(text)
    for text in ("63.6568", "9.9249", "5.8410", "4.6041", "4.0322", "3.7075", "3.4995", "3.3554", "3.2499", "3.1693")
)
"""One-sided 0.5 % points of Student's t at 1, 2, .. 10 degrees of freedom, rounded up. The last is used for more than 10."""
DRIFT_SCORE = 3  # standard errors, two-sided: 0.27 %
LEAST_REPEATS = 4
"""With two or three repeats the point of Student's t is 64 or 10, so that nothing could fire."""


def fired(
    family: str, arms: Sequence[Outcome], repeats: Sequence[tuple[Outcome, Outcome]], rounds: Sequence[RoundCounts], reference: Outcome
) -> tuple[str, ...]:  # fmt: skip
    """The canaries that fire for a family, of those that need outcome strings alone: generator drift, truncation, the worst family.

    The last two compare the mean over the newest round's `arms` that are no repeats with the `repeats` of the reference recipe in all
    rounds, each of which comes with its round's reference. `reference` is that of the newest round, the last of `rounds`.
    """
    *earlier, newest = (counts.fresh[family] for counts in rounds)
    names = ["generator_drift"] if generator_drifts(newest, earlier) else []
    if arms and repeats:
        value = mean([truncated(run, family) for run in arms])
        names += ["truncation"] * fires("truncation", value, *truncations(repeats, family))
        value = mean([lag(run, reference, family) for run in arms])
        names += ["worst_family"] * fires("worst_family", value, *lags(repeats, family))
    return tuple(names)


def truncations(repeats: Sequence[tuple[Outcome, Outcome]], family: str) -> tuple[list[Fraction], Fraction]:
    """The repeats' shares of truncated completions, and one run's variance by the choice of items, p (1 - p) / n.

    p is estimated as (truncated + 1) / (completions + 2), so that repeats without a truncated completion do not make it 0.
    """
    marks = [run.outcomes["fresh"][family] for run, _ in repeats]
    p = Fraction(sum(each.count("T") for each in marks) + 1, sum(map(len, marks)) + 2)
    return [truncated(run, family) for run, _ in repeats], p * (1 - p) * len(marks) / sum(map(len, marks))


def lags(repeats: Sequence[tuple[Outcome, Outcome]], family: str) -> tuple[list[Fraction], Fraction]:
    """The repeats' lags, and the mean variance over items of a repeat's lift in this family."""
    variances = [paired_lift(run, reference, "fresh", families=[family]).variance for run, reference in repeats]
    return [lag(run, reference, family) for run, reference in repeats], mean(variances)


def truncated(run: Outcome, family: str) -> Fraction:
    """The share of truncated completions among a family's fresh items."""
    marks = run.outcomes["fresh"][family]
    return Fraction(marks.count("T"), len(marks))


def lag(run: Outcome, reference: Outcome, family: str) -> Fraction:
    """How far a family's fresh lift is below the mean over families, as a difference of accuracies; below 0 where it is above the mean."""
    right, of_reference = run.num_right("fresh"), reference.num_right("fresh")
    families = tuple(right)
    sizes = tuple(len(run.outcomes["fresh"][name]) for name in families)
    won = tuple(right[name] - of_reference[name] for name in families)
    return _lags(won, sizes)[families.index(family)]


@lru_cache(maxsize=4096)
def _lags(won: tuple[int, ...], num_items: tuple[int, ...]) -> tuple[Fraction, ...]:
    """The lags of all families, from the right answers beyond the reference's. The cache: every family and every later round asks again."""
    lifts = [Fraction(one, n) for one, n in zip(won, num_items, strict=True)]
    return tuple(mean(lifts) - lift for lift in lifts)


def fires(canary: str, value: Fraction, repeats: Sequence[Fraction], floor: Fraction = Fraction(0)) -> bool:
    """Whether the value lies above the prediction interval of the repeats. With fewer than LEAST_REPEATS the answer is False.

    Raises ConfigError for a name that is not in UPWARDS.
    """
    if canary not in UPWARDS:
        raise ConfigError(f"{canary!r} is no canary", f"Use one of {', '.join(UPWARDS)}")
    n = len(repeats)
    if n < LEAST_REPEATS:
        return False
    centre = mean(repeats)
    variance = sum(((repeat - centre) ** 2 for repeat in repeats), Fraction(0)) / (n - 1)
    quantile = STUDENT[min(n - 1, len(STUDENT)) - 1]
    return value > centre and (value - centre) ** 2 > quantile**2 * max(variance, floor) * (1 + Fraction(1, n))


def generator_drifts(newest: Counts, earlier: Sequence[Counts]) -> bool:
    """Whether the reference's accuracy on the newest fresh items differs from that on all earlier ones by more than three standard errors.

    Without earlier items the answer is False. Dev is not compared: it may be easier or harder by design, which the tests allow for.
    """
    if not earlier:
        return False
    right, m = sum(counts.reference for counts in earlier), sum(counts.num_items for counts in earlier)
    n = newest.num_items
    pooled = Fraction(newest.reference + right, n + m)
    change = Fraction(newest.reference, n) - Fraction(right, m)
    variance = pooled * (1 - pooled) * (Fraction(1, n) + Fraction(1, m))
    return change**2 > DRIFT_SCORE**2 * variance


def mean(values: Sequence[Fraction]) -> Fraction:
    """The mean of at least one value."""
    return sum(values, Fraction(0)) / len(values)
