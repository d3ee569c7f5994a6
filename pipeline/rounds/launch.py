"""Start a frozen round: submit it to Slurm, or run it on this machine.

freeze.py has frozen the configuration, the plan and the sbatch texts before; starting reads nothing else. On Slurm the round's jobs are
submitted and the command returns. With cluster=local the same stages run as child processes, as many arms at once as fit, and the command
waits. If a local round is interrupted, or has too few scores to decide, the same command resumes it.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.campaign import canonical, heads
from pipeline.campaign.errors import ConfigError, PipelineError, SlurmRefused, WorkFailed
from pipeline.campaign.facts import facts_of, read_plan, verified_code
from pipeline.campaign.files import exclusive_lock, read_json, read_json_lines, write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.cluster import local_runner, sbatch_parameters, slurm_clients, slurm_jobs, slurm_submit, stage_command
from pipeline.cluster.slurm_answers import UNKNOWN
from pipeline.config import corrections, settings
from pipeline.config.requests import ROLES
from pipeline.execution import results
from pipeline.model_calls import served
from pipeline.sandbox import image


def arrays(campaign: Campaign, folder: Round) -> list[list[stage_command.Stage]]:
    """The worker stages of a round, one list for each Slurm array: its eight arms, and the arms of r0000 that have no score yet."""
    frozen, digest = read_plan(folder)
    stages = [worker_stages(campaign, folder, [arm.name for arm in frozen.arms], digest)]
    first = campaign.round("r0000")
    frozen, digest = read_plan(first)
    missing = [arm.name for arm in frozen.arms if not results.has_score(first.published(arm.name))]
    return [*stages, worker_stages(campaign, first, missing, digest)] if missing else stages


def worker_stages(
    campaign: Campaign, folder: Round, arms: Sequence[str], plan_digest: str
) -> list[stage_command.Stage]:
    """The worker stage of each arm, which refuses to run under another plan."""
    return [("worker", str(campaign.folder), folder.name, arm, "--plan", plan_digest) for arm in arms]


def submit(campaign: Campaign, folder: Round) -> dict[str, object]:
    """Submit a frozen round to Slurm. Returns what `submitted.json` holds. Raises ConfigError if it was submitted before."""
    with round_lock(folder):
        adopt(folder)
        if folder.submitted.exists():
            ids = read_json(folder.submitted).get("array_job_ids", [])
            raise ConfigError(
                f"round {folder.name} is submitted already (jobs {', '.join(ids)})",
                f"`python -m pipeline status {campaign.folder}` shows it; `python -m pipeline meta {campaign.folder}` decides it when its "
                "arms are done",
            )
        check_no_job_is_left(folder)
        code_dir, digest = verify_frozen(campaign, folder)
        Log(campaign.log).append_once("slurm_submission", round=folder.name, plan_digest=digest, kind="slurm")
        stages = arrays(campaign, folder)
        reference, meta = reference_stage(campaign, folder), meta_stage(campaign, folder)
        server = served.stage(folder, settings.load(folder.config).worker, [stage[3] for stage in stages[0]])
        marks = slurm_jobs.recorded_marks(folder)
        asked, given = resources(folder), (reference, marks, None, server)
        try:
            ids = slurm_submit.submit(folder.slurm_dir, code_dir, stages, meta, asked, *given)
        except SlurmRefused as error:
            raise SlurmRefused(error.what, f"Nothing is submitted. {how_to_correct(folder)}") from error
        tasks = tasks_of(stages, ids) | {"reference": ids["reference_job_id"]}
        record = {**ids, "plan_digest": digest, "submitted_at": datetime.now(UTC).isoformat(timespec="seconds")}
        slurm_jobs.record_submission(folder, tasks, ids["meta_job_id"], "round", record)
        write_file(folder.submitted, canonical.encoded(record))
        slurm_submit.keep(folder.slurm_dir, ids["submission"])
        return record


def adopt(folder: Round) -> None:
    """Write the `submitted.json` of a submission that was recorded before its process was killed. The caller holds the round's lock."""
    recorded = [each["ids"] for each in slurm_jobs.submissions(folder) if each["why"] == "round" and each.get("ids")]
    if recorded and not folder.submitted.exists():
        write_file(folder.submitted, canonical.encoded(recorded[-1]))


def check_no_job_is_left(folder: Round) -> None:
    """Raise ConfigError if a job of the round may wait or run although the round was not submitted: others start such jobs too."""
    first = folder.campaign.round("r0000")  # `first-contact` may have submitted its arms
    ids = slurm_jobs.task_ids(folder) | (slurm_jobs.task_ids(first) if folder.number == 1 else {})
    jobs = query(folder, list(ids.values())).jobs
    if left := sorted(arm for arm, job_id in ids.items() if not (jobs[job_id].ended or jobs[job_id].absent)):
        of = left[0].partition("/")[0] if "/" in left[0] else folder.name
        raise ConfigError(
            f"jobs of {of} may wait or run already ({', '.join(f'{arm} as {ids[arm]}' for arm in left)})",
            f"Wait, or `python -m pipeline cancel {folder.campaign.folder} --round {of}` first",
        )


def was_begun(folder: Round) -> bool:
    """Whether the round was submitted, runs here, or has an attempt. Until then its jobs may ask Slurm for something else.

    Where sbatch refused one job, those that it had taken were cancelled, so an attempt of theirs is no beginning.
    """
    if folder.submitted.exists() or slurm_jobs.submissions(folder):
        return True
    beside = [folder.campaign.round("r0000")] if folder.number == 1 else []
    has_attempt = any(next(each.folder.glob("a*/attempt_*"), None) for each in (folder, *beside))
    return has_attempt and not slurm_submit.was_refused(folder.slurm_dir)


def how_to_correct(folder: Round) -> str:
    """The sentence that says how a round that Slurm refused gets other settings."""
    return (
        f"`python -m pipeline round {shlex.quote(str(folder.campaign.folder))} cluster.partition=NAME` submits it with another partition, "
        "and likewise with another account, qos, constraint, gres, mem, cpus_per_task or sbatch flag, a shorter time_limit_minutes, or those of "
        "one kind of job (cluster.meta.partition=NAME); `sinfo` and `sacctmgr show assoc` list what is valid. Later rounds need the same words"
    )


def run_here(campaign: Campaign, folder: Round, watch: Callable[[], object], only: Sequence[str] = ()) -> None:
    """Run a frozen round on this machine: its arms without a score, then the meta stage.

    watch: called about ten times a second. only: run these arms of the round alone; all by default.

    Raises WorkFailed if the meta stage fails or this machine lacks the GPUs, ConfigError if the round was submitted to Slurm or runs already.
    """
    with round_lock(folder):
        if folder.submitted.exists() and read_json(folder.submitted)["kind"] == "slurm":
            raise ConfigError(
                f"round {folder.name} was submitted to Slurm", f"`python -m pipeline status {campaign.folder}` shows it"
            )
        code_dir, digest = verify_frozen(campaign, folder)
        chosen = settings.load(folder.config)
        on_node, serving = chosen.cluster.gpus_per_node, chosen.serving_gpus
        gpus = local_runner.gpus_by_arm(chosen.cluster.gpus, on_node - serving)
        Log(campaign.log).append_once("slurm_submission", round=folder.name, plan_digest=digest, kind="local")
        write_file(folder.submitted, canonical.encoded({"kind": "local", "pid": os.getpid(), "plan_digest": digest}))
        stages = [
            stage
            for array in arrays(campaign, folder)
            for stage in array
            if not results.has_score(campaign.round(stage[2]).published(stage[3]))
            and (not only or (stage[2] == folder.name and stage[3] in only))
        ]
        at_once = local_runner.arms_at_once(chosen, len(gpus))
        runtime = chosen.cluster.runtime
        server = served.stage(folder, chosen.worker, [stage[3] for stage in stages if stage[2] == folder.name])
        with local_runner.beside(server, code_dir, folder.logs_dir, runtime, serving, on_node):
            local_runner.run_local(stages, code_dir, at_once, folder.logs_dir, watch, runtime, gpus)
        codes = local_runner.run_local([meta_stage(campaign, folder)], code_dir, 1, folder.logs_dir, watch, runtime)
        if codes["meta"]:
            tail = (folder.logs_dir / "meta.log").read_text().strip().splitlines()[-1:]
            raise WorkFailed(
                f"the meta stage ended with exit code {codes['meta']}: {' '.join(tail)}",
                f"Read {folder.logs_dir}/meta.log",
            )


def tasks_of(stages: Sequence[Sequence[stage_command.Stage]], ids: Mapping[str, Any]) -> dict[str, str]:
    """Arm (such as "r0001/a3") -> the job or array task that runs it, and "agent" -> the job of their model. ids: as `submit`."""
    return {
        f"{stage[2]}/{stage[3]}": job_id
        for array, job_ids in zip(stages, ids["task_job_ids"], strict=True)
        for stage, job_id in zip(array, job_ids, strict=True)
    } | ({"agent": ids["agent_job_id"]} if ids.get("agent_job_id") else {})


def is_local(folder: Round) -> bool:
    """Whether the frozen configuration runs the round on this machine."""
    return settings.load(folder.config).cluster.kind == "local"


def job_name(folder: Round) -> str:
    """How the names of the round's jobs begin."""
    return f"{folder.campaign.name}-{folder.name}"


def query(folder: Round, ids: Sequence[str]) -> slurm_jobs.Report:
    """Job id -> its state. All are unknown where Slurm's clients ask another cluster than the one that the round was submitted to."""
    if not ids:
        return slurm_jobs.Report({})
    clusters, here = slurm_jobs.clusters(folder), slurm_clients.cluster_name()
    if clusters and here and here not in clusters:
        said = f"the round was submitted to cluster {', '.join(sorted(clusters))}, and Slurm's clients here ask {here}"
        return slurm_jobs.Report({job_id: slurm_jobs.Job(job_id, UNKNOWN) for job_id in ids}, (said,))
    report = slurm_jobs.query_jobs(ids, job_names(folder), slurm_jobs.first_submitted(folder))
    ours = cancellers(folder)

    def named(job: slurm_jobs.Job) -> slurm_jobs.Job:
        is_ours = job.is_cancelled and not job.canceller and job.job_id in ours
        return replace(job, reason=f"by {ours[job.job_id]}") if is_ours else job

    return replace(report, jobs={job_id: named(job) for job_id, job in report.jobs.items()})


def cancellers(folder: Round) -> dict[str, int]:
    """Job id -> the user who cancelled it with our `cancel`, for sites whose Slurm does not tell."""
    lines = read_json_lines(folder.cancelled) if folder.cancelled.exists() else []
    return {job_id: int(line["uid"]) for line in lines for job_id in line["jobs"]}


def job_names(folder: Round) -> list[str]:
    """The names under which Slurm knows the round's jobs, reruns included."""
    rounds = [folder] if folder.number else [folder, folder.campaign.round("r0001")]
    return [f"{job_name(each)}-{role}" for each in rounds for role in ("arms", *ROLES[1:])]


def resources(folder: Round) -> sbatch_parameters.Resources:
    """What a frozen round asks of Slurm, as it was corrected."""
    chosen = corrections.of_round(folder)
    cluster = chosen.cluster
    return sbatch_parameters.Resources(
        job_name=job_name(folder),
        requests={role: cluster.request(role) for role in filter(chosen.worker.has_jobs, ROLES)},
        signal_lead_seconds=cluster.signal_lead_seconds,
        nodes=chosen.num_nodes,
        arms_at_once=cluster.arms_at_once,
        setup=tuple(cluster.setup),
        runtime=tuple(cluster.runtime),
        comment=str(anchor_of_plan(folder)),
    )


def anchor_of_plan(folder: Round) -> heads.Anchor:
    """The log anchor of the round's plan, which every job of the round has as its comment. It fixes the log up to the plan."""
    log = Log(folder.campaign.log)
    plans = [
        record["seq"] for record in log.records() if (record["event"], record.get("round")) == ("plan", folder.name)
    ]
    return log.anchor(plans[-1])


def reference_stage(campaign: Campaign, folder: Round) -> stage_command.Stage:
    return ("reference", str(campaign.folder), folder.name)


def meta_stage(campaign: Campaign, folder: Round) -> stage_command.Stage:
    return ("meta", str(campaign.folder), folder.name)


def verify_frozen(campaign: Campaign, folder: Round) -> tuple[Path, str]:
    """Compare code, image and plan with what was frozen. Returns the frozen code's folder and the plan's digest.

    Raises IntegrityError if one of them was changed.
    """
    facts = facts_of(campaign)
    code_dir = verified_code(campaign, facts)
    image.verify(campaign.image, facts["image"]["tree_digest"])
    _, digest = read_plan(folder)
    return code_dir, digest


def round_lock(folder: Round) -> AbstractContextManager[None]:
    """A lock that lets one `round` at a time work on a round. Entering it raises ConfigError elsewhere."""
    return exclusive_lock(folder.lock, f"`round` of {folder.name}")


@contextmanager
def patient_round_lock(folder: Round, seconds: float) -> Iterator[None]:
    """As `round_lock`, but wait for so long: arms that end at a common time limit each submit a job for themselves."""
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(round_lock(folder))
                break
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield


def failed_nodes(folder: Round, arms: Iterable[str], jobs: Mapping[str, slurm_jobs.Job]) -> list[str]:
    """Nodes that failed, as Slurm says, while one of these arms ran there; `rerun` excludes them.

    An arm that vanished is no sign of a bad node by itself: several arms share one, and a process can be killed on a good one.

    jobs: arm, such as "r0001/a3" -> the state of its newest job.
    """
    vanished: set[str] = set()
    failed: set[str] = set()
    for arm in arms:
        job = jobs.get(f"{folder.name}/{arm}")
        for attempt in folder.attempts(arm)[-1:]:
            if attempt.claim.exists() and not attempt.result.exists() and not attempt.interrupted.exists():
                node = str(_claim(attempt.claim).get("node") or "")
                (failed if job and job.state == "NODE_FAIL" else vanished).add(node)
    return sorted((failed | slurm_clients.failed_nodes(vanished - {""})) - {""})


def _claim(path: Path) -> dict[str, Any]:
    with suppress(OSError, PipelineError):
        return dict(read_json(path))
    return {}
