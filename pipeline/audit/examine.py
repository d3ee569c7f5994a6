"""Audit a campaign from its files as an outsider: report what is verified, what cannot be verified, and what is wrong.

    bytes of the log -> chain, heads, anchors -> form and order of records -> what was frozen -> plans -> attempts, outcomes, decisions
                     -> every file that the log names

The audit neither trusts nor runs anything of the campaign. (Only `--rescore` and `--reinfer` run code, that of the image.) It derives plans
and decisions with this checkout's own code: decision.derive, plan.make_arms and proposals.rejudged. A campaign under other rules than this
code's is not judged: OtherRules says which command judges it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.audit import chain, check_agents, check_files, check_init, check_outcomes, check_plans, log_schema
from pipeline.audit.findings import ERRORS_ON_BAD_RECORDS, Report
from pipeline.campaign import other_rules
from pipeline.campaign.errors import NotFound, OtherRules
from pipeline.campaign.heads import Anchor
from pipeline.decision.derive import Derived


def examine(
    folder: Path,
    anchors: Sequence[Anchor] = (),
    known: dict[tuple[str, str], Derived] | None = None,
    *,
    given: Path | None = None,
    words: Sequence[str] = (),
) -> Report:
    """Run all checks that need neither the image's code nor a model.

    anchors: log anchors that were kept elsewhere. known: decisions that earlier audits of the same campaign derived; see
    `check_outcomes.Deriver`. given, words: the path and the command that a person typed, for OtherRules; by default `audit` of the folder.

    Raises NotFound if the folder has no log. Raises OtherRules where the seal holds and the campaign has another constitution, or where
    something does not follow from the log by this code and the campaign carries other code. Critical values alone that are not those that
    ship are no such case: they are a finding, and the rest is derived by them.
    """
    given = given or folder
    log = folder / "log.jsonl"
    if not log.is_file():
        raise NotFound(f"{folder} holds no log.jsonl", "Give the folder of a campaign, or a bundle that --export wrote")
    report = Report()
    links = chain.read_chain(log.read_bytes(), report)
    chain.check_heads(links, report)
    chain.check_anchors(links, anchors, report)
    torn = Path(f"{log}.torn")
    if torn.exists():
        report.unknown(
            f"log.jsonl.torn has {torn.stat().st_size} bytes of records that a crash cut short and that were set aside"
        )
    facts = links.facts

    def other(why: str) -> OtherRules:
        return other_rules.error(given, folder, facts, why, words or ("audit", str(given)))

    if why := other_rules.other_constitution(facts):
        if report.ok:
            raise other(why)
        report.unknown(f"what follows from the log was not checked. {other(why)}")
        return report
    num_of_seal = len(report.findings)
    check_what_follows(links, folder, report, known)
    found = report.findings[num_of_seal:]
    if found and (why := other_rules.other_code(folder, facts)):
        if any(not finding.what.startswith(check_init.STRANGE_CRITICAL) for finding in found):
            raise other(why)
        report.unknown(f"whether the critical values ship with the code that the campaign carries. {other(why).cure}")
    return report


def check_what_follows(
    links: chain.Chain, folder: Path, report: Report, known: dict[tuple[str, str], Derived] | None
) -> None:
    """Check the form of the records and all that follows from them by this code's rules. links: of a log whose bytes were checked."""
    records = links.records
    if not records or not log_schema.check_records(records, report) or not check_init.check_init(records, report):
        report.unknown("plans, decisions and files were not checked, because the records do not have the right form")
        return
    for what, part in (
        ("plans", lambda: check_plans.check_plans(records, reader(folder), report)),
        ("outcomes and decisions", lambda: check_outcomes.check_log(records, links.hashes, report, known)),
        (
            "agents",
            lambda: check_agents.check_agents(records, folder, check_files.plain_files(folder).__contains__, report),
        ),
        ("files", lambda: check_files.check_files(records, links.hashes, folder, report)),
    ):
        try:
            part()
        except ERRORS_ON_BAD_RECORDS as error:
            # A record of the right form lacks others that it needs. If log_schema did not report it, this does.
            report.unknown(f"{what} were not checked to the end, because a record could not be used ({error!r})")
            if report.ok:
                report.file("log.jsonl", f"holds {what} that cannot be derived ({error!r})")
    if not any(record["event"] == "decision" for record in records):
        report.unknown("nothing is decided yet")


def reader(folder: Path) -> check_plans.Read:
    """A function that reads files below a folder, and none outside of it."""

    there = check_files.plain_files(folder)
    return lambda path: (folder / path).read_bytes() if path in there else None
