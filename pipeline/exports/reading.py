"""Read a campaign for an export: its log, and the files that the log names by digest. Nothing is written and no secret is read.

A round counts as decided once the log has its decision and its `close` record. Only then was the seed of its fresh items revealed, so
outcomes and scores of other rounds are left out. `vault/` is never opened. Prompts, completions and answers are never read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.campaign import canonical, facts, files
from pipeline.campaign.errors import IntegrityError, NotFound
from pipeline.campaign.heads import Anchor
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.decision.history import History, read_history

FIRST = "r0000"  # holds the reference and the base, which are judged on dev items alone


@dataclass(frozen=True)
class Reading:
    """A campaign as one log head has it. `anchor` names that head; `only` is the one round that was asked for, or None for all."""

    campaign: Campaign
    facts: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    anchor: Anchor
    history: History
    only: str | None = None

    @property
    def name(self) -> str:
        """The campaign's name with its random part, as the log has it."""
        return self.anchor.campaign

    @cached_property
    def decided(self) -> tuple[str, ...]:
        """The rounds whose decision is final enough to be shown: decided and closed, in order."""
        closed = {record["round"] for record in self.records if record["event"] == "close"}
        return tuple(name for name in sorted(self.history.decisions) if name in closed and self._is_wanted(name))

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        """The planned rounds that are asked for and have no final decision, in order; r0000 is none of them."""
        planned = [name for name in sorted(self.history.plans) if name != FIRST and self._is_wanted(name)]
        return tuple(name for name in planned if name not in self.decided)

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """The rounds whose outcomes may be exported: the decided ones, and before them r0000, with which their arms are compared."""
        return (FIRST, *self.decided) if self.decided else ()

    @cached_property
    def known_digests(self) -> frozenset[str]:
        """The sha256 of every result file that the log names."""
        found = {outcome.result_digest for outcome in self.history.outcomes.values()}
        for record in self.records:
            if record["event"] == "attempt":
                found.update(record["files"].values())
        return frozenset(found)

    def round(self, name: str) -> Round:
        return self.campaign.round(name)

    def evidence(self, name: str) -> dict[str, Any]:
        """The evidence of a decided round. Raises IntegrityError where the file is missing or has another digest than the log says."""
        path = self.round(name).evidence
        logged = [
            record["sha256"] for record in self.records if (record["event"], record.get("round")) == ("evidence", name)
        ]
        content = files.read_bytes(path) if path.exists() else b""
        if not logged or canonical.sha256(content) != logged[-1]:
            raise IntegrityError(
                f"{path} is missing or is not the evidence that the log names", "Restore it from a copy"
            )
        found: dict[str, Any] = json.loads(content)
        return found

    def config(self, name: str) -> dict[str, Any]:
        """The configuration of a planned round. Raises IntegrityError where it is not the one that the plan names."""
        path = self.round(name).config
        content = files.read_bytes(path) if path.exists() else b""
        if canonical.sha256(content) != self.history.plans[name].config_digest:
            raise IntegrityError(f"{path} is missing or is not the configuration of the plan", "Restore it from a copy")
        found: dict[str, Any] = facts.parse_yaml(content)
        return found

    def attempts(self, name: str, arm: str) -> list[Mapping[str, Any]]:
        """The newest record of each ended attempt at an arm, in order of their numbers."""
        found = {
            record["attempt"]: record
            for record in self.records
            if record["event"] == "attempt" and (record["round"], record["arm"]) == (name, arm)
        }
        return [found[number] for number in sorted(found)]

    def _is_wanted(self, name: str) -> bool:
        return self.only in (None, name)


def read_campaign(campaign: Campaign, only: str | None = None) -> Reading:
    """Read a campaign as its log has it now. only: the one round that is asked for.

    Raises NotFound where there is no such campaign or round, IntegrityError where log and `campaign.yaml` do not agree, OtherVersion
    where another version wrote the log.
    """
    frozen = facts.facts_of(campaign)
    log = Log(campaign.log)
    records = log.records()
    history = read_history(records)
    if only is not None and only not in history.plans:
        raise NotFound(f"the log has no plan of round {only}", f"Planned: {', '.join(sorted(history.plans))}")
    return Reading(campaign, frozen, tuple(records), log.anchor(len(records) - 1), history, only)
