"""The eight arms that a configuration gives a round, each checked against the constitution and the settings."""

from __future__ import annotations

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import Arm
from pipeline.config import settings
from pipeline.decision.plan import make_arms


def arms_of(chosen: settings.Settings, round_number: int, rules: Constitution) -> tuple[Arm, ...]:
    """The arms that a configuration gives a round, each checked. Raises ConfigError, and Refused by article 2."""
    policy = settings.policy_of(chosen)
    keys = [axis.key for axis in policy.axes] + [contrast.key for contrast in policy.contrasts]
    reference = {key: settings.value_of(chosen, key) for key in keys}
    replicates = rules.first_round_replicates if round_number == 1 else 0
    arms = make_arms(policy, round_number, chosen.seed, replicates, reference)
    for arm in arms:
        rules.check_settings(arm.overrides)
        settings.with_overrides(chosen, arm.overrides)
    return arms
