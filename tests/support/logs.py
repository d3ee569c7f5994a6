"""Campaigns as sealed logs alone: simulated outcomes with real plans, decisions and policies, without files or training."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.campaign import canonical, facts
from pipeline.campaign.records import Arm, Outcome, Plan, Policy
from pipeline.config import settings
from pipeline.decision import derive, history, plan
from pipeline.stats import critical_values
from pipeline.stats.design import Design
from tests.support.paths import GOLDEN

RULES = facts.load_constitution()
LEVELS = {
    "bit_manipulation": 0.3,
    "equation": 0.6,
    "gravity": 0.75,
    "roman": 0.85,
    "text_cipher": 0.92,
    "unit_conversion": 0.95,
}


@dataclass(frozen=True)
class Truth:
    """Of one arm, by family: `gain` on fresh items and the board, `learned` on dev alone, `lost` of the gain on the board; `board` in all."""

    gain: Mapping[str, float] = field(default_factory=dict)
    learned: Mapping[str, float] = field(default_factory=dict)
    lost: Mapping[str, float] = field(default_factory=dict)
    board: float = 0.0
    missing: str = ""  # exit class of an arm without a score


World = Callable[[str, Arm], Truth]


@dataclass
class LogCampaign:
    """Grows record by record; `play` adds a round and what was derived for it."""

    world: World
    design: Design = Design(rounds=8, submissions=2)
    levels: Mapping[str, float] = field(default_factory=lambda: LEVELS)
    records: list[dict[str, Any]] = field(default_factory=list)
    derived: dict[str, derive.Derived] = field(default_factory=dict)
    policy: Policy = field(
        default_factory=lambda: settings.policy_of(settings.compose(["experiment=nano_30b", "policy/axes=tiny"]))
    )
    reference: Mapping[str, str] = field(default_factory=dict)
    choice: str = "value"  # what the campaign keeps: policy.choice

    def __post_init__(self) -> None:
        chosen = settings.compose(["experiment=nano_30b", "policy/axes=tiny"])
        mixes = [f"recipe.mix.{family}" for family in chosen.tasks.families]
        keys = [axis.key for axis in self.policy.axes] + mixes
        self.reference = {key: settings.value_of(chosen, key) for key in keys}
        try:
            critical = critical_values.read_critical_values(self.design)["critical"]
        except Exception:
            critical = critical_values.bounds(self.design)
        self.add("init", facts={
            "constitution_digest": RULES.digest, "articles": RULES.articles, "design": self.design.to_json(),
            "choice": self.choice, "confirmation": "running", "critical": critical, "families": sorted(self.levels),
        })  # fmt: skip

    def add(self, event: str, **payload: Any) -> None:
        self.records.append(json.loads(canonical.encoded({"event": event, **payload})))

    def play(self) -> derive.Derived:
        """One round: plan, outcomes, submissions, scores, decision; the next one begins with its policy."""
        number = len(self.derived) + 1
        name = f"r{number:04d}"
        arms = plan.make_arms(self.policy, number, 1, 1 if number == 1 else 0, self.reference)
        frozen = Plan("logged", name, "i", RULES.digest, "d", "e", self.policy, arms)
        self.add("plan", round=name, plan_digest=canonical.digest(frozen.to_json()), plan=frozen.to_json())
        self.add(
            "outcome", round=name, arm="reference", outcome=asdict(self.outcome(name, Arm(0, "reference", 0), Truth()))
        )
        for arm in arms:
            self.add(
                "outcome", round=name, arm=arm.name, outcome=asdict(self.outcome(name, arm, self.world(name, arm)))
            )
        self.submit(name, arms)
        derived = derive.derive(self.records, name)
        self.add("decision", round=name, number=0, decision=asdict(derived.decision))
        self.derived[name] = derived
        self.policy = derived.decision.policy
        return derived

    def submit(self, name: str, arms: tuple[Arm, ...]) -> None:
        if self.design.board_rows and name == "r0001":
            for _ in range(2):
                self.score(name, "reference", sum(self.levels.values()) / len(self.levels))
        truths = {arm.name: self.world(name, arm) for arm in arms}
        for arm in derive.choose_submissions(history.read_history(self.records), name):
            truth = truths[arm]
            kept = [self.levels[f] + truth.gain.get(f, 0) - truth.lost.get(f, 0) for f in self.levels]
            self.score(name, arm, sum(kept) / len(kept) + truth.board)

    def score(self, name: str, arm: str, value: float) -> None:
        number = sum(record["event"] == "submission" for record in self.records) + 1
        self.add(
            "submission", number=number, round=name, arm=arm, purpose="reference" if arm == "reference" else "slot",
            adapter_digest="", target="local", day="2026-11-24",
        )  # fmt: skip
        self.add("board_score", number=number, score=f"{value:.2f}")

    def outcome(self, name: str, arm: Arm, truth: Truth) -> Outcome:
        if truth.missing:
            return Outcome(arm.name, arm.role, "failed", truth.missing)
        repaired = dict(self.policy.repaired)
        marks = {
            "dev": {f: self.marks(f"dev{repaired.get(f, '')}", f, name, arm, truth.gain.get(f, 0) + truth.learned.get(f, 0)) for f in self.levels},
            "fresh": {f: self.marks(name, f, name, arm, truth.gain.get(f, 0)) for f in self.levels},
        }  # fmt: skip
        return Outcome(
            "reference" if arm.role == "reference" else arm.name, arm.role, "completed", "completed", "", "", marks
        )

    def marks(self, items: str, family: str, name: str, arm: Arm, gain: float) -> str:
        """Items are easy or hard for every run alike, four fifths; what is left is each run's own luck."""
        own_name = (
            "reference" if arm.role == "reference" and items.startswith("dev") else f"{name}/{arm.name}/{arm.role}"
        )
        shared, own = random.Random(f"{items}/{family}"), random.Random(f"{own_name}/{items}/{family}")
        size = self.design.dev_items if items.startswith("dev") else self.design.fresh_items
        level = min(0.99, self.levels[family] + gain)
        marks = []
        for _ in range(size):
            item, luck, which = shared.random(), own.random(), own.random()
            marks.append("1" if (item if which < 0.8 else luck) < level else "0")
        return "".join(marks)


HARD = "bit_manipulation"


def walk(name: str, arm: Arm) -> Truth:
    """Gravity's and the equations' dev items are learned in round 2; what bit manipulation gains from then on never reaches the board.

    One axis ruins everything, and another one family.
    """
    number = int(name[1:])
    if arm.role == "anchor":
        return Truth()
    if number == 1 and arm.axis == "schedule":
        return Truth(missing="diverged")
    gain = {HARD: {1: 0.05, 2: 0.3, 3: 0.35}.get(number, 0.4), "equation": 0.2 if arm.axis == "lora_rank" else 0.02}
    gain["gravity"] = -0.3 if arm.axis == "lora_alpha" else 0.0
    if arm.axis == "clip_norm":
        gain = dict.fromkeys(LEVELS, -0.5)
    learned = {"gravity": 0.1, "equation": 0.05} if number == 2 else {}
    return Truth(gain, learned, {HARD: max(0.0, gain[HARD])} if number >= 2 else {})


def leaky(name: str, arm: Arm) -> Truth:
    """The board runs ahead of everything, and in round 2 one arm has learned the roman dev items beside a true gain."""
    number = int(name[1:])
    cheats = arm.axis == "clip_norm" and number == 2
    gain = {HARD: 0.02 * number, "equation": 0.25 if cheats else 0.0}
    return Truth(gain, {"roman": 0.12} if cheats else {}, board=0.05 * (number - 1))


SCRIPTS: Mapping[str, World] = {"walk": walk, "leaky": leaky}
SCRIPTED = Design(dev_items=1000, fresh_items=1000, submissions=2)


def scripted(script: str, num_rounds: int = 4) -> LogCampaign:
    campaign = LogCampaign(SCRIPTS[script], SCRIPTED)
    for _ in range(num_rounds):
        campaign.play()
    return campaign


def decisions_text(campaign: LogCampaign) -> str:
    """Every decision of a campaign, for a person who compares."""
    found = [json.loads(canonical.encoded(asdict(each.decision))) for each in campaign.derived.values()]
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":  # python -m tests.support.logs: write the golden files anew, then read what changed
    for script in SCRIPTS:
        (GOLDEN / f"decisions_{script}.json").write_text(decisions_text(scripted(script)))
