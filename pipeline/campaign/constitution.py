"""The constitution: the numbered rules that a campaign cannot change, and the checks that refuse what breaks them.

`constitution/constitution.yaml` holds the articles; `constitution/DIGEST` and every campaign hold its sha256. `facts.load_constitution`
reads the file from beside this package (the checkout at `init`, the campaign's frozen code afterwards) and never from a path that a
configuration or the environment could name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from pipeline.campaign.errors import Refused
from pipeline.campaign.layout import CODE_ROOT
from pipeline.campaign.records import Setting

HERE = CODE_ROOT / "constitution"
"""The only folder that a constitution is read from."""
_NUMBER = {"decimal": re.compile(r"-?\d{1,12}(\.\d{1,12})?"), "integer": re.compile(r"-?\d{1,12}")}


@dataclass(frozen=True)
class Constitution:
    """The articles of one file: `articles` by number as text, such as "4", and the file's sha256 as hex."""

    digest: str
    articles: dict[str, dict[str, Any]]

    @property
    def quorum(self) -> int:
        """A round with fewer scored arms decides nothing (article 3)."""
        return int(self.articles["3"]["scored_arms"])

    @property
    def num_rounds(self) -> int:
        """The most rounds that a campaign may have (article 4)."""
        return int(self.articles["4"]["rounds"])

    @property
    def arms_per_round(self) -> int:
        """The most arms that a round may have (article 4)."""
        return int(self.articles["4"]["arms_per_round"])

    @property
    def first_round_replicates(self) -> int:
        """Repeats of the reference recipe in r0001 beside the anchor (article 5)."""
        return int(self.articles["5"]["replicates_in_first_round"])

    @property
    def z(self) -> Decimal:
        """An axis arm is set aside if its fresh lift is this many standard errors below its baseline's (article 7)."""
        return Decimal(self.articles["7"]["z"])

    def claim_level(self, num_rounds: int) -> Fraction:
        """The level that the claims of a campaign of so many rounds share (article 7)."""
        levels = {int(rounds): Fraction(level) for rounds, level in self.articles["7"]["claim_levels"].items()}
        return levels[max((rounds for rounds in levels if rounds <= num_rounds), default=min(levels))]

    @property
    def final_round_level(self) -> Fraction:
        """The level of the claim in a campaign whose last round confirms, and that tests in no other round (article 7)."""
        return Fraction(self.articles["7"]["final_round_level"])

    @property
    def worse_level(self) -> Fraction:
        """The share of campaigns in which something may falsely be shown to be worse (article 7)."""
        return Fraction(self.articles["7"]["worse_level"])

    @property
    def crash_allowance(self) -> Fraction:
        """A run may lose this much by chance, as a difference of accuracies, before its setting is shown to be worse (article 7)."""
        return Fraction(self.articles["7"]["crash_allowance"])

    @property
    def promotion_margin(self) -> Decimal:
        """An arm is kept only if its value exceeds its baseline's by more than this (article 7)."""
        return Decimal(self.articles["7"]["promotion_margin"])

    @property
    def plateau_looks(self) -> int:
        """An axis that gains nothing in this many looks in a row retires (article 11)."""
        return int(self.articles["11"]["plateau_looks"])

    @property
    def least_axes(self) -> int:
        """No axis retires while only this many are left (article 11)."""
        return int(self.articles["11"]["least_axes"])

    @property
    def most_replicates(self) -> int:
        """The most repeats of the standing recipe that a decision may buy for a round (article 11)."""
        return int(self.articles["11"]["most_replicates"])

    @property
    def most_contrasts(self) -> int:
        """The most contrasts in a round (article 11)."""
        return int(self.articles["11"]["most_contrasts"])

    @property
    def ladder_step(self) -> Decimal:
        """A board score is told only when it beats the last one told by this much (article 11)."""
        return Decimal(self.articles["11"]["ladder_step"])

    @property
    def open_keys(self) -> frozenset[str]:
        """The configuration keys that may change between rounds (article 2)."""
        return frozenset(self.articles["2"]["keys"])

    @property
    def open_paths(self) -> tuple[str, ...]:
        """Globs of the paths of its fork that an agent may edit (article 16)."""
        return tuple(self.articles["16"]["open_paths"])

    def check_agent(self, budget: Mapping[str, float]) -> None:
        """Check what an agent may spend, by the names of `worker.budget`. Raises Refused by article 16 for the first that is too much."""
        for name, wanted in budget.items():
            most = self.articles["16"].get(name)
            if most is not None and wanted > most:
                raise Refused(
                    "16",
                    "agent_budget",
                    f"worker.budget.{name} = {wanted} is more than the {most} that an agent may have",
                    f"Valid: 1 to {most}",
                )

    def is_fenced(self, model: str) -> bool:
        """Whether article 13 forbids claims of capability from results with this model."""
        return model not in self.articles["13"]["models_with_a_human_baseline"]

    def check_settings(self, overrides: Iterable[Setting]) -> None:
        """Check overrides against article 2. Raises Refused for the first whose key is closed or whose value is out of range."""
        allowed = self.articles["2"]["keys"]
        for key, value in overrides:
            if key not in allowed:
                raise Refused(
                    "2", "closed_key", f"{key!r} may not change between rounds", f"Open keys: {', '.join(allowed)}"
                )
            if not isinstance(value, str):
                raise Refused(
                    "2", "wrong_type", f"{key} = {value!r} is a {type(value).__name__}", "Write the value as a string"
                )
            rule = allowed[key]
            if rule["type"] == "choice":
                if value not in rule["choices"]:
                    raise Refused(
                        "2", "not_a_choice", f"{key} = {value[:80]!r}", f"Valid: {', '.join(rule['choices'])}"
                    )
                continue
            if not _is_number(rule["type"], value):
                raise Refused(
                    "2",
                    "not_a_number",
                    f"{key} = {value[:80]!r}",
                    f"Valid: {rule['type']} {rule['low']} to {rule['high']}",
                )
            if not Decimal(rule["low"]) <= Decimal(value) <= Decimal(rule["high"]):
                raise Refused("2", "out_of_range", f"{key} = {value}", f"Valid: {rule['low']} to {rule['high']}")

    def check_coverage(self, report: Mapping[str, Any], num_nodes: int) -> None:
        """Check the probe's report of an arm of `num_nodes` nodes. Raises Refused by article 6 where a check is absent or failed."""
        article = self.articles["6"]
        needed = [*article["checks"], *(article["checks_on_one_node"] if num_nodes == 1 else [])]
        missing = [name for name in needed if name not in report or report[name]["reached"]]
        if missing:
            raise Refused(
                "6",
                "coverage",
                f"the probe lacks {', '.join(missing)}",
                "`python -m pipeline doctor` shows what a node has",
            )

    def check_round(self, number: int, frozen_rounds: int) -> None:
        """Check a round's number. Raises Refused by article 4 where it is beyond the rounds that the campaign froze (policy.rounds)."""
        if number > frozen_rounds:
            raise Refused(
                "4",
                "rounds_spent",
                f"round {number} is beyond the campaign's {frozen_rounds} rounds, over which its error rates are spent",
                f"Start a new campaign; policy.rounds may be up to {self.num_rounds}",
            )

    def check_spending(
        self,
        tokens_per_arm: int,
        gpu_hours_per_arm: Fraction,
        num_arms: int,
        gpu_hours_spent: Fraction,
        gpu_hours_beside: Fraction = Fraction(0),
    ) -> None:
        """Check what a round could cost at most, its time limits used up. Raises Refused by article 4 for the first budget that it exceeds.

        tokens_per_arm: optimizer tokens. gpu_hours_spent: GPU-hours that the campaign's earlier rounds may have used. gpu_hours_beside: of
        the round's server of its agents' model, which is no arm's.
        """
        article = self.articles["4"]
        round_hours = num_arms * gpu_hours_per_arm + gpu_hours_beside
        for code, what, wanted, most in (
            ("arms", "arms", num_arms, article["arms_per_round"]),
            ("optimizer_tokens", "optimizer tokens an arm", tokens_per_arm, article["optimizer_tokens_per_arm"]),
            ("gpu_hours_per_arm", "GPU-hours an arm", gpu_hours_per_arm, article["gpu_hours_per_arm"]),
            ("gpu_hours_per_round", "GPU-hours a round", round_hours, article["gpu_hours_per_round"]),
            ("gpu_hours", "GPU-hours of the campaign", gpu_hours_spent + round_hours, article["gpu_hours"]),
        ):
            if wanted > most:
                raise Refused(
                    "4", code, f"{float(wanted):g} {what} are more than the {most} that are budgeted",
                    "Use fewer steps, smaller batches, or a lower cluster.time_limit_minutes",
                )  # fmt: skip


def _is_number(kind: str, value: str) -> bool:
    return value.isascii() and bool(_NUMBER[kind].fullmatch(value))
