"""Run whole campaigns by the real code in simulated worlds: plan, evidence, tests, decision and next policy are those of a campaign.

Only training and the board are simulated (studies.nature). The policy `ours` keeps the records of the sealed log in memory, and
pipeline.decision.derive decides from them. The other policies are those of studies.comparators, in the same campaigns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import t as student

from pipeline.campaign import canonical, constitution, facts
from pipeline.campaign.records import Arm, Decision, Plan, Policy
from pipeline.claims.assess_claims import RUNNING
from pipeline.config import settings
from pipeline.decision import derive, evidence, history, plan, promotion
from pipeline.decision.evidence import Evidence
from pipeline.stats import critical_values
from pipeline.stats.design import Design
from studies import comparators
from studies.nature import Nature, PlayedRound
from studies.simulated import Floats, World

OURS = "ours"
POLICIES = (OURS, *comparators.COMPARATORS)


@dataclass(frozen=True)
class Start:
    """What every campaign begins with: the shipped axes, and the values of the reference recipe."""

    policy: Policy
    reference: Mapping[str, str]
    families: tuple[str, ...]
    rules: constitution.Constitution


@cache
def start() -> Start:
    """Return the start of the shipped 30B experiment under the shipped constitution, with the seven axes that the claims' twin knows."""
    chosen = settings.compose(["experiment=nano_30b", "policy/axes=tiny"])
    policy, rules = settings.policy_of(chosen), facts.load_constitution()
    keys = [axis.key for axis in policy.axes] + [f"recipe.mix.{family}" for family in chosen.tasks.families]
    values = {key: settings.value_of(chosen, key) for key in keys}
    return Start(policy, values, tuple(sorted(chosen.tasks.families)), rules)


@dataclass(frozen=True)
class Result:
    """Of one campaign: the true gain of the final adapter, its regret to the best arm of the same path (both in points), and how many axes
    were kept."""

    gain: float
    regret: float
    kept: int


def campaign(world: World, design: Design, policy_name: str, number: int, confirmation: str = RUNNING) -> Result:
    """Run one campaign of `design.rounds` rounds under one policy. number: of the campaign; all policies meet the same luck in it.

    confirmation: how the campaign confirms an improvement (`pipeline.claims.assess_claims.CONFIRMATIONS`).
    """
    begin = start()
    nature = Nature(world, design, number, begin.families[: design.families])
    player = (
        Ours(design, nature, confirmation)
        if policy_name == OURS
        else Other(comparators.COMPARATORS[policy_name], design, nature)
    )
    policy, kept = begin.policy, 0
    truths: dict[tuple[str, str], float] = {}
    for round_number in range(1, design.rounds + 1):
        nature.repair(dict(policy.repaired))
        replicates = begin.rules.first_round_replicates if round_number == 1 else 0
        is_last = round_number == design.rounds
        arms = plan.make_arms(policy, round_number, number, replicates, begin.reference, confirmation, is_last)
        played = nature.play(round_number, arms)
        truths |= {(f"r{round_number:04d}", arm): lift for arm, lift in played.truth.items()}
        before, policy = policy, player.take(f"r{round_number:04d}", policy, arms, played)
        kept += before.standing != policy.standing
    out = player.final()
    gain = truths[out] if out else 0.0
    return Result(100 * gain, 100 * (max(truths.values()) - gain), kept)


@dataclass
class Ours:
    """Our policy: the records of the sealed log, in memory, and the decisions that the real code derives from them."""

    design: Design
    nature: Nature
    confirmation: str = RUNNING
    records: list[dict[str, Any]] = field(default_factory=list)
    decision: Decision | None = None

    def __post_init__(self) -> None:
        rules = start().rules
        self._add("init", facts={
            "constitution_digest": rules.digest, "articles": rules.articles, "design": self.design.to_json(),
            "confirmation": self.confirmation, "choice": promotion.VALUE,
            "critical": critical_values.read_critical_values(self.design)["critical"], "families": list(self.nature.families),
        })  # fmt: skip

    def take(self, name: str, policy: Policy, arms: Sequence[Arm], played: PlayedRound) -> Policy:
        """Record a round and its submissions, decide it, and return the next policy."""
        frozen = Plan("simulated", name, "", start().rules.digest, "", "", policy, tuple(arms))
        self._add("plan", round=name, plan_digest="", plan=frozen.to_json())
        for outcome in (played.reference, *played.outcomes):
            self._add("outcome", round=name, arm=outcome.arm, outcome=asdict(outcome))
        if name == "r0001" and self.design.board_rows:
            for score in self.nature.reference_scores:
                self._submit(name, "reference", score)
        for arm in derive.choose_submissions(history.read_history(self.records), name):
            self._submit(name, arm, played.board[arm])
        self.decision = derive.derive(self.records, name).decision
        self._add("decision", round=name, number=0, decision=asdict(self.decision))
        return self.decision.policy

    def final(self) -> tuple[str, str] | None:
        """(round, arm) of the final adapter, None for the reference's."""
        return self.decision.winner if self.decision else None

    def _submit(self, name: str, arm: str, score: str) -> None:
        number = sum(record["event"] == "submission" for record in self.records) + 1
        purpose = "reference" if arm == "reference" else "slot"
        sent = {"adapter_digest": "", "target": "simulated", "day": "2026-11-24"}
        self._add("submission", number=number, round=name, arm=arm, purpose=purpose, **sent)
        self._add("board_score", number=number, score=score)

    def _add(self, event: str, **payload: Any) -> None:
        self.records.append(json.loads(canonical.encoded({"event": event, **payload})))


@dataclass
class Other:
    """A comparator and the evidence that it has seen so far."""

    comparator: comparators.Comparator
    design: Design
    nature: Nature
    rounds: list[comparators.SeenRound] = field(default_factory=list)
    board: dict[str, dict[str, str]] = field(default_factory=dict)

    def take(self, name: str, policy: Policy, arms: Sequence[Arm], played: PlayedRound) -> Policy:
        """Look at a round as the comparator does, and return the next policy."""
        by_name = {arm.name: arm for arm in arms}
        seen: Evidence = evidence.of_one_round(name, played.reference, played.outcomes, arms)
        if self.comparator.submits:
            scored = comparators.first_by_dev(seen, by_name, self.design.submissions)
            first = {f"reference-{n}": score for n, score in enumerate(self.nature.reference_scores, 1)}
            self.board[name] = {arm: played.board[arm] for arm in scored} | (first if name == "r0001" else {})
        seen = replace(seen, board={each: dict(scores) for each, scores in self.board.items()})
        self.rounds.append((seen, by_name))
        return comparators.following(policy, self.comparator.choose(seen, by_name), by_name)

    def final(self) -> tuple[str, str] | None:
        """(round, arm) of the final adapter, None for the reference's."""
        return self.comparator.final(self.rounds)


def measure(
    worlds: Mapping[str, World], design: Design, num: int, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each world and policy: means over `num` campaigns with 95 % intervals, and ours minus it, paired by campaign."""
    for name, world in worlds.items():
        results = {each: [campaign(world, design, each, number) for number in range(num)] for each in POLICIES}
        tell(name)
        ours = np.array([result.gain for result in results[OURS]])
        for policy_name, found in results.items():
            gains = np.array([result.gain for result in found])
            yield {
                "world": name,
                "policy": policy_name,
                "campaigns": num,
                "gain": mean(gains),
                "regret": mean(np.array([result.regret for result in found])),
                "kept": mean(np.array([float(result.kept) for result in found])),
                "ours_minus_it": mean(ours - gains),
            }


def mean(values: Floats) -> dict[str, float]:
    """The mean and its 95 % interval (Student's t)."""
    half = float(student.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / len(values) ** 0.5
    middle = float(values.mean())
    return {"mean": round(middle, 3), "low": round(middle - half, 3), "high": round(middle + half, 3)}


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a header, then a line for each world and policy."""

    def shown(value: Mapping[str, float]) -> str:
        return f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})"

    header = ["world", "policy", "true gain", "regret", "kept", "ours minus it"]
    return [header] + [
        [
            row["world"],
            row["policy"],
            shown(row["gain"]),
            shown(row["regret"]),
            f"{row['kept']['mean']:.1f}",
            "" if row["policy"] == OURS else shown(row["ours_minus_it"]),
        ]
        for row in rows
    ]
