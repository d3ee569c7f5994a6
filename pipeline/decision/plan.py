"""Make the eight arms of a round from the policy. The same policy, round and campaign seed give the same arms anywhere; nothing is random.

a0 always runs the reference recipe under a new seed. In round 1 the last arms repeat it, as many times as the constitution says. Once a
standing recipe differs from the reference, the last arm runs the standing recipe unchanged, so that a moved axis is compared with the
recipe that it moved from. What the last decision registered also gets arms: contrasts, a control on the old objective, and bought
replicates. A campaign that chose another way to confirm (`claims.assess_claims`) runs the standing recipe and the reference twice in
every round from the second on, or four times each in its last round, which then moves no axis. Every other arm runs the standing recipe
with one axis moved. An axis takes its values from the van der Corput sequence (the radical inverse in one prime base for each axis, as in
Halton 1960), which fills a range evenly however many rounds there are.

`Policy.tried` has every setting that axis arms were given so far. Turns and values follow from it and not from the round's number, because
the number of slots changes from round to round: those axes move that have waited longest, and no value comes again before an axis's others
are used up.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation, localcontext
from fractions import Fraction
from functools import lru_cache
from itertools import islice

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.records import NUM_ARMS, Arm, Axis, Policy, Setting, with_setting
from pipeline.claims.assess_claims import DOUBLED, FINAL_ROUND, RUNNING

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
KINDS = ("log", "linear", "int", "choice")
EXACT = Context(prec=28, rounding=ROUND_HALF_EVEN)
MOST_INDICES = 256
"""How far the sequence of an axis is followed. A campaign has fewer than 64 axis arms; a range with fewer values than that ends before."""


def radical_inverse(index: int, base: int) -> Fraction:
    """Mirror the digits of `index` in `base` at the point: in base 2, the indices 1, 2, 3, 4 give 1/2, 1/4, 3/4, 1/8."""
    value, scale = Fraction(0), Fraction(1, base)
    while index:
        index, digit = divmod(index, base)
        value += digit * scale
        scale /= base
    return value


def check_axis(axis: Axis) -> None:
    """Raises ConfigError where an axis has an unknown kind, no choices, or a range that is empty or not numeric."""
    if axis.kind not in KINDS:
        raise ConfigError(f"The axis {axis.name} has the unknown kind {axis.kind!r}", f"Use one of {', '.join(KINDS)}")
    if axis.kind == "choice":
        if not axis.choices:
            raise ConfigError(f"The axis {axis.name} has no choices", "Give it a list with at least one value")
        return
    try:
        low, high = Decimal(axis.low), Decimal(axis.high)
        valid = low.is_finite() and high.is_finite() and low < high and (axis.kind != "log" or low > 0)
        valid = valid and (axis.kind != "int" or low % 1 == high % 1 == 0)
    except InvalidOperation:
        valid = False
    if not valid:
        raise ConfigError(
            f"The axis {axis.name} has the range from {axis.low!r} to {axis.high!r}, which is not valid",
            "Give decimals with low < high, and low > 0 for the kind log, whole numbers for the kind int",
        )


def check_contains(axis: Axis, value: str) -> None:
    """Raises ConfigError where an axis's range or choices do not contain the reference's value, or hold nothing else."""
    if axis.kind == "choice":
        contains = any(same_value(choice, value) for choice in axis.choices)
        held, cure = f"the choices {', '.join(axis.choices)}", f"Add {value} to them"
    else:
        contains = is_number(value) and Decimal(axis.low) <= Decimal(value) <= Decimal(axis.high)
        held, cure = f"the range from {axis.low} to {axis.high}", 'Widen it, or give it as factors: ["0.25", "4"]'
    if not contains:
        raise ConfigError(
            f"The axis {axis.name} has {held}, and the reference has {axis.key} = {value}, which is not among them",
            f"{cure}; or choose the axes of this model, such as policy/axes=nano",
        )
    if next(other_values(axis, 2, value), None) is None:
        what, cure = ("choice", "Add another one") if axis.kind == "choice" else ("value", "Widen its range")
        raise ConfigError(
            f"The axis {axis.name} has no {what} but {value}, which the reference has", f"{cure}, or drop it"
        )


def ends(axis: Axis) -> tuple[str, ...]:
    """The values of an axis that its others lie between: both ends of its range, or every choice."""
    return axis.choices if axis.kind == "choice" else (axis.low, axis.high)


@lru_cache(maxsize=4096)
def axis_value(axis: Axis, index: int, base: int) -> str:
    """The index-th value of an axis, counted from 1: a choice, or a plain decimal string with three significant digits."""
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
    """A training seed from 0 to 2^31 - 1, taken from a sha256. Seeds of different arms and rounds are independent."""
    digest = hashlib.sha256(f"{campaign_seed}/{round_name}/{arm}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def other_values(axis: Axis, base: int, current: str) -> Iterator[str]:
    """The different values of an axis without the current one, in the order in which a campaign tries them. base: the axis's prime."""
    seen = {_comparable(current)}
    last = len(axis.choices) if axis.kind == "choice" else MOST_INDICES
    for index in range(1, last + 1):
        value = axis_value(axis, index, base)
        if _comparable(value) not in seen:
            seen.add(_comparable(value))
            yield value


def move(policy: Policy, axis: Axis, base: int, reference: Mapping[str, str]) -> Setting | None:
    """The next setting of an axis: of its values that are not closed, the first of those that were tried least; None where no value is left.

    The value that stands costs no turn. A value is closed if it is a dead end or was set aside. `base` is the axis's prime. `reference`
    maps every axis key to its value in the reference recipe; standing settings replace these.
    """
    current = {**reference, **dict(policy.standing)}[axis.key]
    closed = {_comparable(value) for key, value in (*policy.dead_ends, *policy.set_aside) if key == axis.key}
    # The anchor of every round runs the reference's value, so it is not new where another one stands.
    earlier = [reference[axis.key], *(value for key, value in policy.tried if key == axis.key)]
    tried = Counter(map(_comparable, earlier))
    left: list[str] = []
    for value in other_values(axis, base, current):
        if _comparable(value) in closed:
            continue
        if not tried[_comparable(value)]:
            return axis.key, value
        left.append(value)
    return (axis.key, min(left, key=lambda value: tried[_comparable(value)])) if left else None


def with_tried(policy: Policy, arms: Iterable[Arm]) -> Policy:
    """The policy after a round with these arms was planned: what its axis arms were given counts as tried, whoever proposed it."""
    given = tuple(arm.overrides[-1] for arm in arms if arm.role == "axis")
    return replace(policy, tried=policy.tried + given)


def is_number(text: str) -> bool:
    """Whether a text is a finite decimal."""
    try:
        return Decimal(text).is_finite()
    except InvalidOperation:
        return False


def same_value(first: str, second: str) -> bool:
    """Whether two values are equal as numbers, such as "0.004" and "4e-3", or as text where one is no number."""
    return _comparable(first) == _comparable(second)


def _comparable(value: str) -> Decimal | str:
    """What is equal for equal values: the number, or the text where it is none."""
    return Decimal(value) if is_number(value) else value


def make_arms(
    policy: Policy,
    round_number: int,
    campaign_seed: int,
    num_replicates: int,
    reference: Mapping[str, str],
    confirmation: str = RUNNING,
    is_last: bool = False,
) -> tuple[Arm, ...]:
    """The eight arms of a round.

    `num_replicates` of them repeat a recipe unchanged, besides a0 and the replicates that the policy bought. `reference` maps the key of
    every axis and contrast to its value in the reference recipe. `confirmation` is one of `assess_claims.CONFIRMATIONS`, and `is_last`
    says that no round follows. Raises ConfigError where an axis is not valid, there are too few or too many axes, or no axis has a value
    left.
    """
    round_name = f"r{round_number:04d}"
    for axis in policy.axes:
        check_axis(axis)
    if confirmation == FINAL_ROUND and is_last and policy.standing:
        half = NUM_ARMS // 2
        others = [_repeat(policy, "reference")] * (half - 1) + [_repeat(policy, "standing")] * half
    else:
        others = _other_arms(policy, num_replicates, reference, confirmation == DOUBLED and round_number > 1)
    num_slots = NUM_ARMS - 1 - len(others)
    if not num_slots <= len(policy.axes) <= len(PRIMES):
        raise ConfigError(
            f"policy.axes has {len(policy.axes)} axes", f"Round {round_number} needs {num_slots} to {len(PRIMES)} axes"
        )
    arms = [Arm(0, "anchor", 0, replicate_of="reference")]
    moves = _moves(policy, num_slots, reference) if num_slots else []
    for index, (axis, setting) in enumerate(moves, 1):
        arms.append(Arm(index, "axis", 0, with_setting(policy.standing, setting), axis=axis.name))
    others += [_replicate(policy)] * (num_slots - len(moves))  # retired axes may leave slots free
    arms += [replace(arm, index=index) for index, arm in enumerate(others, len(arms))]
    return tuple(replace(arm, seed=arm_seed(campaign_seed, round_name, arm.name)) for arm in arms)


def _replicate(policy: Policy) -> Arm:
    """An arm that runs the standing recipe unchanged, or the reference recipe while nothing was kept yet."""
    return _repeat(policy, "standing" if policy.standing else "reference")


def _repeat(policy: Policy, recipe: str) -> Arm:
    """An arm that runs a recipe unchanged: "standing" or "reference"."""
    return Arm(0, "replicate", 0, policy.standing if recipe == "standing" else (), replicate_of=recipe)


def _other_arms(policy: Policy, num_replicates: int, reference: Mapping[str, str], is_doubled: bool) -> list[Arm]:
    """The arms that are neither anchor nor axis arms: contrasts, the control, replicates.

    With `is_doubled`, the reference and the standing recipe run once more; the latter counts as the first of the bought replicates.
    """
    arms = [_repeat(policy, "reference")] * int(is_doubled)
    for contrast in policy.contrasts:
        share = Decimal({**reference, **dict(policy.standing)}[contrast.key])
        if share > 0:  # a family without a share in the mix cannot be halved
            setting = (contrast.key, format(Context(prec=3).divide(share, Decimal(2)).normalize(), "f"))
            arms.append(Arm(0, "contrast", 0, with_setting(policy.standing, setting), axis=contrast.family))
    if policy.control is not None:
        arms.append(Arm(0, "control", 0, policy.control, replicate_of="control"))
    wanted = max(num_replicates, (1 + is_doubled) if policy.standing else 0)
    wanted += max(0, policy.replicates - is_doubled)
    return arms + [_replicate(policy)] * wanted


def _moves(policy: Policy, num_slots: int, reference: Mapping[str, str]) -> list[tuple[Axis, Setting]]:
    """At most one move for each slot. The axes that have waited longest move; an axis without values left is skipped.

    Raises ConfigError where no axis has a value left.
    """
    newest = {key: place for place, (key, _) in enumerate(policy.tried)}
    open_axes = [(PRIMES[n], axis) for n, axis in enumerate(policy.axes) if axis.name not in policy.retired]
    open_axes.sort(key=lambda each: newest.get(each[1].key, -1))  # those that never moved stay in their order
    possible = ((axis, setting) for base, axis in open_axes if (setting := move(policy, axis, base, reference)))
    moves = list(islice(possible, num_slots))
    if not moves:
        raise ConfigError(
            "No axis has a value left that is neither in the standing recipe nor closed (a dead end, or set aside)",
            "Start another campaign with other axes or wider ranges",
        )
    return moves


def reference_arms(campaign_seed: int) -> tuple[Arm, ...]:
    """The arms of r0000: the reference, which trains the a0 recipe once, and the base, which evaluates the image's model without training."""
    return (Arm(0, "reference", arm_seed(campaign_seed, "r0000", "a0")), Arm(1, "base", 0))
