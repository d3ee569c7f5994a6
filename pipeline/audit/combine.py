"""Combine the evidence of several campaigns: do gains that dev and fresh agree on arrive on the external target?

    bundles -> one constitution, none twice, no seed shared -> audit of each -> E of the board test from each sealed log -> their product

E is an e-value: where all gains arrive as the healthy model of the board test says, its mean is at most 1, whenever a campaign is looked
at. The model estimates its noise, so in small designs the mean is larger; E is divided by the largest that simulations gave for the
campaign's design (`critical_values.e_divisor`). The product of the e-values of independent campaigns is an e-value again, so it exceeds
1/alpha with probability alpha at most (Shafer and Vovk 2019; Vovk and Wang 2021). The mean of e-values is one whatever the campaigns
share. docs/evidence.md has the rates that simulations gave.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.audit import bundle, chain, check_outcomes, examine
from pipeline.audit.findings import Report
from pipeline.campaign import keys, other_rules
from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, WorkFailed
from pipeline.campaign.heads import Anchor
from pipeline.decision.derive import Derived
from pipeline.stats import critical_values
from pipeline.stats.decimal_math import decimal_of, digits, exactly
from pipeline.stats.design import Design

ALPHA = Fraction(1, 20)
"""The most often that "not every campaign's gains arrive" may be said although they all do. It is fixed, so that nobody can choose it later."""
MOST, MOST_OF_ONE_TARGET = 10, 5
"""Up to so many campaigns, and so many with one kind of target, the product was above 1/alpha in at most alpha of the simulations."""


@dataclass(frozen=True)
class CampaignEvidence:
    """E of one campaign: `e_value` is the board test's `board_e` over `divisor`, or 1.

    given: its folder or bundle as a person typed it. round: the newest decided round under a signed head. num_rounds: how many the campaign
    may have. target: the kind of its external target. num_scores: the arms with a board score that E rests on. note: what E leaves out, or
    why it is 1; empty if there is nothing to say.
    """

    given: str
    campaign: str
    round: str
    num_rounds: int
    target: str
    num_scores: int
    board_e: Decimal
    divisor: Decimal
    e_value: Decimal
    note: str

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self), "board_e": digits(self.board_e), "divisor": str(self.divisor), "e_value": digits(self.e_value),
        }  # fmt: skip


@dataclass(frozen=True)
class Combined:
    """What campaigns say together. `shared` has a sentence for each thing that they may have in common."""

    campaigns: tuple[CampaignEvidence, ...]
    constitution: str
    shared: tuple[str, ...]

    @property
    def threshold(self) -> Decimal:
        return decimal_of(1 / ALPHA)

    @property
    def product(self) -> Decimal:
        """The combined e-value of campaigns that share nothing."""
        with exactly():
            result = Decimal(1)
            for each in self.campaigns:
                result *= each.e_value
            return result

    @property
    def mean(self) -> Decimal:
        """An e-value even where the campaigns share something."""
        with exactly():
            return sum((each.e_value for each in self.campaigns), Decimal(0)) / len(self.campaigns)

    @property
    def decides(self) -> str:
        """Which of the two decides: "product" or, where more campaigns have a target of one kind than were simulated, "mean"."""
        by_target = Counter(each.target for each in self.campaigns if each.target != "none")
        few = len(self.campaigns) <= MOST and max(by_target.values(), default=0) <= MOST_OF_ONE_TARGET
        return "product" if few else "mean"

    @property
    def is_said(self) -> bool:
        """Whether "in at least one of these campaigns gains of dev and fresh did not arrive on the target" is said."""
        return (self.product if self.decides == "product" else self.mean) > self.threshold

    def to_json(self) -> dict[str, Any]:
        return {
            "constitution": self.constitution, "campaigns": [each.to_json() for each in self.campaigns], "product": digits(self.product),
            "mean": digits(self.mean), "alpha": str(ALPHA), "threshold": format(self.threshold, "f"), "decides": self.decides, "said": self.is_said,
            "shared": list(self.shared), "does_not_say": list(DOES_NOT_SAY),
        }  # fmt: skip


DOES_NOT_SAY = (
    "It does not say in which campaign, and does not say that a particular one is wrong: it speaks of all of them together.",
    "It does not say which family, and not why: learned items, a generator that drifted and a target of another kind look alike.",
    "Below the threshold it does not say that all is well: too few scores, or too small a fall, leave E near 1 or below it.",
    "It says nothing about campaigns that were left out. Choose which to combine before you know their E, or it means nothing.",
    "It rests on the targets' printed scores, which are their word, and on logs that their owners could write anew if no anchor was kept.",
)


def combine(paths: Sequence[Path], anchors: Sequence[Anchor] = ()) -> Combined:
    """Audit campaigns and combine their E. paths: their folders or bundles. anchors: log anchors that were kept elsewhere, of any of them.

    Raises ConfigError without a path, NotFound for a path without a campaign, OtherRules for campaigns under another constitution than this
    code's, ConfigError for campaigns of several constitutions or that are not independent, IntegrityError for one that the audit finds
    something in, and WorkFailed for one of which no decided round is under a signed head.
    """
    if not paths:
        raise ConfigError("no campaign was given", "Give the folder or the bundle of at least one campaign")
    words = ("evidence", "combine", *map(str, paths))
    with ExitStack() as stack:
        folders = {str(path): stack.enter_context(bundle.opened(path)) for path in paths}
        if twice := [path for path, count in Counter(map(str, paths)).items() if count > 1]:
            raise ConfigError(f"{twice[0]} was given twice", "Valid: one bundle of each campaign")
        facts = {given: named_facts(given, folder) for given, folder in folders.items()}
        check_one_constitution(facts)
        known: dict[str, tuple[chain.Chain, dict[tuple[str, str], Derived]]] = {}
        for given, folder in folders.items():
            known[given] = audited(Path(given), folder, anchors, words)
        links = {given: of for given, (of, _) in known.items()}
        check_independent(links)
        if strange := sorted({each.campaign for each in anchors} - {of.campaign for of in links.values()}):
            raise ConfigError(
                f"an anchor is of {strange[0]}, which is none of these campaigns",
                f"Valid: anchors of {', '.join(of.campaign for of in links.values())}",
            )
        found = tuple(evidence_of(given, of, derived) for given, (of, derived) in known.items())
        constitution = next(iter(facts.values()))["constitution_digest"]
        return Combined(found, constitution, (*shared_by(found), *trained_alike(links)))


def named_facts(given: str, folder: Path) -> Mapping[str, Any]:
    """What a campaign froze, before its log is audited. Raises NotFound without a log, IntegrityError for one that names no rules."""
    if not (folder / "log.jsonl").is_file():
        raise NotFound(f"{given} holds no log.jsonl", "Give the folder of a campaign, or a bundle that --export wrote")
    facts = other_rules.facts_in(folder / "log.jsonl")
    if facts is None or not other_rules.is_named(facts):
        raise IntegrityError(
            f"the log of {given} does not begin with what a campaign froze",
            f"`python -m pipeline audit {given}` says more; leave it out, or get an undamaged bundle",
        )
    return facts


def check_one_constitution(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError for campaigns of several constitutions: their E answers different questions."""
    digests = {given: str(of["constitution_digest"]) for given, of in facts.items()}
    if len(set(digests.values())) > 1:
        listed = ", ".join(f"{given} has {digest[:16]}" for given, digest in digests.items())
        raise ConfigError(
            f"the campaigns have different constitutions: {listed}",
            "Valid: campaigns of one constitution. Combine those of each apart, with the code of each",
        )


def audited(
    given: Path, folder: Path, anchors: Sequence[Anchor], words: Sequence[str]
) -> tuple[chain.Chain, dict[tuple[str, str], Derived]]:
    """(the sealed log, what was derived from it) of a campaign in which the audit finds nothing. Raises as `combine`."""
    derived: dict[tuple[str, str], Derived] = {}
    links = chain.read_chain((folder / "log.jsonl").read_bytes(), Report())
    own = [anchor for anchor in anchors if anchor.campaign == links.campaign]
    options = [word for anchor in own for word in ("--anchor", str(anchor))]
    report = examine.examine(folder, own, derived, given=given, words=words)
    if not report.ok:
        more = f" and {len(report.findings) - 1} more" if len(report.findings) > 1 else ""
        first = str(report.findings[0]).encode("unicode_escape").decode()  # words of a log that nobody trusts
        raise IntegrityError(
            f"the audit of {given} has a finding ({first}){more}",
            f"`{shlex.join(['python', '-m', 'pipeline', 'audit', str(given), *options])}` lists all; leave the campaign out, or get an undamaged "
            f"bundle{' or the anchor as it was printed' if own else ''}",
        )
    return links, derived


def check_independent(links: Mapping[str, chain.Chain]) -> None:
    """Raise ConfigError for two paths of one campaign, or for campaigns that share a key or a seed, and so perhaps items."""
    for (one, left), (other, right) in combinations(links.items(), 2):
        both = f"{one} and {other}"
        if left.campaign == right.campaign or left.hashes[0] == right.hashes[0]:
            raise ConfigError(f"{both} are one campaign, {left.campaign}", "Valid: one bundle of each campaign")
        seeds = sorted({*seeds_shared(left, right), *seeds_shared(right, left)})
        if seeds or left.facts["public_key"] == right.facts["public_key"]:
            what = f"the seed of {', '.join(seeds)}" if seeds else "their signing key"
            raise ConfigError(
                f"{both} share {what}, so they are not independent and their product means nothing",
                "Valid: campaigns that were begun apart; leave one of the two out",
            )


def seeds_shared(left: chain.Chain, right: chain.Chain) -> set[str]:
    """Names of the seeds of `right` that `left` has, too: by equal commitments, and by what `left` has revealed."""
    theirs = right.facts["commitments"]
    equal = {name for name, digest in left.facts["commitments"].items() if theirs.get(name) == digest}
    revealed = [record["seed"] for record in left.records if record["event"] == "reveal"]
    return equal | {
        name for name, digest in theirs.items() for seed in revealed if keys.commitment(name, seed) == digest
    }


def evidence_of(given: str, links: chain.Chain, derived: dict[tuple[str, str], Derived]) -> CampaignEvidence:
    """E of an audited campaign, at its newest decided round under a signed head. Raises WorkFailed without such a round."""
    facts = links.facts
    closes = [record["seq"] for record in links.records if record["event"] == "close"]
    decisions = [record for record in links.records[: max(closes, default=0)] if record["event"] == "decision"]
    if not decisions:
        raise WorkFailed(
            f"no decided round of {given} is under a signed head of its log",
            "Combine it once a round is closed; `python -m pipeline status` shows how far it is",
        )
    newest = max(decisions, key=lambda record: (record["round"], record["seq"]))
    name, num_rounds = newest["round"], facts["design"]["rounds"]
    evidence = check_outcomes.Deriver(links.records, links.hashes, derived).at(newest["seq"], name).evidence
    look = evidence.look
    scored = sum(arm[:1] == "a" for scores in evidence.board.values() for arm in scores)
    target = str(facts.get("external", "none"))
    board_e = look.verdict.e_value if look else Decimal(1)
    try:
        divisor = critical_values.e_divisor(Design(**facts["design"]))
        known = True
    except NotFound:
        divisor, known = Decimal(1), False
    if not facts["design"]["board_rows"] or target == "none":
        note = "it has no external target, so E is 1"
    elif look is None:
        note = f"{name} could not be tested, so E is 1"
    elif not scored:
        note = "its target has given no score yet, so E is 1"
    elif not known:
        note = (
            f"no simulation says how large E is for its design where nothing is wrong, so its {board_e:.4g} counts as 1; `python -m pipeline "
            f"evidence e-values --write --design {','.join(f'{key}={value}' for key, value in facts['design'].items())}` simulates it"
        )
    elif int(name[1:]) < num_rounds:
        note = f"{int(name[1:])} of {num_rounds} rounds; E holds whenever one looks, and more rounds may change it"
    else:
        note = ""
    counts = bool(look and scored and known and target != "none")
    with exactly():
        e_value = board_e / divisor if counts else Decimal(1)
    return CampaignEvidence(given, links.campaign, name, num_rounds, target, scored, board_e, divisor, e_value, note)


def shared_by(campaigns: Sequence[CampaignEvidence]) -> tuple[str, ...]:
    """What the logs cannot show that campaigns share, in sentences."""
    told = []
    for target in sorted({each.target for each in campaigns} - {"none"}):
        names = [each.given for each in campaigns if each.target == target]
        board = (
            "each has hidden items of its own"
            if target == "local"
            else "if it is one board, they share its hidden items"
        )
        if len(names) > 1:
            told.append(
                f"{', '.join(names)} have targets of one kind, {target}: {board}, and what makes such a target differ from dev and fresh "
                f"is common to them. Simulations allow the product of {MOST_OF_ONE_TARGET} (docs/evidence.md); the mean needs none."
            )
    return tuple(told)


def trained_alike(links: Mapping[str, chain.Chain]) -> tuple[str, ...]:
    """A sentence for each two campaigns that trained with one seed in one image: there, arms of one recipe are one training run."""
    trained = {
        given: (of.facts["image"]["tree_digest"], next(r["seed"] for r in of.records if r["event"] == "basis"))
        for given, of in links.items()
    }
    return tuple(
        f"{one} and {other} trained with the same image and seed={trained[one][1]}, so arms of one recipe are one training run, whose "
        "luck both have. Begin each campaign with a seed of its own (`seed=`)."
        for one, other in combinations(trained, 2)
        if trained[one] == trained[other]
    )
