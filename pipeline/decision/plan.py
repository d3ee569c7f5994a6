"""Policy -> eight arms. No I/O, no randomness: the same policy, round and campaign seed give the same plan anywhere.

a0 is always the reference recipe under a new seed. Round 1 repeats it on its last arms, as many times as the constitution says; once a
standing recipe differs from the reference, the last arm runs it unchanged, so that a moved axis is compared with what it moved
from. What the last decision registered comes before that: contrasts, a control on the old objective, bought replicates. Every other arm
is the standing recipe with one axis moved. Values come from the van der Corput sequence (radical inverse in a prime
base per axis, as in Halton 1960), which fills a range evenly however many rounds a campaign lasts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation, localcontext
from fractions import Fraction

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.records import NUM_ARMS, Arm, Axis, Policy, Setting, with_setting

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


def move(policy: Policy, axis: Axis, round_number: int, base: int, reference: Mapping[str, str]) -> Setting | None:
    """The setting that an axis takes in a round: the next of its values that is neither what the standing recipe has nor a dead end.

    None where there is none. `reference` is the value of every axis key in the reference recipe; the standing settings replace it.
    """
    current = {**reference, **dict(policy.standing)}[axis.key]
    dead = {value for key, value in policy.dead_ends if key == axis.key}
    tries = 2 + len(dead) + len(axis.choices)
    for index in range(round_number, round_number + tries):
        value = axis_value(axis, index, base)
        if value not in dead and not same_value(value, current):
            return (axis.key, value)
    return None


def same_value(one: str, other: str) -> bool:
    """Equal as numbers where both are numbers ("0.004" and "4e-3"), else as text."""
    try:
        return Decimal(one) == Decimal(other)
    except InvalidOperation:
        return one == other


def make_arms(
    policy: Policy, round_number: int, campaign_seed: int, num_replicates: int, reference: Mapping[str, str]
) -> tuple[Arm, ...]:
    """The eight arms of a round; `num_replicates` of them repeat a recipe unchanged, besides a0 and those that the policy bought.

    `reference` maps every axis key (and a contrast's) to its value in the reference recipe. Raises ConfigError when the axes do not suffice.
    """
    round_name = f"r{round_number:04d}"
    for axis in policy.axes:
        check_axis(axis)
    beside = _beside(policy, num_replicates, reference)
    num_slots = NUM_ARMS - 1 - len(beside)
    if not num_slots <= len(policy.axes) <= len(PRIMES):
        raise ConfigError(
            f"policy.axes has {len(policy.axes)} axes", f"Round {round_number} needs {num_slots} to {len(PRIMES)}"
        )
    arms = [Arm(0, "anchor", 0, replicate_of="reference")]
    moves = _moves(policy, round_number, num_slots, reference)
    for index, (axis, setting) in enumerate(moves, 1):
        arms.append(Arm(index, "axis", 0, with_setting(policy.standing, setting), axis=axis.name))
    beside += [replicate(policy)] * (num_slots - len(moves))  # what retired axes leave free
    arms += [replace(arm, index=index) for index, arm in enumerate(beside, len(arms))]
    return tuple(replace(arm, seed=arm_seed(campaign_seed, round_name, arm.name)) for arm in arms)


def replicate(policy: Policy) -> Arm:
    """The standing recipe unchanged; the reference as long as nothing else stands."""
    return Arm(0, "replicate", 0, policy.standing, replicate_of="standing" if policy.standing else "reference")


def _beside(policy: Policy, num_replicates: int, reference: Mapping[str, str]) -> list[Arm]:
    """The arms besides anchor and axes: contrasts, the control, replicates."""
    arms = []
    for contrast in policy.contrasts:
        share = Decimal({**reference, **dict(policy.standing)}[contrast.key])
        if share > 0:  # what is not in the mix cannot be halved
            setting = (contrast.key, format(Context(prec=3).divide(share, Decimal(2)).normalize(), "f"))
            arms.append(Arm(0, "contrast", 0, with_setting(policy.standing, setting), axis=contrast.family))
    if policy.control is not None:
        arms.append(Arm(0, "control", 0, policy.control, replicate_of="control"))
    wanted = max(num_replicates, 1 if policy.standing else 0) + policy.replicates
    return arms + [replicate(policy)] * wanted


def _moves(
    policy: Policy, round_number: int, num_slots: int, reference: Mapping[str, str]
) -> list[tuple[Axis, Setting]]:
    """One move for each slot, axes taking turns where there are more of them; one whose values are all spent gives up its turn."""
    open_axes = [(PRIMES[n], axis) for n, axis in enumerate(policy.axes) if axis.name not in policy.retired]
    first = (round_number - 1) * num_slots % max(1, len(open_axes))
    moves = [
        (axis, setting)
        for base, axis in open_axes[first:] + open_axes[:first]
        if (setting := move(policy, axis, round_number, base, reference))
    ]
    if not moves:
        raise ConfigError(
            "no axis has a value left that is neither standing nor a dead end",
            "Another campaign with other axes or ranges",
        )
    return moves[:num_slots]


def reference_arms(campaign_seed: int) -> tuple[Arm, ...]:
    """r0000: the reference (the a0 recipe, trained once) and the base (the image as it is, zero-shot)."""
    return (Arm(0, "reference", arm_seed(campaign_seed, "r0000", "a0")), Arm(1, "base", 0))
