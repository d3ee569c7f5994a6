"""An outsider's check of a campaign from its files: what is verified, what cannot be, what is wrong. Needs Python and `cryptography`.

    bytes of the log -> chain, heads, anchors -> form and order of records -> what was frozen -> plans -> attempts, outcomes, decisions
                     -> every file that the log names -> (asked for) items made again, completions scored again, rates decoded again

Nothing of what is audited is believed or run; `--rescore` and `--reinfer` run the image's code, and say so. The derivations are the
campaign's own (referee.derive, plan.make_arms, proposals.rejudged), from this checkout and not from the campaign.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.audit import chain, check_files, check_init, check_outcomes, check_plans, log_schema
from pipeline.audit.findings import Report
from pipeline.campaign.errors import NotFound
from pipeline.campaign.heads import Anchor
from pipeline.decision.derive import Derived


def examine(
    folder: Path, anchors: Sequence[Anchor] = (), known: dict[tuple[str, str], Derived] | None = None
) -> Report:
    """Everything that needs neither the image's code nor a model. known: what was derived before, for many audits of one campaign.

    Raises NotFound where there is no log at all.
    """
    log = folder / "log.jsonl"
    if not log.is_file():
        raise NotFound(f"{folder} holds no log.jsonl", "Give the folder of a campaign, or a bundle made by --export")
    report = Report()
    links = chain.read_chain(log.read_bytes(), report)
    chain.check_heads(links, report)
    chain.check_anchors(links, anchors, report)
    torn = Path(f"{log}.torn")
    if torn.exists():
        report.unknown(f"log.jsonl.torn: {torn.stat().st_size} bytes of records that a crash cut short, set aside")
    records = links.records
    if not records or not log_schema.check_records(records, report) or not check_init.check_init(records, report):
        report.unknown("plans, decisions and files: the records do not have the form that they would be derived from")
        return report
    for what, part in (
        ("plans", lambda: check_plans.check_plans(records, reader(folder), report)),
        ("outcomes and decisions", lambda: check_outcomes.check_log(records, links.hashes, report, known)),
        ("files", lambda: check_files.check_files(records, links.hashes, folder, report)),
    ):
        try:
            part()
        except check_plans.STUMBLES as error:
            # A record of good form in a place where its fellows are missing; the order said so, and if not, this does.
            report.unknown(f"{what} after the first that cannot be: {error!r}")
            if report.ok:
                report.file("log.jsonl", f"holds {what} that nothing follows from ({error!r})")
    if not any(record["event"] == "decision" for record in records):
        report.unknown("nothing is decided yet")
    return report


def reader(folder: Path) -> check_plans.Read:
    """Files below a folder, and none outside of it."""

    there = check_files.plain_files(folder)
    return lambda path: (folder / path).read_bytes() if path in there else None
