"""What needs a GPU when a round's meta stage runs, and the judge job that does it.

The meta job is a small job without GPUs. Two things that it needs may be unjudged: the reference on the round's fresh items, if its job died,
and submissions to the local board. Where this process can open no GPU of its own, that goes to another job:

    meta     logs `judge_request` with what is unjudged, and ends with JudgeWanted
    chain    submits a judge job, and another meta job after it (afterany); `jobs.jsonl` says what the judge job was submitted for
    judge    judges what it finds unjudged; a killed one is requeued and goes on
    meta     goes on with what there is. It logs `unjudged` with what the judge job did not judge, and asks for none of it again

Each thing is asked for once, so a dead judge job costs one job. The decision then follows by article 3 without what is missing, and a score
that comes later is taken up by the next meta stage. A campaign on one machine, or on a site without GPUs, is judged by the meta stage itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.campaign import canonical
from pipeline.campaign.errors import IntegrityError, Interrupted, JudgeWanted, PipelineError, WorkFailed
from pipeline.campaign.facts import facts_of, read_plan, verified_code
from pipeline.campaign.files import exclusive_lock, file_digest, read_json, write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.campaign.records import Outcome, Plan
from pipeline.cluster import slurm_jobs, slurm_submit
from pipeline.config import settings
from pipeline.decision import board_submissions
from pipeline.execution import judge, results
from pipeline.external import local_board
from pipeline.rounds import control, launch
from pipeline.sandbox import devices

REFERENCE = "reference"


@dataclass(frozen=True)
class Left:
    """What a meta stage cannot judge itself. is_here: it can. asks: whether it may have a judge job submitted."""

    campaign: Campaign
    folder: Round
    is_here: bool
    asked: frozenset[str]
    asks: bool

    @classmethod
    def of(
        cls, campaign: Campaign, folder: Round, chosen: settings.Settings, asked: Sequence[str], *, asks: bool
    ) -> Left:
        """Look at the job and the round. asked: what a judge job was submitted for, beside what `jobs.jsonl` says.

        Raises WorkFailed while the round's judge job waits or runs.
        """
        is_here = is_possible_here(chosen)
        if not is_here and (why := awaited(folder)):
            raise WorkFailed(why, f"`python -m pipeline status {shlex.quote(str(campaign.folder))}` shows both")
        return cls(campaign, folder, is_here, frozenset(asked) | submitted_for(folder), asks)

    def ask(self) -> None:
        """Log what is unjudged. Raises JudgeWanted where a judge job has not been submitted for some of it."""
        left = [] if self.is_here else unjudged(self.campaign, self.folder)
        wanted = [what for what in left if what not in self.asked] if self.asks else []
        log, name = Log(self.campaign.log), self.folder.name
        if wanted:
            log.append_once("judge_request", round=name, what=wanted)
            chain = f"python -m pipeline chain {shlex.quote(str(self.campaign.folder))} --round {name} --meta"
            raise JudgeWanted(
                f"{name} is not judged yet ({', '.join(wanted)}), judging needs a GPU, and this process can open none that is its own",
                f"The meta job submits a judge job and another meta job after it; by hand `{chain}` does so",
            )
        if missing := [what for what in left if what in self.asked]:
            log.append_news("unjudged", {"round": name}, what=missing)


def is_possible_here(chosen: settings.Settings) -> bool:
    """Whether this process may judge: on one machine, on a site without GPUs, and where this job has the GPUs that judging takes."""
    cluster = chosen.cluster
    if cluster.kind != "slurm" or not cluster.gpus_per_node:
        return True
    try:
        devices.of_node(chosen.parallelism.judge_tp, "loopback")
    except WorkFailed:
        return False
    return True


def unjudged(campaign: Campaign, folder: Round) -> list[str]:
    """What has no score yet and can get one: "reference" on the round's fresh items, and "submission 3" to the local board."""
    has_adapter = results.has_score(campaign.round("r0000").published("a0"))
    is_judged = (folder.folder / "reference.h5").exists() or folder.closed.exists()
    found = [REFERENCE] if has_adapter and not is_judged else []
    known = board_submissions.submissions_in(Log(campaign.log).records())
    return found + [f"submission {each.number}" for each in known if local_board.is_unscored(campaign, each)]


def requested(campaign: Campaign, folder: Round) -> list[str]:
    """What the log asks a judge job for and is still unjudged, without that for which one was submitted."""
    log = [record for record in Log(campaign.log).records() if record["event"] == "judge_request"]
    asked = {what for record in log if record["round"] == folder.name for what in record["what"]}
    return [what for what in unjudged(campaign, folder) if what in asked - submitted_for(folder)]


def submitted_for(folder: Round) -> frozenset[str]:
    """What the round's judge jobs were submitted for."""
    return frozenset(what for each in slurm_jobs.submissions(folder) for what in each.get("ids", {}).get("judges", []))


def awaited(folder: Round) -> str:
    """A sentence that says that the round's judge job waits or runs, and who decides after it; empty if none does, or if that is this job."""
    newest = [each for each in slurm_jobs.submissions(folder) if "judge" in each["tasks"]][-1:]
    if not newest or slurm_submit.this_job() == newest[0]["meta"]:
        return ""
    job_id = newest[0]["tasks"]["judge"]
    job = launch.query(folder, [job_id]).jobs[job_id]
    if not (job.waits or job.runs):
        return ""
    return (
        f"judge job {job_id} of {folder.name} is {job.state.lower()}, and meta job {newest[0]['meta']} decides after it"
    )


def submit(campaign: Campaign, folder: Round) -> Mapping[str, Any] | None:
    """Submit a judge job for what the log asks for, and a meta job after it. Returns their ids, or None if nothing is asked for.

    Running it again submits nothing, and a submission that was cut short is taken back first. Raises as `slurm_submit.submit`.
    """
    if not requested(campaign, folder):
        return None
    with launch.patient_round_lock(folder, control.LOCK_SECONDS):
        what = requested(campaign, folder)  # another process may have submitted it meanwhile
        if not what:
            return None
        code_dir, _ = launch.verify_frozen(campaign, folder)
        judge_stage = ("judge", str(campaign.folder), folder.name)
        meta_stage = (*launch.meta_stage(campaign, folder), *(f"--asked={each}" for each in what))
        marks = slurm_jobs.recorded_marks(folder)
        asked_of_slurm = launch.resources(folder)
        ids = slurm_submit.submit(
            folder.slurm_dir, code_dir, [], meta_stage, asked_of_slurm, recorded=marks, judge=judge_stage
        )
        tasks = {"judge": ids["judge_job_id"]}
        slurm_jobs.record_submission(folder, tasks, ids["meta_job_id"], "judge", {**ids, "judges": what})
        slurm_submit.keep(folder.slurm_dir, ids["submission"])
        return {**ids, "judges": what}


def judge_left(
    campaign: Campaign, folder: Round, stop_wanted: Callable[[], bool], report_line: Callable[[str], None]
) -> list[str]:
    """Judge what is unjudged, in the judge job. Returns what could not be judged. One failure does not stop the rest.

    Raises Interrupted once `stop_wanted` returns True; the completions decoded so far are kept.
    """
    failed = []
    for what in unjudged(campaign, folder):
        try:
            if what == REFERENCE:
                judge_reference(campaign, folder, stop_wanted)
            else:
                local_board.score(campaign, int(what.split()[1]), stop_wanted)
            report_line(f"{what} is judged")
        except Interrupted:
            raise
        except PipelineError as error:
            report_line(f"{what} could not be judged: {error}")
            failed.append(what)
    return failed


def read_arm(folder: Round, frozen: Plan, arm: str, role: str) -> Outcome:
    """The outcome of one arm, as it was published. If it has no score, `exit_class` says why.

    The exit classes are `never_started`, `unfinished` (an attempt was claimed and left no result), `integrity: ...` (the file is damaged
    or belongs to another plan), and those that a worker records.
    """
    path = folder.published(arm)
    if not path.exists():
        return Outcome(arm, role, "absent", "unfinished" if folder.attempts(arm) else "never_started")
    try:
        attributes = results.read_attributes(path)
        expected = {
            "campaign": frozen.campaign, "round": frozen.round, "arm": arm, "image_digest": frozen.image_digest,
            "constitution_digest": frozen.constitution_digest, "config_digest": frozen.config_digest,
        }  # fmt: skip
        wrong = sorted(name for name, value in expected.items() if attributes[name] != value)
        if not wrong:
            return results.read_outcome(path, file_digest(path))
        why = f"made for another plan, {', '.join(wrong)} differ"
    except IntegrityError:
        why = "not a readable result file"  # the error's own message holds a path, and no record may
    return Outcome(arm, role, "failed", f"integrity: {why}", file_digest(path))


def reference_outcome(
    campaign: Campaign,
    folder: Round,
    facts: Mapping[str, Any],
    chosen: settings.Settings,
    stop_wanted: Callable[[], bool] = lambda: False,
    *,
    is_judged_here: bool = True,
) -> Outcome:
    """The reference's outcome: on dev as in r0000, and on this round's fresh items, which are decoded here if `reference.h5` is missing.

    stop_wanted: polled while decoding; decoding stops with Interrupted once it returns True. is_judged_here: if not, a missing
    `reference.h5` makes the reference absent, with the exit class `not_judged`. Raises IntegrityError if `reference.h5` belongs to another
    adapter or round.
    """
    first = campaign.round("r0000")
    frozen, _ = read_plan(first)
    reference = read_arm(first, frozen, "a0", "reference")
    if reference.status != "completed":
        return reference
    path = folder.folder / "reference.h5"
    with exclusive_lock(folder.reference_lock, f"reference stage of {folder.name}"):
        if not path.exists():
            if not is_judged_here:
                return Outcome(reference.arm, reference.role, "absent", "not_judged")
            evaluate_reference(campaign, folder, first, facts, chosen, path, stop_wanted)
    fresh = results.read_outcome(path, file_digest(path))
    if (fresh.adapter_digest, results.read_attributes(path)["round"]) != (reference.adapter_digest, folder.name):
        raise IntegrityError(
            f"{path} was made with another adapter than {first.published('a0')}, or for another round",
            f"Remove {path} and run `meta` again",
        )
    return Outcome(**{**asdict(reference), "outcomes": {**reference.outcomes, **fresh.outcomes}})


def judge_reference(campaign: Campaign, folder: Round, stop_wanted: Callable[[], bool]) -> Outcome:
    """Judge the reference on this round's fresh items, in the job beside the round's arms, so that `close` need not.

    Raises Interrupted once `stop_wanted` returns True; the completions decoded so far are kept. Raises else as `close`.
    """
    facts = facts_of(campaign)
    verified_code(campaign, facts)
    read_plan(folder)
    chosen = settings.load(folder.config)
    # This job waits for the one that trains the reference, which may have run on another node.
    control.await_results(folder, [(campaign.round("r0000"), "a0")], chosen.cluster.file_wait_seconds)
    return reference_outcome(campaign, folder, facts, chosen, stop_wanted)


def evaluate_reference(
    campaign: Campaign,
    folder: Round,
    first: Round,
    facts: Mapping[str, Any],
    chosen: settings.Settings,
    path: Path,
    stop_wanted: Callable[[], bool],
) -> None:
    """Decode and score this round's fresh items, and dev items that are new, with the reference's adapter. Writes `path`."""
    source = first.published("a0")
    attributes = results.read_attributes(source)
    adapter = next(attempt for attempt in first.attempts("a0") if attempt.number == attributes["attempt"]).adapter_dir
    secrets, repaired = read_json(campaign.seeds), dict(settings.policy_of(chosen).repaired)
    seeds: dict[str, judge.Seeds] = {"fresh": secrets[f"fresh/{folder.name}"]}
    if repaired:  # some families have other dev items now than in r0000
        seeds["dev"] = judge.dev_seeds(secrets, chosen.tasks.families, repaired)
    digest = facts["image"]["tree_digest"]
    judged = judge.judge_once(campaign.image, digest, chosen, adapter, seeds, folder.meta_dir, stop_wanted)
    attributes.update(round=folder.name, config_digest=canonical.digest_text(folder.config.read_text()))
    for item_set, lines in judged.raw.items():
        write_file(folder.meta_dir / "completions" / f"{item_set}.jsonl", lines)
    results.write_result(path, attributes, judged.items, [], judged.completions)
