"""The meta stage: collect a round's results, decide, and write the next round's overrides.

    eight result files -> ledger -> evidence -> decision -> the next round's overrides

The meta stage may run at any time and any number of times. What it writes follows from the files that exist, so running it again gives the
same bytes and repairs a crash between two writes. Below the quorum it decides nothing and says what is missing. A late arm adds a decision;
an override file that a round was planned with never changes. Before it decides, it has the chosen arms scored by the external target, if
there is one (external/round_submissions.py), without waiting for scores. The reference's adapter is judged on this round's fresh items in
the pristine image, as every arm is: on Slurm in a job beside the arms, else here. What is unjudged and needs a GPU goes to a judge job
(judging.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.campaign import canonical
from pipeline.campaign.facts import facts_of, load_constitution, read_plan, verified_code
from pipeline.campaign.files import exclusive_lock, file_digest, read_json, write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.campaign.records import Decision, Outcome, Plan
from pipeline.cluster import slurm_jobs
from pipeline.config import settings
from pipeline.decision import decide, derive, history
from pipeline.execution import results
from pipeline.external.round_submissions import RoundSubmissions
from pipeline.rounds import anchors, control, judging, launch, log_attempts
from pipeline.rounds.freeze import write_overrides


def close(
    campaign: Campaign,
    folder: Round,
    *,
    by_person: bool = False,
    report_line: Callable[[str], None] = lambda line: None,
    asked: Sequence[str] = (),
) -> Decision:
    """Collect the results of a round and decide. The caller has entered a private mount namespace (sandbox/namespace.py).

    by_person: close the round even below the quorum; its state is then `closed`, and the policy stays as it was.
    report_line: is called with each line about the external target. asked: what an earlier meta stage had a judge job submitted for.

    Returns the decision. Below the quorum its state is `undecided`, and only evidence and ledger were written. Raises ConfigError while
    another meta stage of this round runs, IntegrityError if something frozen was changed, JudgeWanted where a judge job must judge first.
    """
    with exclusive_lock(folder.meta_lock, f"meta stage of {folder.name}"):
        facts = facts_of(campaign)
        verified_code(campaign, facts)
        rules = load_constitution(facts["constitution_digest"])
        frozen, _ = read_plan(folder)
        chosen = settings.load(folder.config)
        for line in await_results(campaign, folder, frozen, chosen):
            report_line(line)
        outcomes = [results.read_arm(folder, frozen, arm.name, arm.role) for arm in frozen.arms]
        left = judging.Left.of(campaign, folder, chosen, asked, asks=not by_person)
        left.ask()
        reference = judging.reference_outcome(campaign, folder, facts, chosen, is_judged_here=left.is_here)
        write_ledger(campaign)
        log_attempts.log_attempts(campaign, folder)
        log_outcomes(campaign, folder, [*outcomes, replace(reference, arm=history.REFERENCE)])
        submissions = RoundSubmissions.of(campaign, folder.name, facts, chosen, rules)
        log, history_of_log = submissions.log, submissions.history
        lines = submissions.take(left.ask)
        derived = derive.derive_round(history_of_log.now(), folder.name)
        if by_person and derived.decision.state == "undecided":
            log.append_once("by_hand", round=folder.name)
            derived = derive.derive_round(history_of_log.now(), folder.name)
        content = canonical.encoded(derived.evidence.to_json())
        ledger = file_digest(campaign.ledger)
        log.append_news("evidence", {"round": folder.name}, sha256=canonical.sha256(content), ledger=ledger)
        write_file(folder.evidence, content)
        if derived.decision.state in decide.CLOSING:
            record_decision(campaign, folder, derived)
            if folder.number >= facts["design"]["rounds"]:
                lines += submissions.finish(before_sending=left.ask)
            reveal(campaign, folder)
        for line in lines:
            report_line(line)
        return derived.decision


def still_running(folder: Round) -> list[str]:
    """The round's jobs and processes that wait or run, such as "r0002/a5 as job 7_5"; without those that Slurm or this machine does not know."""
    known = slurm_jobs.all_ids(folder)
    jobs = launch.query(folder, [job_id for _, job_id in known]).jobs
    found = [f"{arm} as job {job_id}" for arm, job_id in known if jobs[job_id].waits or jobs[job_id].runs]
    if pid := control.round_pid(folder):
        found.append(f"`round` as process {pid}")
    for arm in folder.frozen_plan().arms:
        if (newest := folder.attempts(arm.name)[-1:]) and (pid := control.local_pid(newest[0])):
            found.append(f"{folder.name}/{arm.name} as process {pid}")
    return found


def lacking(campaign: Campaign, folder: Round, quorum: int) -> str:
    """Why nothing could be decided by this process with the scores that are published, as a clause; empty where a decision is possible."""
    frozen = folder.frozen_plan()
    scored = {arm.name for arm in frozen.arms if results.has_score(folder.published(arm.name))}
    standing = [arm.name for arm in frozen.arms if arm.replicate_of == "standing"]
    if len(scored) < quorum:
        return f"{len(scored)} of {len(frozen.arms)} arms have a score, fewer than the quorum of {quorum} (article 3)"
    if frozen.policy.standing and not scored.intersection(standing):
        return f"the standing recipe, which the axes are compared with, has no score ({', '.join(standing)}; article 7)"
    if frozen.policy.standing:
        return ""
    reference = "the reference, which the arms are compared with while no recipe stands,"
    if not results.has_score(campaign.round("r0000").published("a0")):
        return f"{reference} has no score (r0000/a0; article 7)"
    if (folder.folder / "reference.h5").exists() or judging.is_possible_here(settings.load(folder.config)):
        return ""
    again = f"`python -m pipeline rerun {shlex.quote(str(campaign.folder))} --round {folder.name}` has a job judge it"
    return f"{reference} has no score on this round's fresh items (article 7; {again})"


def await_results(campaign: Campaign, folder: Round, frozen: Plan, chosen: settings.Settings) -> list[str]:
    """Wait for what the round's ended jobs, those of r0000 among them, have published. Returns a line about what stayed unseen."""
    first = campaign.round("r0000")
    arms = [(of, arm.name) for of, plan in ((first, first.frozen_plan()), (folder, frozen)) for arm in plan.arms]
    if control.REFERENCE in slurm_jobs.task_ids(folder):
        arms.append((folder, control.REFERENCE))
    seconds = chosen.cluster.file_wait_seconds
    unseen = control.await_results(folder, arms, seconds)
    return (
        [f"{', '.join(unseen)}: no result was seen here within {seconds:g} s (cluster.file_wait_seconds)"]
        if unseen
        else []
    )


def log_outcomes(campaign: Campaign, folder: Round, outcomes: Sequence[Outcome]) -> None:
    """Log the workers' results: digests, and the outcome string of every set and family."""
    log = Log(campaign.log)
    for outcome in outcomes:
        is_news = log.append_news("outcome", {"round": folder.name, "arm": outcome.arm}, outcome=asdict(outcome))
        if is_news and folder.closed.exists():
            log.append("late_arm", round=folder.name, arm=outcome.arm)


def write_ledger(campaign: Campaign) -> None:
    """Rebuild the ledger from every readable arm file of every round."""
    rounds: dict[str, dict[str, Path]] = {}
    for folder in campaign.frozen_rounds():
        files = {path.stem: path for path in sorted(folder.folder.glob("*.h5"))}
        rounds[folder.name] = {name: path for name, path in files.items() if results.status_of(path)}
    results.write_ledger(campaign.ledger, rounds)


def record_decision(campaign: Campaign, folder: Round, derived: derive.Derived) -> None:
    """Log and write the decision under the next number, unless it equals the newest one; then the overrides that follow from it."""
    log = Log(campaign.log)
    content = canonical.encoded({**asdict(derived.decision), "evidence_digest": file_digest(folder.evidence)})
    earlier = sorted(folder.decisions_dir.glob("*.json"))
    if not earlier or earlier[-1].read_bytes() != content:
        about = {"round": folder.name, "number": len(earlier)}
        log.append_news("decision", about, decision=asdict(derived.decision))
        write_file(folder.decisions_dir / f"{len(earlier):02d}.json", content)
    following = f"r{folder.number + 1:04d}"
    if derived.overrides is None or campaign.round(following).plan.exists():
        return  # the budget is spent, or the next round was planned with an earlier decision's overrides
    log.append_news("overrides", {"round": following}, overrides=derived.overrides)
    write_overrides(campaign, following, derived.overrides)


def reveal(campaign: Campaign, folder: Round) -> None:
    """Close the round: publish its fresh seed and sign the head of the log. A new head is signed if records came since the last one."""
    seed = read_json(campaign.seeds)[f"fresh/{folder.name}"]
    log = Log(campaign.log)
    log.append_once("reveal", round=folder.name, name=f"fresh/{folder.name}", seed=seed)
    closed = log.close(campaign.signing_key, facts_of(campaign)["campaign"], folder.name)
    write_file(
        folder.closed, canonical.encoded({"fresh_seed": seed, **closed, "anchor": str(log.anchor(closed["seq"]))})
    )
    anchors.write_anchor(settings.load(folder.config).campaign, log.anchor(closed["seq"]))
