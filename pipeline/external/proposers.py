"""Ask the configured proposer and put what the gate accepted into a round's arms. `policy.proposals.kind` is one of:

none       there is no proposer
llm        an endpoint with OpenAI's /v1/chat/completions interface
optuna     a sampler in this process
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.campaign import canonical
from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import ConfigError
from pipeline.campaign.layout import Round
from pipeline.campaign.log import Log
from pipeline.campaign.records import Arm, Setting
from pipeline.config import settings
from pipeline.config.policy_schema import Proposals
from pipeline.decision import evidence, history, proposal_gate, proposals
from pipeline.external import briefing, chat, optuna_sampler, propose
from pipeline.model_calls.endpoint import Endpoint, post_chat


def with_proposals(
    folder: Round, chosen: settings.Settings, arms: Sequence[Arm], constitution: Constitution
) -> tuple[Arm, ...]:
    """Return a round's arms; in mode `active`, accepted proposals replace axis arms. A round without axis arms asks nobody.

    The caller holds the round's lock and has not planned the round yet. Raises ConfigError for a proposer that cannot be asked as
    configured, IntegrityError and WorkFailed as `propose.propose`.
    """
    proposals_config = chosen.policy.proposals
    if proposals_config.kind == "none" or not any(arm.role == "axis" for arm in arms):
        return tuple(arms)
    policy, past = settings.policy_of(chosen), past_of(Log(folder.campaign.log).records(), folder.name)
    facts = briefing.request_of(
        folder.number, sum(arm.role == "axis" for arm in arms), past.rounds, policy, open_values(chosen, constitution),
        chosen.tasks.families, constitution, past.external, past.ladder,
    )  # fmt: skip
    request, ask = proposer(proposals_config, facts)
    kind, mode = proposals_config.kind, proposals_config.mode
    proposed = propose.propose(folder, kind, mode, request, ask, policy, constitution, fits_of(chosen))
    return proposals.merge(arms, proposed.verdicts, mode, policy.standing)


@dataclass(frozen=True)
class Past:
    """The rounds before this one: planned arms and evidence as JSON, oldest first, and the newest decision's board state and ladder."""

    rounds: Sequence[tuple[Sequence[Arm], Mapping[str, Any]]]
    external: str = ""
    ladder: str = ""


def past_of(records: Sequence[Mapping[str, Any]], round_name: str) -> Past:
    """Read the rounds before `round_name` from the log alone, so that an audit can build the same request.

    Lifts are computed again from the outcomes; the states are those of each round's newest decision.
    """
    known, rounds = history.read_history(records), []
    for name in sorted(name for name in known.plans if "r0000" < name < round_name):
        played, arms = known.played(name), known.plans[name].arms
        round_evidence = evidence.of_one_round(name, played.reference, played.outcomes, arms)
        rounds.append((arms, {**canonical.plain(round_evidence.to_json()), **known.decisions.get(name, {})}))
    newest = rounds[-1][1] if rounds else {}
    return Past(rounds, newest.get("external", ""), newest.get("ladder", ""))


def proposer(config: Proposals, facts: Mapping[str, Any]) -> tuple[bytes, propose.Ask]:
    """Return the exact bytes of the request, and the function that sends them. Raises ConfigError as `endpoint_of`."""
    user_message = canonical.encoded(facts)
    if config.kind == "optuna":
        return user_message, lambda request: optuna_sampler.suggest(request, config.seed)
    endpoint = endpoint_of(config)
    request = chat.body(
        endpoint, briefing.INSTRUCTIONS, user_message.decode(), "proposals", proposal_gate.SCHEMA, config.seed
    )
    return request, lambda content: post_chat(endpoint, content)


def endpoint_of(config: Proposals) -> Endpoint:
    """Return the configured endpoint. Raises ConfigError as `Endpoint.check_settings`."""
    endpoint = Endpoint(
        config.url, config.model, chat.USE, config.timeout_seconds, config.api_key_env, config.api_key_file,
        tuple(config.leave_out), dict(config.add),
    )  # fmt: skip
    endpoint.check_settings()
    return endpoint


def open_values(chosen: settings.Settings, constitution: Constitution) -> dict[str, str]:
    """Return this recipe's value of every open key that it has."""
    values = {}
    for key in constitution.articles["2"]["keys"]:
        try:
            values[key] = settings.value_of(chosen, key)
        except ConfigError:
            continue  # a key of another method, or the share of a family that this campaign does not have
    return values


def fits_of(chosen: settings.Settings) -> proposal_gate.Fits:
    """Return a function that says why an arm's settings do not make a valid configuration, "" where they do."""

    def fits(arm: tuple[Setting, ...]) -> str:
        try:
            settings.with_overrides(chosen, arm)
        except ConfigError as error:
            return str(error)
        return ""

    return fits
