"""What a decided round says of its recipes, for programs: kept for now, claimed, set aside, shown to be worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from pipeline.campaign.records import Decision, Setting
from pipeline.claims.claim_test import Comparison
from pipeline.decision import derive, promotion
from pipeline.decision.history import read_history


def known_at_decision(records: Sequence[Mapping[str, Any]], round_name: str) -> Sequence[Mapping[str, Any]]:
    """The records before the last decision of a round: what was known then. All records where it has no decision."""
    decided = [
        n for n, record in enumerate(records) if (record["event"], record.get("round")) == ("decision", round_name)
    ]
    return records[: decided[-1]] if decided else records


def as_json(records: Sequence[Mapping[str, Any]], round_name: str) -> dict[str, Any]:
    """The statements of a round (docs/report.md lists them). Differences of accuracies are floats here, which decide nothing.

    Raises NotFound and IntegrityError as `derive.derive` does.
    """
    history = read_history(records)
    derived = derive.derive(known_at_decision(records, round_name), round_name)
    plan, decision, claims = history.plans[round_name], derived.decision, derived.evidence.claims
    kept = next((arm for arm in plan.arms if arm.name == decision.kept), None)
    why = why_nothing(decision)
    nothing = {"not_evaluated": why}
    return {
        "state": decision.state,
        "kept_for_now": _text(kept.overrides[-1]) if kept else None,
        "claimed": decision.claimed,
        "claimed_in": [name for name, each in sorted(history.decisions.items()) if each["claimed"]],
        "set_aside": [_text(each) for each in decision.policy.set_aside if each not in plan.policy.set_aside],
        "shown_worse": [_text(arm.overrides[-1]) for arm in plan.arms if not why and arm.name in claims.shown_worse],
        "improvement": nothing if why else _comparison(claims.improvement, claims.level),
        "worse_standing": nothing if why else _comparison(claims.worse_standing, claims.worse_level, -1),
        "choice": history.choice,
        "confirmation": history.confirmation,
        "rounds": history.num_rounds,
    }


def how_kept(choice: str, *, is_last: bool) -> str:
    """What is said of the arm that a round keeps, as a predicate. choice: what the campaign froze (`promotion.CHOICES`)."""
    if not is_last:
        return "is kept for now"
    why = "is worth most" if choice == promotion.VALUE else "is furthest ahead on dev"
    return f"{why}, and no round follows that could test it"


def why_nothing(decision: Decision) -> str:
    """Why a round says nothing of any recipe, as a clause; empty where it is decided."""
    if decision.state == "decided":
        return ""
    return f"nothing {'was' if decision.state == 'closed' else 'is'} decided ({decision.reasons[0]})"


def _text(setting: Setting) -> str:
    return "=".join(setting)


def _comparison(found: Comparison, level: Fraction, sign: int = 1) -> dict[str, Any]:
    """`difference` is always the standing runs' mean minus the reference recipe's. sign: -1 where `found` asks whether it is lower."""
    if found.not_evaluated:
        return {"not_evaluated": found.not_evaluated}
    return {
        "shown": found.is_shown, "difference": sign * float(found.difference), "noise_reaches": float(found.reach),
        "rounds": list(found.rounds), "standing_runs": found.num_standing, "reference_runs": found.num_reference,
        "degrees_of_freedom": found.degrees, "level": float(level), "student_t": float(found.quantile),
    }  # fmt: skip
