"""The worker: run one arm from its claim to its published result, with the round's folder as the only input.

    claim -> mount and verify -> warm up kernels -> fork -> probe -> train in the fork -> check the adapter -> sealed.json
          -> items (only now is the fresh seed read) -> generate -> score -> verify again -> publish

Every end is recorded in a result file: a score, or the reason why there is none. A crash has no score. The worker runs in a private
mount namespace (sandbox/namespace.py), so that no mount outlives it, and it publishes only while its attempt is the newest.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pipeline.campaign.errors import (
    ConfigError,
    FilesUnreachable,
    IntegrityError,
    Interrupted,
    NotFound,
    PipelineError,
    TrialFailed,
    WorkFailed,
)
from pipeline.campaign.facts import facts_of, load_constitution, read_plan, verified_code
from pipeline.campaign.files import copy_tree, read_json, write_file
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.config import corrections, footprint, model_size, settings
from pipeline.execution import adapter, data_card, image_process, judge, multinode, results, resume, trial
from pipeline.execution.attempt import ByAgent, Work, conclude, mark_training, seal_adapter, write_task
from pipeline.execution.cores import cores
from pipeline.sandbox import bubblewrap, image, kernel_cache, namespace, runtime_needs
from pipeline.sandbox.kernel_cache import Kernels

KNOWN_PROMPTS = "data/train_prompts.sha256"  # in the image


def work(
    campaign: Campaign,
    folder: Round,
    arm_name: str,
    plan_digest: str | None = None,
    by_agent: ByAgent | None = None,
) -> Attempt | None:
    """Run one arm of a frozen round and return its attempt; None where the arm has a published score already.

    by_agent: trains the arms that the configuration gives to an agent.

    Before it claims an attempt, it raises NotFound where this Python lacks a package, and IntegrityError where code, constitution or plan
    are not the frozen ones. Once it has published a failure, it raises the error that the outcome records.
    """
    if missing := runtime_needs.lacking():
        raise NotFound(f"{sys.executable} lacks {', '.join(missing)}", runtime_needs.CURE)
    facts = facts_of(campaign)
    verified_code(campaign, facts)
    frozen, digest = read_plan(folder, plan_digest)
    arm = next((arm for arm in frozen.arms if arm.name == arm_name), None)
    if arm is None:
        raise ConfigError(
            f"{folder.name} has no arm {arm_name!r}", f"Valid: {', '.join(arm.name for arm in frozen.arms)}"
        )
    if results.has_score(folder.published(arm_name)):
        return None
    chosen = settings.with_overrides(corrections.of_round(folder), arm.overrides)
    attempt = folder.claim_attempt(arm_name)
    task_cores = cores(chosen)
    claim = {
        "host": platform.node(),
        "node": os.environ.get("SLURMD_NODENAME", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "pid": os.getpid(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
        "plan_digest": digest,
        "runtime": runtime_needs.describe(),
        **task_cores,
    }
    write_file(attempt.claim, json.dumps(claim))
    num_restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    job = Work(campaign, folder, facts, frozen, digest, arm, chosen, attempt, by_agent=by_agent)
    job.coverage["cores"] = f"{task_cores['cores']} ({task_cores['core_list']})"
    job.mark("claim")
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: job.stop.set())
    try:
        # An agent's session begins anew, and its budget ends its starts. Its judging goes on as any other.
        if not chosen.worker.runs(arm.role) or any(map(resume.sealed_record, job.before)):
            resume.check_progress(job.before, num_restarts, chosen.cluster.file_wait_seconds)
        run(job)
        conclude(job, "completed", "completed")
    except Interrupted as error:
        write_file(attempt.interrupted, json.dumps({"what": error.what}))
        job.mark("interrupted")
        raise
    except PipelineError as error:
        what = str(error)
        if error.kind == "out_of_memory":
            what += f"\nplanned: {footprint.of_arm(chosen.to_dict())['training']} a rank"
        conclude(job, "failed", error.kind, f"{what}\n\n{traceback.format_exc()}")
        raise
    except Exception as error:
        conclude(job, "failed", "worker_crashed", traceback.format_exc())
        raise WorkFailed(
            f"the worker itself failed: {error!r}",
            f"The files in {attempt.folder} say how far it got; start the arm again",
        ) from error
    return attempt


def run(job: Work) -> None:
    """Train and judge the arm: everything between claim and publication."""
    job.mark("mount")
    with namespace.scratch_folder(job.chosen.cluster.scratch_dir or None, "arm-") as scratch:
        with image.mounted(job.campaign.image, job.plan.image_digest, scratch) as mount:
            job.coverage |= {"sandbox": "bubblewrap", "mount": mount.backend}
            kernels = warm_kernels(job, mount, scratch)
            kept = None
            if job.arm.role != "base":
                kept = job.attempt.adapter_dir
                if not restore_sealed(job, mount):
                    train(job, mount, scratch, kernels)
            seal_adapter(job)
            resume.restore_decoded(job.attempt, job.before, job.plan_digest, job.adapter_digest)
            seeds = read_json(job.campaign.seeds)
            repaired = dict(job.plan.policy.repaired)
            wanted = {"dev": judge.dev_seeds(seeds, job.chosen.tasks.families, repaired)}
            fresh = f"fresh/{job.folder.name}"
            if fresh in seeds and not job.folder.closed.exists():
                wanted["fresh"] = seeds[fresh]  # a closed round's seed is public, and its items test nothing
            card = job.attempt.data_card
            job.judged = judge.judge(
                mount.root, job.chosen, kept, wanted, scratch, job.attempt.judge_log, job.mark, job.attempt.decoded_dir,
                job.stop_wanted, card if card.exists() else None, kernels=kernels, look=job.look,
            )  # fmt: skip
            job.coverage["engine"] = job.judged.engine
            job.mark("publish")


def restore_sealed(job: Work, mount: image.Mount) -> bool:
    """Reuse the adapter that an interrupted attempt trained and sealed; False where there is none.

    Raises IntegrityError where an agent edited what was trained, and its report is no longer there: the score would count for its recipe.
    """
    trained = resume.restore_sealed(job.attempt, job.before, job.plan_digest)
    if trained is None:
        return False
    earlier = next(each for each in job.before if each.number == trained.number)
    if job.by_agent is not None and job.chosen.worker.runs(job.arm.role):
        job.by_agent.resume(job, earlier, mount)
    if job.edited_files != resume.sealed_record(earlier).get("edited_files", 0):
        raise IntegrityError(
            f"{earlier.agent_report} does not say what was edited in the sealed adapter",
            f"Restore it from a copy, or remove {earlier.folder} and start the arm again; it then trains anew",
        )
    job.adapter_digest = trained.adapter_digest
    job.coverage["trained_by_attempt"] = trained.number
    return True


def warm_kernels(job: Work, mount: image.Mount, scratch: Path) -> Kernels | None:
    """Have what compiles and tunes on this node at hand, and record its digest; the first worker here makes it, before any trial runs."""
    if not image_process.compiles(job.chosen):
        return None
    job.mark("warm_up")
    log_path = job.attempt.folder / "warm_up.log"
    kernels = image_process.warm_kernels(mount, job.chosen, scratch, log_path, job.check_stop)
    if kernels:
        job.coverage["kernels"] = kernels.said
    return kernels


def train(job: Work, mount: image.Mount, scratch: Path, kernels: Kernels | None) -> None:
    """Fork the image, probe the sandbox, train in it, and keep the checked adapter."""
    num_nodes, shared = job.chosen.num_nodes, job.attempt.folder / "nodes"
    out_dir = (shared if num_nodes > 1 else scratch) / "out"  # ranks on every node write there
    out_dir.mkdir(parents=True)
    # Closed to others, because a trial could leave a set-uid program there.
    out_dir.parent.chmod(0o700)
    is_agents = job.chosen.worker.runs(job.arm.role)
    try:
        if not is_agents:  # an agent begins anew, because a state belongs to the code that it was saved by
            restore(job, out_dir)
        base, bound = image_process.base_of(mount.root, job.chosen)
        write_task(job, job.attempt, base, asdict(job.chosen.recipe))
        with image.forked(mount, scratch, namespace.trial_uid()) as fork:
            job.coverage["fork"] = fork.backend
            if is_agents:
                assert job.by_agent is not None, "whoever starts a worker hands in pipeline.agent.arm"
                job.by_agent.train(job, mount, fork, bound, out_dir, scratch, kernels)
            else:
                own = image_process.kernel_bind(job.chosen, kernels, scratch / "trial_kernels", namespace.trial_uid())
                train_confined(job, bound, fork.root, out_dir, num_nodes, shared, own)
        job.mark("check")
        keep_outputs(job, mount, out_dir)
    finally:
        if num_nodes > 1:
            write_file(shared / "over", "")
            namespace.remove_tree(out_dir)


def restore(job: Work, out_dir: Path) -> None:
    """Copy the newest state that an earlier attempt kept into /out, if there is one."""
    saved = resume.newest_state(job.before)
    if saved:
        copy_tree(saved, out_dir)
        uid = namespace.trial_uid()
        for path in out_dir.rglob("*"):
            os.chown(path, uid, uid, follow_symlinks=False)  # a trial made these, so they may be links


def train_confined(
    job: Work,
    bound: Mapping[str, Path],
    fork_root: Path,
    out_dir: Path,
    num_nodes: int,
    shared: Path,
    own: Mapping[str, Path],
) -> None:
    """Probe the sandbox, then train in it; on several nodes, together with the helpers."""
    address, port = multinode.rendezvous_address()
    env = multinode.rendezvous_env(num_nodes, 0, address, port)
    confined = multinode.training_sandbox(job.chosen, job.attempt, bound, fork_root, out_dir, env, own)
    if gpus := [path for path in confined.devices if re.fullmatch(r"/dev/nvidia\d+", path)]:
        job.coverage["gpus"] = ",".join(gpus)
        print(f"this arm has {job.coverage['gpus']} of {platform.node()}", file=sys.stderr, flush=True)
    job.mark("probe")
    forbidden, rules = forbidden_paths(job), load_constitution(job.plan.constitution_digest)
    job.coverage["probe"] = multinode.probe(confined, forbidden, rules, num_nodes, job.attempt.probe)
    job.mark("train_start")
    if num_nodes == 1:
        train_watched(job, confined, out_dir)
        return
    order = {
        "num_nodes": num_nodes, "address": address, "port": port, "out_dir": str(out_dir),
        "forbidden": {name: str(path) for name, path in forbidden.items()},
    }  # fmt: skip
    wait_seconds = job.chosen.cluster.file_wait_seconds
    train_watched(job, multinode.MultiNodeSandbox(confined, shared, num_nodes, order, wait_seconds), out_dir)
    job.coverage["nodes"] = multinode.check_probes(shared, num_nodes, wait_seconds)


def keep_outputs(job: Work, mount: image.Mount, out_dir: Path) -> None:
    """Check the trial's data card and adapter, and keep them in the attempt's folder."""
    model, lora = asdict(job.chosen.model), asdict(job.chosen.recipe.lora)
    shapes = model_size.adapter_shapes(model, lora["rank"], lora["targets"])
    lora["targets"] = model_size.peft_modules(model, lora["targets"])
    job.coverage["data_card"] = data_card.check_and_keep(out_dir, job.attempt.data_card, mount.root / KNOWN_PROMPTS)
    job.adapter_digest = adapter.check_and_keep(out_dir, shapes, lora, job.attempt.adapter_dir)


def train_watched(job: Work, confined: bubblewrap.Sandbox | multinode.MultiNodeSandbox, out_dir: Path) -> None:
    """Train, and keep the trial's state outside the node. A trial that stalls is killed and resumes once from its checkpoint."""
    keeper = resume.Keeper(out_dir, job.attempt.saved_dir)
    stall_seconds = 60.0 * job.chosen.cluster.stall_minutes
    for is_last in (False, True):
        try:
            try:
                trial.train(confined, job.attempt, out_dir, stall_seconds, job.stop_wanted, keeper.keep_if_new)
            finally:
                mark_training(job)
            return
        except Interrupted:
            with suppress(
                OSError, FilesUnreachable
            ):  # where the state cannot be copied, the next attempt resumes from an older one
                resume.keep_state(out_dir, job.attempt.saved_dir)
            raise
        except TrialFailed as error:
            if error.kind != "stalled" or is_last:
                raise
            job.mark("stalled", detail=error.what)
            job.mark("train_start")


def forbidden_paths(job: Work) -> dict[str, Path]:
    """Return what the probe must not find inside: the campaign's files and the machine's job services."""
    campaign = job.campaign
    return {
        "kernels": kernel_cache.store_of(job.chosen.cluster.scratch_dir),
        "vault": campaign.vault,
        "ledger": campaign.ledger,
        "log": campaign.log,
        "constitution": campaign.code_dir,
        "other_arms": job.folder.folder,
        "earlier_rounds": campaign.folder / "rounds",
        "munge": Path("/run/munge"),
        "slurm_conf": Path(os.environ.get("SLURM_CONF", "/etc/slurm")),
    }
