"""Make the eight arms of a round from its configuration, and check each against the constitution and the settings."""

from __future__ import annotations

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import Arm
from pipeline.config import settings
from pipeline.decision.plan import make_arms


def arms_of(chosen: settings.Settings, round_number: int, rules: Constitution) -> tuple[Arm, ...]:
    """The arms of a round. Raises ConfigError for a setting that is not valid, Refused for one that article 2 does not allow."""
    policy = settings.policy_of(chosen)
    keys = [axis.key for axis in policy.axes] + [contrast.key for contrast in policy.contrasts]
    reference = {key: settings.value_of(chosen, key) for key in keys}
    replicates = rules.first_round_replicates if round_number == 1 else 0
    is_last = round_number >= (chosen.policy.rounds or rules.num_rounds)
    arms = make_arms(policy, round_number, chosen.seed, replicates, reference, chosen.policy.confirmation, is_last)
    for arm in arms:
        rules.check_settings(arm.overrides)
        settings.with_overrides(chosen, arm.overrides)
    return arms
