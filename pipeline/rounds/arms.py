"""Make the eight arms of a round from its configuration, and check each against the constitution and the settings.

Before a campaign begins, its axes are checked too: what a later round would refuse should not wait until that round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import ConfigError, Refused
from pipeline.campaign.records import Arm, Axis, Policy, Setting
from pipeline.config import footprint, settings
from pipeline.config.fit import check_plan_fits
from pipeline.decision import plan


def arms_of(chosen: settings.Settings, round_number: int, rules: Constitution) -> tuple[Arm, ...]:
    """The arms of a round. Raises ConfigError for a setting that is not valid, Refused for one that articles 2 or 16 do not allow."""
    if chosen.worker.agent != "none":
        rules.check_agent(asdict(chosen.worker.budget))
        from pipeline.agent import arm as agents_arm  # a third of a second, for whoever has agents

        agents_arm.check(chosen)
    arms = _planned(chosen, round_number, rules, settings.policy_of(chosen))
    for arm in arms:
        rules.check_settings(arm.overrides)
        settings.with_overrides(chosen, arm.overrides)
    return arms


def check_axes(chosen: settings.Settings, rules: Constitution) -> None:
    """Check the axes of a campaign that is to begin, so that no later round refuses them.

    Each axis contains the reference's value and others; what it may be given is allowed by article 2 and fits model and memory, also
    where every axis has the value that needs most; and every round could be planned if nothing were kept. Raises ConfigError for the
    first fault.
    """
    for axis in settings.policy_of(chosen).axes:
        plan.check_axis(axis)
        plan.check_contains(axis, settings.value_of(chosen, axis.key))
    found = []
    for axis, setting in values_of_axes(chosen, rules):
        try:
            rules.check_settings([setting])
            changed = settings.with_overrides(chosen, [setting])
            check_plan_fits(changed)
        except (ConfigError, Refused) as error:
            reference = f"of which the reference has {settings.value_of(chosen, axis.key)}"
            what = (
                f"The axis {axis.name} reaches {setting[0]} = {setting[1]}, {reference}, which is refused: {error.what}"
            )
            raise ConfigError(what, error.cure) from None
        found.append((setting, changed))
    if chosen.cluster.capacity.gpu_memory_gib:
        _check_joint_memory(chosen, found)
    policy = settings.policy_of(chosen)
    for number in range(1, num_rounds(chosen, rules) + 1):
        policy = plan.with_tried(policy, _planned(chosen, number, rules, policy))


def _check_joint_memory(chosen: settings.Settings, found: Sequence[tuple[Setting, settings.Settings]]) -> None:
    """Check the memory where every axis has the value that needs most of it, because a value that stands is joined by another axis's.

    found: each setting, and the configuration with it alone.
    """
    needed = footprint.of_arm(chosen.to_dict(), at_least=True)
    for work, alone in needed.items():
        largest: dict[str, tuple[int, str]] = {}
        for (key, value), changed in found:
            peak = footprint.of_arm(changed.to_dict(), at_least=True)[work].peak
            if peak > largest.get(key, (alone.peak, ""))[0]:
                largest[key] = peak, value
        joint = [(key, value) for key, (_, value) in largest.items()]
        try:
            check_plan_fits(settings.with_overrides(chosen, joint))
        except ConfigError as error:
            together = " and ".join(f"{key} = {value}" for key, value in joint)
            what = f"The axes together reach {together}, each of which fits alone: {error.what}"
            raise ConfigError(what, f"{error.cure}; or narrow one of these axes") from None


def values_of_axes(chosen: settings.Settings, rules: Constitution) -> list[tuple[Axis, Setting]]:
    """What each axis may be given: both ends of its range, or its choices; of whole numbers also those that its turns come to.

    Between two real numbers that are valid all others are. A whole number may have to be divided by another, and a real number between two
    whole ones is none. An axis has one turn a round, and proposals may try as many values.
    """
    found = []
    most = 2 * num_rounds(chosen, rules)
    for base, axis in zip(
        plan.PRIMES, settings.policy_of(chosen).axes, strict=False
    ):  # too many are refused by the plan
        reference = settings.value_of(chosen, axis.key)
        values = [*plan.ends(axis)]
        if axis.kind != "choice" and reference.lstrip("-").isdigit():
            values += islice(plan.other_values(axis, base, reference), most)
        found += [(axis, (axis.key, value)) for value in dict.fromkeys(values)]
    return found


def num_rounds(chosen: settings.Settings, rules: Constitution) -> int:
    """The number of rounds that a campaign is frozen with."""
    return chosen.policy.rounds or rules.num_rounds


def _planned(chosen: settings.Settings, round_number: int, rules: Constitution, policy: Policy) -> tuple[Arm, ...]:
    """The arms of a round with this policy, not checked yet."""
    keys = [axis.key for axis in policy.axes] + [contrast.key for contrast in policy.contrasts]
    reference = {key: settings.value_of(chosen, key) for key in keys}
    replicates = rules.first_round_replicates if round_number == 1 else 0
    is_last = round_number >= num_rounds(chosen, rules)
    confirmation = chosen.policy.confirmation
    return plan.make_arms(policy, round_number, chosen.seed, replicates, reference, confirmation, is_last)
