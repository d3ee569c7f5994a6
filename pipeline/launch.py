"""`round`: freeze the next round and start it. Freezing needs no cluster; starting reads only what was frozen.

Frozen before submission: configuration, plan, sbatch texts. Then one array of eight workers and one meta job go to Slurm and the
command returns; with cluster=local the same stages run here as child processes, as many arms at once as fit, and the command waits.
A round that was interrupted locally, or has too few scores to decide, goes on when it is called again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline import constitution, heads, image, jobs, plan, proposers, referee, results, scheduler, seal, settings
from pipeline.campaign import (
    check_plan_fits,
    facts_of,
    freeze_plan,
    gpus_of_arm,
    is_operational,
    plan_basis,
    read_plan,
    verified_code,
)
from pipeline.errors import ConfigError, NotFound, Refused, WorkFailed
from pipeline.layout import Campaign, Round, alone, read_json, write_file
from pipeline.records import Arm, Plan

MAY_DIFFER = ("arm", "campaign", "cluster", "round")
"""Parts of the configuration that are where and when a round runs, and not what it computes."""


def next_round(campaign: Campaign) -> str:
    """The newest round that has overrides: the one to freeze, to continue, or to wait for. Raises NotFound without any."""
    rounds = campaign.known_rounds()
    if not rounds:
        raise NotFound(
            f"{campaign.folder} is not a campaign", "Choose a folder that does not exist, and `round` makes one"
        )
    return rounds[-1]


def freeze(campaign: Campaign, round_name: str, overrides: Sequence[str], *, is_draft: bool = False) -> Round:
    """Write plan, configuration and sbatch texts of a round; a frozen round is left as it is.

    is_draft: for a copy that nobody will run: no proposer is asked.

    Raises ConfigError for overrides that change what a campaign computes, Refused by articles 2 and 4, IntegrityError by digests.
    """
    facts = facts_of(campaign)
    folder = campaign.round(round_name)
    computing = [item for item in overrides if not is_operational(item)]
    if computing and computing != facts["overrides"]:
        raise ConfigError(
            f"campaign {campaign.name} was frozen with {facts['overrides']}, now came {computing}",
            "Only cluster=... may change between rounds; for another configuration start another campaign (CAMPAIGN=...)",
        )
    code_dir = verified_code(campaign, facts)
    rules = constitution.load(facts["constitution_digest"])
    rules.check_round(folder.number)
    if round_name not in campaign.known_rounds():
        raise ConfigError(f"round {round_name} has no overrides yet", f"Known: {', '.join(campaign.known_rounds())}")
    operational = [item for item in overrides if is_operational(item)]
    every = [*facts["overrides"], *operational, f"+round={round_name}"]
    chosen = settings.compose(every, source=code_dir / "hydra_conf", campaign_dir=campaign.folder)
    if not folder.plan.exists():
        check_plan_fits(chosen)
        if chosen.cluster.kind == "local":  # a frozen round cannot take another runtime
            scheduler.command(meta_stage(campaign, folder), chosen.cluster.runtime)
        policy, records = settings.policy_of(chosen), seal.Log(campaign.log).records()
        if any(record["event"] == "end" for record in records):
            raise ConfigError(f"campaign {campaign.name} has ended: its dev items are public", "Start another campaign")
        check_unchanged(campaign, chosen, round_name)
        referee.check_policy(records, round_name, policy)
        arms = plan.arms_of(chosen, folder.number, rules)
        spent = check_budget(campaign, chosen, len(arms), rules)
        with held(folder):
            if not folder.plan.exists():  # another `round` may have been faster
                if not is_draft:
                    arms = proposers.with_proposals(folder, chosen, arms, rules)
                write_file(folder.operational, json.dumps(operational))
                _write(campaign, folder, facts, code_dir, chosen, plan_basis(chosen, policy, spent), arms)
    read_plan(folder)
    if operational and settings.load(folder.config).cluster != chosen.cluster:
        raise ConfigError(
            f"round {round_name} is frozen for another cluster than {operational}",
            "Leave the cluster out, or as it was; the next round may run elsewhere",
        )
    return folder


def rehearse(campaign: Campaign, folder: Round) -> None:
    """Compose a frozen round again, for nothing: what the next one then finds loaded takes it half a second less."""
    facts = facts_of(campaign)
    overrides = [*facts["overrides"], *read_json(folder.operational), f"+round={folder.name}"]
    settings.compose(overrides, verified_code(campaign, facts) / "hydra_conf", campaign.folder)
    for each in (campaign.round("r0000"), folder):
        settings.load(each.config)


def check_unchanged(campaign: Campaign, chosen: settings.Settings, round_name: str) -> None:
    """What a campaign froze (model, recipe, tasks, the external target, who proposes) no round's file may change. Raises Refused by article 8."""
    frozen, now = settings.load(campaign.round("r0000").config).to_dict(), chosen.to_dict()
    for each in (frozen, now):
        each["proposals"] = each.pop("policy")["proposals"]
    changed = sorted(key for key, value in frozen.items() if key not in MAY_DIFFER and value != now[key])
    if changed:
        raise Refused(
            "8", "settings_changed", f"{round_name} would be planned with another {', '.join(changed)} than the campaign froze",
            f"Restore hydra/round/{round_name}.yaml; what a person wants to change needs a new campaign",
        )  # fmt: skip


def check_budget(campaign: Campaign, chosen: settings.Settings, num_arms: int, rules: constitution.Constitution) -> int:
    """What the round could cost at most, beside what was spent, against article 4; returns the GPU-seconds spent. Raises Refused."""
    recipe, gpus = chosen.recipe, gpus_of_arm(chosen)
    ended = [
        path for path in campaign.folder.glob("rounds/*/a*/attempt_*/result.h5") if gpus and results.status_of(path)
    ]
    spent = sum(results.read_attributes(path)["gpu_seconds"] for path in ended)
    rules.check_spending(
        recipe.num_steps * recipe.batch_size * recipe.sequence_length,
        Fraction(gpus * chosen.cluster.time_limit_minutes, 60),
        num_arms,
        Fraction(int(spent), 3600),
    )
    return int(spent)


def arrays(campaign: Campaign, folder: Round) -> list[list[scheduler.Stage]]:
    """The worker stages of a round: its eight arms, and r0000's two where they are not published yet."""
    waiting: list[list[scheduler.Stage]] = []
    for of_round in (folder, campaign.round("r0000")):
        frozen, digest = read_plan(of_round)
        missing = [arm for arm in frozen.arms if results.status_of(of_round.published(arm.name)) != "completed"]
        if of_round is folder or missing:
            arms = frozen.arms if of_round is folder else missing
            waiting.append(
                [("worker", str(campaign.folder), of_round.name, arm.name, "--plan", digest) for arm in arms]
            )
    return waiting


def submit(campaign: Campaign, folder: Round) -> dict[str, object]:
    """Hand a frozen round to Slurm; returns what `submitted.json` holds. Raises ConfigError when it was submitted before."""
    with held(folder):
        if folder.submitted.exists():
            ids = read_json(folder.submitted).get("array_job_ids", [])
            raise ConfigError(
                f"round {folder.name} is submitted already (jobs {', '.join(ids)})",
                f"`python -m pipeline status {campaign.folder}` shows it; `python -m pipeline meta` closes it when its arms are done",
            )
        code_dir, digest = verified(campaign, folder)
        seal.Log(campaign.log).append_once("slurm_submission", round=folder.name, plan_digest=digest, kind="slurm")
        stages = arrays(campaign, folder)
        beside: scheduler.Stage = ("reference", str(campaign.folder), folder.name)
        meta = meta_stage(campaign, folder)
        ids = scheduler.submit(folder.slurm_dir, code_dir, stages, meta, resources(folder), beside)
        tasks = tasks_of(stages, ids) | {"reference": ids["reference_job_id"]}
        jobs.record_submission(folder, tasks, ids["meta_job_id"], "round")
        record = {**ids, "plan_digest": digest, "submitted_at": datetime.now(UTC).isoformat(timespec="seconds")}
        write_file(folder.submitted, seal.canonical(record))
        return record


def run_here(campaign: Campaign, folder: Round, watch: Callable[[], None], only: Sequence[str] = ()) -> None:
    """Run a frozen round on this machine: the arms that have no score yet (of it, `only` those), then the meta stage.

    Raises WorkFailed when the meta stage fails, ConfigError when the round belongs to Slurm or runs already.
    """
    with held(folder):
        if folder.submitted.exists() and read_json(folder.submitted)["kind"] == "slurm":
            raise ConfigError(
                f"round {folder.name} was submitted to Slurm", f"`python -m pipeline status {campaign.folder}` shows it"
            )
        code_dir, digest = verified(campaign, folder)
        seal.Log(campaign.log).append_once("slurm_submission", round=folder.name, plan_digest=digest, kind="local")
        write_file(folder.submitted, seal.canonical({"kind": "local", "pid": os.getpid(), "plan_digest": digest}))
        chosen = settings.load(folder.config)
        stages = [
            stage
            for array in arrays(campaign, folder)
            for stage in array
            if results.status_of(campaign.round(stage[2]).published(stage[3])) != "completed"
            and (not only or (stage[2] == folder.name and stage[3] in only))
        ]
        at_once = chosen.cluster.arms_at_once or max(1, available_cores() // chosen.parallelism.world_size)
        scheduler.run_local(stages, code_dir, at_once, folder.logs_dir, watch, chosen.cluster.runtime)
        codes = scheduler.run_local(
            [meta_stage(campaign, folder)], code_dir, 1, folder.logs_dir, watch, chosen.cluster.runtime
        )
        if codes["meta"]:
            tail = (folder.logs_dir / "meta.log").read_text().strip().splitlines()[-1:]
            raise WorkFailed(f"the meta stage exited {codes['meta']}: {' '.join(tail)}", f"See {folder.logs_dir}")


def tasks_of(stages: Sequence[Sequence[scheduler.Stage]], ids: Mapping[str, Any]) -> dict[str, str]:
    """ "r0001/a3" -> the job or array task that has it."""
    return {
        f"{stage[2]}/{stage[3]}": job_id
        for array, job_ids in zip(stages, ids["task_job_ids"], strict=True)
        for stage, job_id in zip(array, job_ids, strict=True)
    }


def is_local(folder: Round) -> bool:
    """Whether the frozen configuration runs the round on this machine."""
    return settings.load(folder.config).cluster.kind == "local"


def resources(folder: Round, chosen: settings.Settings | None = None) -> scheduler.Resources:
    """What the frozen configuration of a round, or the one that it is being frozen with, asks of Slurm."""
    chosen = chosen or settings.load(folder.config)
    cluster = chosen.cluster
    flags = ("partition", "account", "qos", "reservation", "constraint")
    return scheduler.Resources(
        job_name=f"{folder.folder.parent.parent.name}-{folder.name}",
        time_limit_minutes=cluster.time_limit_minutes,
        cpus_per_task=cluster.cpus_per_task,
        gpus_per_node=cluster.gpus_per_node,
        mem_gb=cluster.mem_gb,
        signal_lead_seconds=cluster.signal_lead_seconds,
        nodes=chosen.num_nodes,
        arms_at_once=cluster.arms_at_once,
        setup=tuple(cluster.setup),
        runtime=tuple(cluster.runtime),
        flags=tuple((name, getattr(cluster, name)) for name in flags if getattr(cluster, name)),
        comment=str(anchor_of_plan(folder)),
    )


def anchor_of_plan(folder: Round) -> heads.Anchor:
    """The round's plan in the sealed log, and with it everything before: what each of its jobs carries as its comment."""
    log = seal.Log(folder.campaign.log)
    planned = [one["seq"] for one in log.records() if (one["event"], one.get("round")) == ("plan", folder.name)]
    return log.anchor(planned[-1])


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def _write(
    campaign: Campaign, folder: Round, facts: Mapping[str, Any], code_dir: Path, chosen: settings.Settings, basis: Mapping[str, Any],
    arms: tuple[Arm, ...],
) -> None:  # fmt: skip
    config, policy = settings.to_yaml(chosen), settings.policy_of(chosen)
    digests = (facts["image"]["tree_digest"], facts["constitution_digest"], facts["code_digest"])
    frozen = Plan(facts["campaign"], folder.name, *digests, seal.digest_text(config), policy, arms)
    freeze_plan(campaign, frozen, config, basis)
    texts = scheduler.sbatch_texts(folder.slurm_dir, code_dir, arrays(campaign, folder), resources(folder, chosen))
    for name, text in texts.items():
        write_file(folder.slurm_dir / f"{name}.sbatch", text)


def meta_stage(campaign: Campaign, folder: Round) -> scheduler.Stage:
    return ("meta", str(campaign.folder), folder.name)


def verified(campaign: Campaign, folder: Round) -> tuple[Path, str]:
    """The frozen code's folder and the plan's digest, after everything that jobs rely on was compared with what was frozen."""
    facts = facts_of(campaign)
    code_dir = verified_code(campaign, facts)
    image.verify(campaign.image, facts["image"]["tree_digest"])
    _, digest = read_plan(folder)
    return code_dir, digest


def held(folder: Round) -> AbstractContextManager[None]:
    """One `round` at a time for one round. Raises ConfigError while another holds it."""
    return alone(folder.folder / ".lock", f"`round` of {folder.name}")
