"""Canaries are cheap warning signs beside the tests. Each compares arms with repeats of the reference recipe under other seeds.

    fired(family, arms, ...)                the canaries of one look that fire for a family
    fires("truncation", value, repeats)     is value > mean + t s sqrt(1 + 1/n) of the n >= 2 repeats? (prediction interval, Student's t)

If the arm's value is one more draw from the repeats' normal distribution, a canary fires in at most 0.5 % of looks. Two canaries make a
family SUSPECT, and none reverses one. Of k canaries, however dependent, P(two or more fire) <= k / 2 x 0.5 % (Markov). With
two or three repeats, as in a first round, t is 64 or 10, so these canaries hardly ever fire. Drift of the generator needs no repeats:
the gap test assumes that there is none, and `generator_drifts` checks this assumption. All values are exact rationals.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.records import Outcome
from pipeline.stats.alarms import RoundCounts
from pipeline.stats.counts import Counts

UPWARDS = {
    "likelihood": "answer likelihood on dev minus on fresh",
    "length": "median completion length",
    "truncation": "share of truncated completions",
    "no_answer": "share of completions without an answer",
    "agreement": "agreement between samples minus accuracy",
    "worst_family": "mean fresh lift minus the worst family's",
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


def fired(
    family: str,
    arms: Sequence[Outcome],
    reference: Outcome,
    repeats: Sequence[tuple[Outcome, Outcome]],
    newest: RoundCounts,
) -> tuple[str, ...]:
    """The canaries that fire for a family, of those that need outcome strings alone: generator drift, truncation, the worst family.

    The last two compare the mean over the newest round's `arms` that are no repeats with the `repeats` of the reference recipe in all
    rounds, each of which comes with its round's reference. `reference` and `newest` are those of the newest round.
    """
    names = ["generator_drift"] if generator_drifts(newest.dev[family], newest.fresh[family]) else []
    if arms:
        value = sum((truncated(run, family) for run in arms), Fraction(0)) / len(arms)
        names += ["truncation"] * fires("truncation", value, [truncated(run, family) for run, _ in repeats])
        value = sum((lag(run, reference, family) for run in arms), Fraction(0)) / len(arms)
        names += ["worst_family"] * fires("worst_family", value, [lag(run, other, family) for run, other in repeats])
    return tuple(names)


def truncated(run: Outcome, family: str) -> Fraction:
    """The share of truncated completions among a family's fresh items."""
    marks = run.outcomes["fresh"][family]
    return Fraction(marks.count("T"), len(marks))


def lag(run: Outcome, reference: Outcome, family: str) -> Fraction:
    """How far a family's fresh lift is below the mean over families, as a difference of accuracies; 0 where it is not below."""
    lifts = {
        name: Fraction(marks.count("1") - reference.outcomes["fresh"][name].count("1"), len(marks))
        for name, marks in run.outcomes["fresh"].items()
    }
    return max(Fraction(0), sum(lifts.values(), Fraction(0)) / len(lifts) - lifts[family])


def fires(canary: str, value: Fraction, repeats: Sequence[Fraction]) -> bool:
    """Whether the value lies above the prediction interval of the repeats. With fewer than two repeats the answer is False.

    Raises ConfigError for a name that is not in UPWARDS.
    """
    if canary not in UPWARDS:
        raise ConfigError(f"{canary!r} is no canary", f"Use one of {', '.join(UPWARDS)}")
    n = len(repeats)
    if n < 2:
        return False
    mean = sum(repeats, Fraction(0)) / n
    variance = sum(((repeat - mean) ** 2 for repeat in repeats), Fraction(0)) / (n - 1)
    quantile = STUDENT[min(n - 1, len(STUDENT)) - 1]
    return value > mean and (value - mean) ** 2 > quantile**2 * variance * (1 + Fraction(1, n))


def generator_drifts(dev: Counts, fresh: Counts) -> bool:
    """Whether the reference's accuracies on dev and fresh differ by more than three standard errors.

    The reference adapter does not change, so only a change in the items' difficulty can move its accuracy.
    """
    n, m = dev.num_items, fresh.num_items
    pooled = Fraction(dev.reference + fresh.reference, n + m)
    gap = Fraction(dev.reference, n) - Fraction(fresh.reference, m)
    variance = pooled * (1 - pooled) * (Fraction(1, n) + Fraction(1, m))
    return gap**2 > DRIFT_SCORE**2 * variance
