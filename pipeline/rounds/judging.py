"""What needs a GPU when a round's meta stage runs, and the judge job that does it.

The meta job is a small job without GPUs. Two things that it needs may be unjudged: the reference on the round's fresh items, if its job died,
and submissions to the local board. Where this process can open no GPU of its own, that goes to another job:

    meta     logs `judge_request` with what is unjudged, and ends with JudgeWanted
    chain    submits a judge job, and another meta job after it (afterany); `jobs.jsonl` says what the judge job was submitted for
    judge    judges what it finds unjudged; a killed one is requeued and goes on
    meta     goes on with what there is. It logs `unjudged` with what the judge job did not judge, and asks for none of it again

Each thing is asked for once in a campaign, so a dead judge job costs one job. Then the round is decided without what is missing. A round
without a standing recipe needs the reference for that, and stays undecided without it (docs/decisions/0020). A score that comes later is
taken up by the next meta stage. A campaign on one machine, or on a site without GPUs, is judged by the meta stage itself.
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
from pipeline.campaign.records import Outcome
from pipeline.cluster import slurm_jobs, slurm_submit
from pipeline.config import settings
from pipeline.decision import board_submissions, history
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

        Raises WorkFailed while a job of the round that judges waits or runs, IntegrityError where reference.h5 was lost.
        """
        is_here = is_possible_here(chosen)
        if not is_here and (why := awaited(campaign, folder)):
            raise WorkFailed(why, f"`python -m pipeline status {shlex.quote(str(campaign.folder))}` shows them")
        records = Log(campaign.log).records()
        if (
            not is_here
            and not (folder.folder / "reference.h5").exists()
            and history.is_reference_judged(records, folder.name)
        ):
            raise IntegrityError(
                f"{folder.folder}/reference.h5 is missing, although the log has its outcome",
                f"Restore it from a copy, or have it judged again: `python -m pipeline rerun {shlex.quote(str(campaign.folder))}`",
            )
        known = history.asked_of_judges(
            records, folder.name
        )  # what somebody typed and no meta stage asked for is not believed
        return cls(campaign, folder, is_here, known.intersection(asked) | submitted_before(campaign, folder), asks)

    def ask(self) -> None:
        """Log what is unjudged, or that a person closes the round. Raises JudgeWanted where no judge job was submitted for some of it."""
        if self.is_here:
            return
        log, name = Log(self.campaign.log), self.folder.name
        left = unjudged(self.campaign, self.folder, log.append_from(self._news))
        wanted = [what for what in left if what not in self.asked]
        if wanted and self.asks:
            chain = f"python -m pipeline chain {shlex.quote(str(self.campaign.folder))} --round {name} --meta"
            raise JudgeWanted(
                f"{name} is not judged yet ({', '.join(wanted)}), judging needs a GPU, and this process can open none that is its own",
                f"The meta job submits a judge job and another meta job after it; by hand `{chain}` does so",
            )

    def _news(self, records: list[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
        """The record that says what is unjudged, where the log does not say it yet. records: all of the log, whose lock is held."""
        left, name = unjudged(self.campaign, self.folder, records), self.folder.name
        wanted = [what for what in left if what not in self.asked]
        if wanted and self.asks:
            new = [what for what in wanted if what not in history.asked_of_judges(records, name)]
            return ("judge_request", {"round": name, "what": new}) if new else None
        if not self.asks and REFERENCE in wanted and REFERENCE not in history.asked_of_judges(records, name):
            is_said = any(record["event"] == "by_hand" and record["round"] == name for record in records)
            return None if is_said else ("by_hand", {"round": name})
        missing = [what for what in left if what in self.asked]
        said = [record["what"] for record in records if record["event"] == "unjudged" and record["round"] == name]
        return ("unjudged", {"round": name, "what": missing}) if missing and said[-1:] != [missing] else None


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


def unjudged(campaign: Campaign, folder: Round, records: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
    """What has no score yet and can get one: "reference" on the round's fresh items, and "submission 3" to the local board.

    records: of the log, which is read without them.
    """
    has_adapter = results.has_score(campaign.round("r0000").published("a0"))
    is_judged = (folder.folder / "reference.h5").exists() or folder.closed.exists()
    found = [REFERENCE] if has_adapter and not is_judged else []
    known = board_submissions.submissions_in(Log(campaign.log).records() if records is None else records)
    return found + [f"submission {each.number}" for each in known if local_board.is_unscored(campaign, each)]


def requested(campaign: Campaign, folder: Round) -> list[str]:
    """What the log asks a judge job for and is still unjudged, without that for which one was submitted."""
    records = Log(campaign.log).records()
    asked = history.asked_of_judges(records, folder.name) - submitted_before(campaign, folder)
    return [what for what in unjudged(campaign, folder, records) if what in asked]


def submitted_before(campaign: Campaign, folder: Round) -> frozenset[str]:
    """What judge jobs were submitted for: this round's for its reference, those of any round for submissions."""
    others = [submitted_for(each) - {REFERENCE} for each in campaign.frozen_rounds() if each.name != folder.name]
    return submitted_for(folder).union(*others)


def submitted_for(folder: Round) -> frozenset[str]:
    """What the round's judge jobs were submitted for."""
    return frozenset(what for each in slurm_jobs.submissions(folder) for what in each.get("ids", {}).get("judges", []))


def awaited(campaign: Campaign, folder: Round) -> str:
    """A sentence that says that a job which judges waits or runs, and who decides after it; empty if none does, or if that is this job."""
    for role in ["judge", REFERENCE] if REFERENCE in unjudged(campaign, folder) else ["judge"]:
        newest = [each for each in slurm_jobs.submissions(folder) if role in each["tasks"]][-1:]
        if not newest or slurm_submit.this_job() == newest[0]["meta"]:
            continue
        job_id, meta_id = newest[0]["tasks"][role], newest[0]["meta"]
        jobs = launch.query(folder, [job_id, meta_id]).jobs
        if jobs[job_id].waits or jobs[job_id].runs:
            then = "has ended, so run the meta stage again after it" if jobs[meta_id].ended else "decides after it"
            state = jobs[job_id].state.lower()
            return f"{role} job {job_id} of {folder.name} is {state}, and meta job {meta_id} {then}"
    return ""


def record_own(folder: Round, asked: Sequence[str]) -> None:
    """Record the submission of the meta job that this process runs in, if nobody did: its process was killed after sbatch.

    Else the next submission would cancel its jobs, this one among them. asked: what its judge job was submitted for.
    """
    mark = slurm_submit.own_mark(folder.slurm_dir)
    if not mark:
        return
    with launch.patient_round_lock(folder, control.LOCK_SECONDS):
        if mark not in slurm_jobs.recorded_marks(folder):
            ids = {"submission": mark, "judges": list(asked)}
            slurm_jobs.record_submission(folder, {}, slurm_submit.this_job(), "found", ids)
        slurm_submit.keep(folder.slurm_dir, mark)


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
    reference = results.read_arm(first, frozen, "a0", "reference")
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
