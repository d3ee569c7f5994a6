"""Canaries: cheap signs beside the tests, each held against what the reference recipe does by itself under other seeds. Exact rationals.

    fires("truncation", value, repeats)     beyond mean + t s sqrt(1 + 1/n) of n >= 2 repeats (prediction interval, Student's t)

Each fires by itself in at most half a percent of looks if the arm's value is one more draw of the repeats' normal distribution. Two of
them make a family SUSPECT, none alone reverses one: with k canaries however dependent, P(two or more fire) <= k / 2 x 0.5 %
(Markov). With two or three repeats, which a first round has, t is 64 or 10: such canaries hardly ever fire, and say so.
Drift of the generator needs no repeats: it is what the gap test takes for granted that there is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from pipeline.campaign.errors import ConfigError
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
"""What each measures; all fire upwards."""
STUDENT = tuple(
    Fraction(text)
    for text in ("63.6568", "9.9249", "5.8410", "4.6041", "4.0322", "3.7075", "3.4995", "3.3554", "3.2499", "3.1693")
)
"""One-sided 0.5 % points of Student's t at 1, 2, .. 10 degrees of freedom, rounded up; the last serves beyond."""
DRIFT_SCORE = 3  # standard errors, two-sided: 0.27 %


def fires(canary: str, value: Fraction, repeats: Sequence[Fraction]) -> bool:
    """Is the value outside what repeats of the reference recipe lead to expect? Below two repeats nothing can be said: False."""
    if canary not in UPWARDS:
        raise ConfigError(f"{canary!r} is no canary", f"Valid: {', '.join(UPWARDS)}")
    n = len(repeats)
    if n < 2:
        return False
    mean = sum(repeats, Fraction(0)) / n
    variance = sum(((each - mean) ** 2 for each in repeats), Fraction(0)) / (n - 1)
    quantile = STUDENT[min(n - 1, len(STUDENT)) - 1]
    return value > mean and (value - mean) ** 2 > quantile**2 * variance * (1 + Fraction(1, n))


def generator_drifts(dev: Counts, fresh: Counts) -> bool:
    """The reference alone, which nobody trained since: is fresh harder or easier than dev by three standard errors?"""
    n, m = dev.num_items, fresh.num_items
    pooled = Fraction(dev.reference + fresh.reference, n + m)
    gap = Fraction(dev.reference, n) - Fraction(fresh.reference, m)
    variance = pooled * (1 - pooled) * (Fraction(1, n) + Fraction(1, m))
    return gap**2 > DRIFT_SCORE**2 * variance
