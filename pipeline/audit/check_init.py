"""Check what `init` froze against what anybody has: the constitution, the critical values of the campaign's design, the commitments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.audit.findings import Report
from pipeline.audit.log_schema import HEX
from pipeline.campaign import constitution, keys, other_rules
from pipeline.campaign.canonical import encoded
from pipeline.campaign.errors import PipelineError
from pipeline.campaign.files import read_json
from pipeline.claims.assess_claims import CONFIRMATIONS
from pipeline.decision import promotion
from pipeline.stats import critical_values
from pipeline.stats.design import Design

Record = Mapping[str, Any]
NEEDED = (
    "campaign", "image", "runtime_digest", "constitution_digest", "code_digest", "overrides", "settled", "commitments", "articles", "design",
    "critical", "families", "public_key",
)  # fmt: skip
ARTICLES = "articles.json"
STRANGE_CRITICAL = "the critical values are neither those simulated for this design (constitution/nulls) nor its bounds"
"""How the finding begins that names critical values of a campaign which do not ship."""


def check_init(records: Sequence[Record], report: Report) -> bool:
    """Check the init record. Returns whether the rest of the audit can rely on it.

    It can even where the critical values are strange: what the campaign decided by them is derived by them.
    """
    if records[0]["event"] != "init":
        return False  # log_schema reports it
    facts = records[0]["facts"]
    missing = [name for name in NEEDED if name not in facts]
    if missing:
        report.record(0, f"init lacks {', '.join(missing)}")
        return False
    if not isinstance(facts["code_digest"], str) or not HEX.fullmatch(
        facts["code_digest"]
    ):  # it becomes part of a path
        report.record(0, "init has no valid code_digest")
        return False
    since = len(report.findings)
    try:
        check_articles(facts, report)
        check_design(facts, report)
        check_reveals(records, facts, report)
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        report.record(0, f"init does not have the form of an init record ({error!r})")
    is_right = len(report.findings) == since
    if is_right:
        check_critical(facts, report)
    report.checked("what was frozen at init: articles, design and critical values, commitments and reveals", since)
    return is_right


def check_articles(facts: Mapping[str, Any], report: Report) -> None:
    """Check that the articles in the log are those of this code's constitution, which the campaign names."""
    if facts["constitution_digest"] != other_rules.own_constitution():
        report.record(0, "init names no constitution that this code has")
    elif encoded(read_json(constitution.HERE / ARTICLES)) != encoded(facts["articles"]):
        report.record(0, "the articles are not those of the constitution that the campaign names")


def check_design(facts: Mapping[str, Any], report: Report) -> None:
    """Check that rounds, arms and the way to confirm are within the constitution."""
    design = Design(**facts["design"])
    article = facts["articles"]["4"]
    within = 1 <= design.rounds <= article["rounds"]
    if not within or (design.arms, design.families) != (article["arms_per_round"], len(facts["families"])):
        report.record(0, "the design has other rounds, arms or families than the articles and the campaign")
    if facts["confirmation"] not in CONFIRMATIONS:
        report.record(0, f"the campaign froze the confirmation {facts['confirmation']!r}, which is unknown")
    if facts["choice"] not in promotion.CHOICES:
        report.record(0, f"the campaign froze the choice {facts['choice']!r}, which is unknown")


def check_critical(facts: Mapping[str, Any], report: Report) -> None:
    """Check that the critical values are those that ship for the campaign's design, or its bounds, and name those that are not."""
    design, frozen = Design(**facts["design"]), facts["critical"]
    bounds = critical_values.bounds(design)
    try:
        shipped = critical_values.read_critical_values(design)["critical"]
    except PipelineError:
        shipped = bounds  # no values were simulated for this design, so that only its bounds are valid
    if frozen not in (bounds, shipped):
        given = frozen if isinstance(frozen, Mapping) else {}
        names = sorted(name for name in {*shipped, *given} if given.get(name) != shipped.get(name))
        named = "; ".join(f"{name} is {given.get(name)}, and {shipped.get(name)} ships" for name in names)
        report.record(0, f"{STRANGE_CRITICAL}: {named}")


def check_reveals(records: Sequence[Record], facts: Mapping[str, Any], report: Report) -> None:
    """Check that each revealed seed is the one that was committed to, and report which seeds are still secret."""
    revealed, seeds = set(), dict[str, str]()
    for record in records:
        if record["event"] == "reveal":
            name = record["name"]
            revealed.add(name)
            if keys.commitment(name, record["seed"]) != facts["commitments"].get(name):
                report.record(record["seq"], f"the seed of {name} is not the one that was committed to at init")
            if record["seed"] in seeds:  # trials could know its items, because they were public already
                report.record(
                    record["seq"], f"the seed of {name} is that of {seeds[record['seed']]}, so both have the same items"
                )
            seeds.setdefault(record["seed"], name)
    decided = {record["round"] for record in records if record["event"] == "decision"}
    secret = sorted({"dev", "board"} - revealed)
    if secret:
        report.unknown(
            f"the seeds of {' and '.join(secret)} are secret until `end` reveals them, so those items cannot be made again, and their "
            "scores rest on the outcome strings in the log"
        )
    hidden = [f"fresh/{name}" for name in sorted(decided) if f"fresh/{name}" not in revealed]
    if hidden:
        report.unknown(f"the seeds of {', '.join(hidden)} are not revealed yet, because the round is being closed")
