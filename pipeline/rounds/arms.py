"""Make the eight arms of a round from its configuration, and check each against the constitution and the settings.

Before a campaign begins, its axes are checked too: what a later round would refuse should not wait until that round.
"""

from __future__ import annotations

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import ConfigError, Refused
from pipeline.campaign.records import Arm, Axis, Setting
from pipeline.config import settings
from pipeline.config.fit import check_plan_fits
from pipeline.decision import plan


def arms_of(chosen: settings.Settings, round_number: int, rules: Constitution) -> tuple[Arm, ...]:
    """The arms of a round. Raises ConfigError for a setting that is not valid, Refused for one that article 2 does not allow."""
    arms = _planned(chosen, round_number, rules)
    for arm in arms:
        rules.check_settings(arm.overrides)
        settings.with_overrides(chosen, arm.overrides)
    return arms


def check_axes(chosen: settings.Settings, rules: Constitution) -> None:
    """Check the axes of a campaign that is to begin, so that no later round refuses them.

    Each axis contains the reference's value and others, its ends and choices are allowed by article 2 and fit model and memory, and every
    round could be planned if nothing were kept. Raises ConfigError for the first fault.
    """
    for axis in settings.policy_of(chosen).axes:
        plan.check_axis(axis)
        plan.check_contains(axis, settings.value_of(chosen, axis.key))
    for axis, setting in ends_of_axes(chosen):
        try:
            rules.check_settings([setting])
            check_plan_fits(settings.with_overrides(chosen, [setting]))
        except (ConfigError, Refused) as error:
            reference = f"of which the reference has {settings.value_of(chosen, axis.key)}"
            what = (
                f"The axis {axis.name} reaches {setting[0]} = {setting[1]}, {reference}, which is refused: {error.what}"
            )
            raise ConfigError(what, error.cure) from None
    for number in range(1, (chosen.policy.rounds or rules.num_rounds) + 1):
        _planned(chosen, number, rules)


def ends_of_axes(chosen: settings.Settings) -> list[tuple[Axis, Setting]]:
    """Both ends of the range of every axis, or its choices, as settings."""
    return [(axis, (axis.key, value)) for axis in settings.policy_of(chosen).axes for value in plan.ends(axis)]


def _planned(chosen: settings.Settings, round_number: int, rules: Constitution) -> tuple[Arm, ...]:
    """The arms of a round, not checked yet."""
    policy = settings.policy_of(chosen)
    keys = [axis.key for axis in policy.axes] + [contrast.key for contrast in policy.contrasts]
    reference = {key: settings.value_of(chosen, key) for key in keys}
    replicates = rules.first_round_replicates if round_number == 1 else 0
    is_last = round_number >= (chosen.policy.rounds or rules.num_rounds)
    confirmation = chosen.policy.confirmation
    return plan.make_arms(policy, round_number, chosen.seed, replicates, reference, confirmation, is_last)
