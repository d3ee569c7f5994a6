"""From a configuration to what `proposals` needs: the request's bytes, whom to ask, and how a proposal is tried on.

none     nobody          llm     an endpoint that speaks OpenAI's /v1/chat/completions          optuna     a sampler in this process
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
from pipeline.config.schema import Proposals
from pipeline.decision import evidence, history, proposal_gate, proposals
from pipeline.external import briefing, chat, optuna_sampler, propose


def with_proposals(
    folder: Round, chosen: settings.Settings, arms: Sequence[Arm], constitution: Constitution
) -> tuple[Arm, ...]:
    """The deterministic arms of a round, or in mode `active` with what was accepted in their places.

    The caller holds the round, and has not planned it yet. Raises ConfigError for a proposer that cannot be asked as configured,
    IntegrityError and WorkFailed as proposals.propose.
    """
    asked = chosen.policy.proposals
    if asked.kind == "none":
        return tuple(arms)
    policy, past = settings.policy_of(chosen), past_of(Log(folder.campaign.log).records(), folder.name)
    facts = briefing.request_of(
        folder.number, sum(arm.role == "axis" for arm in arms), past.rounds, policy, open_values(chosen, constitution),
        chosen.tasks.families, constitution, past.external, past.ladder,
    )  # fmt: skip
    request, ask = proposer(asked, facts)
    proposed = propose.propose(folder, asked.kind, asked.mode, request, ask, policy, constitution, fits_of(chosen))
    return proposals.merge(arms, proposed.verdicts, asked.mode, policy.standing)


@dataclass(frozen=True)
class Past:
    """Of the rounds before this one: arms as planned and evidence as JSON, and what the newest decision says of the board."""

    rounds: Sequence[tuple[Sequence[Arm], Mapping[str, Any]]]
    external: str = ""
    ladder: str = ""


def past_of(records: Sequence[Mapping[str, Any]], round_name: str) -> Past:
    """From the log alone, so that an audit can make the same request again.

    Lifts are counted anew; the states are those that the newest decision left.
    """
    known, rounds = history.read_history(records), []
    for name in sorted(name for name in known.plans if "r0000" < name < round_name):
        played, arms = known.played(name), known.plans[name].arms
        seen = evidence.of_one_round(name, played.reference, played.outcomes, arms)
        rounds.append((arms, {**canonical.plain(seen.to_json()), **known.decisions.get(name, {})}))
    newest = rounds[-1][1] if rounds else {}
    return Past(rounds, newest.get("external", ""), newest.get("ladder", ""))


def proposer(asked: Proposals, facts: Mapping[str, Any]) -> tuple[bytes, propose.Ask]:
    """The request's exact bytes, and whom to send them to."""
    told = canonical.encoded(facts)
    if asked.kind == "optuna":
        return told, lambda request: optuna_sampler.suggest(request, asked.seed)
    endpoint = endpoint_of(asked)
    request = chat.body(endpoint, briefing.INSTRUCTIONS, told.decode(), "proposals", proposal_gate.SCHEMA)
    return request, lambda content: chat.post_chat(endpoint, content)


def endpoint_of(asked: Proposals) -> chat.Endpoint:
    """Raises ConfigError for an address that cannot be asked, or not safely."""
    endpoint = chat.Endpoint(
        asked.url, asked.model, asked.timeout_seconds, asked.api_key_env, asked.api_key_file, asked.seed
    )
    endpoint.check()
    return endpoint


def open_values(chosen: settings.Settings, constitution: Constitution) -> dict[str, str]:
    """Every open key that this configuration's recipe has, with its value."""
    found = {}
    for key in constitution.articles["2"]["keys"]:
        try:
            found[key] = settings.value_of(chosen, key)
        except ConfigError:
            continue  # a key of another method, or a share of a family that is not played
    return found


def fits_of(chosen: settings.Settings) -> proposal_gate.Fits:
    """Whether an arm's settings make a configuration, by its types and cross-rules."""

    def fits(arm: tuple[Setting, ...]) -> str:
        try:
            settings.with_overrides(chosen, arm)
        except ConfigError as error:
            return str(error)
        return ""

    return fits
