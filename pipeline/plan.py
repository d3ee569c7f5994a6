"""Policy -> eight arms. No I/O, no randomness: the same policy, round and campaign seed give the same plan anywhere.

a0 is always the reference recipe under a new seed. Round 1 repeats it on its last arms, as many times as the constitution says; once a
standing recipe differs from the reference, the last arm runs it unchanged, so that a moved axis is compared with what it moved
from. Every other arm is the standing recipe with one axis moved. Values come from the van der Corput sequence (radical inverse in a prime
base per axis, as in Halton 1960), which fills a range evenly however many rounds a campaign lasts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation, localcontext
from fractions import Fraction

from pipeline import settings
from pipeline.constitution import Constitution
from pipeline.errors import ConfigError
from pipeline.records import NUM_ARMS, Arm, Axis, Policy, Setting, with_setting

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
KINDS = ("log", "linear", "int", "choice")
EXACT = Context(prec=28, rounding=ROUND_HALF_EVEN)


def radical_inverse(index: int, base: int) -> Fraction:
    """Digits of `index` in `base`, mirrored at the point: 1, 2, 3, 4 in base 2 -> 1/2, 1/4, 3/4, 1/8."""
    value, scale = Fraction(0), Fraction(1, base)
    while index:
        index, digit = divmod(index, base)
        value += digit * scale
        scale /= base
    return value


def check_axis(axis: Axis) -> None:
    """Raises ConfigError when an axis has no values to give: an unknown kind, no choices, a range that is none."""
    if axis.kind not in KINDS:
        raise ConfigError(f"axis {axis.name} has kind {axis.kind!r}", f"Valid: {', '.join(KINDS)}")
    if axis.kind == "choice":
        if not axis.choices:
            raise ConfigError(f"axis {axis.name} has no choices", "Give it a list of at least one")
        return
    try:
        low, high = Decimal(axis.low), Decimal(axis.high)
        valid = low.is_finite() and high.is_finite() and low < high and (axis.kind != "log" or low > 0)
    except InvalidOperation:
        valid = False
    if not valid:
        raise ConfigError(
            f"axis {axis.name} goes from {axis.low!r} to {axis.high!r}", "Valid: decimals, low < high, low > 0 for log"
        )


def axis_value(axis: Axis, index: int, base: int) -> str:
    """The index-th value (from 1) of an axis, three significant digits, as a plain decimal string."""
    place = radical_inverse(index, base)
    if axis.kind == "choice":
        return axis.choices[(index - 1) % len(axis.choices)]
    low, high = Decimal(axis.low), Decimal(axis.high)
    with localcontext(EXACT):
        share = Decimal(place.numerator) / Decimal(place.denominator)
        if axis.kind == "log":
            value = (low.ln() + share * (high.ln() - low.ln())).exp()
        else:
            value = low + share * (high - low)
        if axis.kind == "int":
            return str(int(value.to_integral_value()))
        rounded = Context(prec=3, rounding=ROUND_HALF_EVEN).plus(value)
        return format(min(max(rounded, low), high).normalize(), "f")


def arm_seed(campaign_seed: int, round_name: str, arm: str) -> int:
    """A 31-bit seed from sha256: independent between arms and rounds, the same on every machine."""
    digest = hashlib.sha256(f"{campaign_seed}/{round_name}/{arm}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def move(policy: Policy, axis: Axis, round_number: int, base: int, reference: Mapping[str, str]) -> Setting:
    """The setting that an axis takes in a round: the next of its values that is neither what the standing recipe has nor a dead end.

    `reference` is the value of every axis key in the reference recipe; the standing settings replace it.
    """
    current = {**reference, **dict(policy.standing)}[axis.key]
    dead = {value for key, value in policy.dead_ends if key == axis.key}
    tries = 2 + len(dead) + len(axis.choices)
    for index in range(round_number, round_number + tries):
        value = axis_value(axis, index, base)
        if value not in dead and not same_value(value, current):
            return (axis.key, value)
    raise ConfigError(
        f"axis {axis.name} has no value left that is neither standing nor a dead end", "Give it a wider range"
    )


def same_value(one: str, other: str) -> bool:
    """Equal as numbers where both are numbers ("0.004" and "4e-3"), else as text."""
    try:
        return Decimal(one) == Decimal(other)
    except InvalidOperation:
        return one == other


def make_arms(
    policy: Policy, round_number: int, campaign_seed: int, num_replicates: int, reference: Mapping[str, str]
) -> tuple[Arm, ...]:
    """The eight arms of a round; `num_replicates` of them repeat a recipe unchanged, besides a0.

    `reference` maps every axis key to its value in the reference recipe. Raises ConfigError when the axes do not suffice.
    """
    last = "standing" if policy.standing else "reference"
    num_replicates = max(num_replicates, 1) if policy.standing else num_replicates
    num_axes = NUM_ARMS - 1 - num_replicates
    if not num_axes <= len(policy.axes) <= len(PRIMES):
        raise ConfigError(
            f"policy.axes has {len(policy.axes)} axes", f"Round {round_number} needs {num_axes} to {len(PRIMES)}"
        )
    for axis in policy.axes:
        check_axis(axis)
    round_name = f"r{round_number:04d}"

    def seed(index: int) -> int:
        return arm_seed(campaign_seed, round_name, f"a{index}")

    arms = [Arm(0, "anchor", seed(0), replicate_of="reference")]
    first = (round_number - 1) * num_axes  # axes take turns where there are more of them than arms
    for index in range(1, num_axes + 1):
        number = (first + index - 1) % len(policy.axes)
        axis = policy.axes[number]
        setting = move(policy, axis, round_number, PRIMES[number], reference)
        arms.append(Arm(index, "axis", seed(index), with_setting(policy.standing, setting), axis=axis.name))
    for index in range(len(arms), NUM_ARMS):
        arms.append(Arm(index, "replicate", seed(index), policy.standing, replicate_of=last))
    return tuple(arms)


def arms_of(chosen: settings.Settings, round_number: int, rules: Constitution) -> tuple[Arm, ...]:
    """The arms that a configuration gives a round, each checked. Raises ConfigError, and Refused by article 2."""
    policy = settings.policy_of(chosen)
    reference = {axis.key: settings.value_of(chosen, axis.key) for axis in policy.axes}
    replicates = rules.first_round_replicates if round_number == 1 else 0
    arms = make_arms(policy, round_number, chosen.seed, replicates, reference)
    for arm in arms:
        rules.check_settings(arm.overrides)
        settings.with_overrides(chosen, arm.overrides)
    return arms


def reference_arms(campaign_seed: int) -> tuple[Arm, ...]:
    """r0000: the reference (the a0 recipe, trained once) and the base (the image as it is, zero-shot)."""
    return (Arm(0, "reference", arm_seed(campaign_seed, "r0000", "a0")), Arm(1, "base", 0))
