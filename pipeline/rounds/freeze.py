"""Freeze a round: check and log its configuration, its plan and its sbatch texts before anything is submitted."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.campaign import canonical, constitution
from pipeline.campaign.errors import ConfigError, NotFound, PipelineError, Refused
from pipeline.campaign.facts import facts_of, load_constitution, read_plan, verified_code
from pipeline.campaign.files import read_json, write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.campaign.records import Arm, Plan, Policy
from pipeline.cluster import forecast, sbatch_parameters, slurm_submit, stage_command
from pipeline.config import corrections, decoding, settings
from pipeline.config.fit import check_plan_fits, gpus_of_arm, with_recompute
from pipeline.decision import derive
from pipeline.execution import results
from pipeline.external import proposers
from pipeline.model_calls import model_server
from pipeline.rounds.arms import arms_of
from pipeline.rounds.launch import arrays, job_name, meta_stage, resources, round_lock, was_begun


def freeze_plan(campaign: Campaign, frozen: Plan, config_yaml: str, basis: Mapping[str, Any]) -> str:
    """Log a plan, then write it and its configuration. Returns the plan's digest. A plan that is logged already is not logged again.

    basis: the values of the configuration that the arms follow from (`plan_basis`), so that an audit need not read YAML.
    """
    digest = canonical.digest(frozen.to_json())
    Log(campaign.log).append_once("basis", round=frozen.round, **basis)
    Log(campaign.log).append_once("plan", round=frozen.round, plan_digest=digest, plan=frozen.to_json())
    folder = campaign.round(frozen.round)
    write_file(folder.config, config_yaml)
    write_file(folder.plan, canonical.encoded(frozen.to_json()))
    return digest


def plan_basis(chosen: settings.Settings, policy: Policy, spent_gpu_seconds: int) -> dict[str, Any]:
    """The values of a configuration that the round's arms, items and cost follow from, as text and integers.

    spent_gpu_seconds: what all attempts before this round used.
    """
    keys = [axis.key for axis in policy.axes] + [contrast.key for contrast in policy.contrasts]
    tasks, recipe, gpus = chosen.tasks, chosen.recipe, gpus_of_arm(chosen)
    return {
        "config_digest": canonical.digest_text(settings.to_yaml(chosen)),
        "seed": chosen.seed,
        "reference": {key: settings.value_of(chosen, key) for key in keys},
        "tasks": {
            "families": list(tasks.families),
            "level": tasks.level,
            "num_dev_per_family": tasks.num_dev_per_family,
            "num_fresh_per_family": tasks.num_fresh_per_family,
            "dev_slices": {
                family: {
                    feature: {end: str(number) for end, number in ends.items()} for feature, ends in limits.items()
                }
                for family, limits in tasks.dev_slices.items()
            },
        },
        "proposals": {"kind": chosen.policy.proposals.kind, "mode": chosen.policy.proposals.mode},
        "external": chosen.external.kind,
        "tokens_per_arm": recipe.num_steps * recipe.batch_size * recipe.sequence_length,
        "gpus_per_arm": gpus,
        "time_limit_minutes": chosen.cluster.time_limit_minutes,
        "spent_gpu_seconds": spent_gpu_seconds,
    }


def write_overrides(campaign: Campaign, round_name: str, content: Mapping[str, Any]) -> None:
    """Write the override file of a round. content: strings, whole numbers and lists of these; never a time, a host or a path."""
    write_file(campaign.overrides(round_name), canonical.overrides_text(content))


def is_operational(override: str) -> bool:
    """Whether an override says where or when a round runs, and not what it computes. Only such overrides may change between rounds."""
    return override.lstrip("+~").startswith(("cluster=", "cluster.", "campaign."))


def frozen_words(facts: Mapping[str, Any]) -> list[str]:
    """The overrides of a campaign: those that were typed, and what `auto` was settled as at `init`, so that no later round settles it anew."""
    return [*facts["overrides"], *decoding.words_of(facts["settled"])]


ROUNDS_WORD = "policy.rounds="
MAY_DIFFER = ("arm", "campaign", "cluster", "round")
"""Parts of the configuration that say where and when a round runs, and not what it computes."""


def next_round(campaign: Campaign) -> str:
    """The newest round that has overrides: the one to freeze, to continue, or to wait for. Raises NotFound if there is none."""
    rounds = campaign.known_rounds()
    if not rounds:
        raise NotFound(
            f"{campaign.folder} is not a campaign",
            "Name a folder that does not exist, and `round` makes a campaign there",
        )
    return rounds[-1]


def freeze(campaign: Campaign, round_name: str, overrides: Sequence[str], *, is_draft: bool = False) -> Round:
    """Write the plan, the configuration and the sbatch texts of a round. A round that is frozen already is left as it is.

    is_draft: for a dry run, in which no proposer is asked.

    A frozen round that was never begun gets the Slurm settings among the overrides.

    Raises ConfigError for overrides that change what a campaign computes, Refused by articles 2, 4 and 8, and IntegrityError if something
    frozen was changed.
    """
    facts = facts_of(campaign)
    folder = campaign.round(round_name)
    check_overrides(campaign, facts, overrides)
    code_dir = verified_code(campaign, facts)
    rules = load_constitution(facts["constitution_digest"])
    rules.check_round(folder.number, facts["design"]["rounds"])
    if round_name not in campaign.known_rounds():
        raise ConfigError(f"round {round_name} has no overrides yet", f"Known: {', '.join(campaign.known_rounds())}")
    operational = given = [item for item in overrides if is_operational(item)]
    if is_frozen := folder.plan.exists():
        operational = corrections.merged(read_json(folder.operational), given)
    every = [*frozen_words(facts), *operational, f"+round={round_name}"]
    chosen = settings.compose(every, source=code_dir / "hydra_conf", campaign_dir=campaign.folder)
    if not is_frozen:
        arms, basis = plan_arms(campaign, folder, chosen, rules)
        with round_lock(folder):
            if not folder.plan.exists():  # another process may have frozen the round meanwhile
                if not is_draft:
                    arms = proposers.with_proposals(folder, chosen, arms, rules)
                chosen = with_recompute(chosen, [arm.overrides for arm in arms])
                basis = {**basis, "config_digest": canonical.digest_text(settings.to_yaml(chosen))}
                write_file(folder.operational, json.dumps(operational))
                _write(campaign, folder, facts, code_dir, chosen, basis, arms)
    read_plan(folder)
    if is_frozen and given and corrections.changes(folder, chosen):
        correct_request(campaign, folder, chosen, operational, code_dir)
    return folder


def correct_request(
    campaign: Campaign, folder: Round, chosen: settings.Settings, operational: Sequence[str], code_dir: Path
) -> None:
    """Log and write what the jobs of a frozen round ask of Slurm now. Plan and configuration stay as they are sealed.

    chosen: the configuration with the corrections. Raises ConfigError if the round was begun, or for a key that cannot be corrected.
    """
    check_plan_fits(chosen)
    with round_lock(folder):
        changed = corrections.changes(folder, chosen)
        if was_begun(folder):
            raise ConfigError(
                f"round {folder.name} was begun, and its jobs ask for other settings than {', '.join(f'{k}={v}' for k, v in changed.items())}",
                "Leave these out; the next round may ask for others",
            )
        content = corrections.encoded(chosen)
        digest, plan_digest = canonical.sha256(content), read_plan(folder)[1]
        Log(campaign.log).append(
            "slurm_request", round=folder.name, plan_digest=plan_digest, sha256=digest, changed=changed
        )
        write_file(folder.slurm_request, content)
        write_file(folder.operational, json.dumps(list(operational)))
        write_sbatch_texts(campaign, folder, code_dir)
    told = ", ".join(f"{key}={value}" for key, value in changed.items())
    print(f"the jobs of {folder.name} ask Slurm for {told} now; its plan stays as it is sealed", file=sys.stderr)


def check_overrides(campaign: Campaign, facts: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise ConfigError for overrides that would change what the campaign computes.

    A number of rounds that `campaign --rounds N` chose for the person need not be typed again.
    """
    computing, frozen = [item for item in overrides if not is_operational(item)], list(facts["overrides"])
    if not any(item.startswith(ROUNDS_WORD) for item in computing):
        frozen = [item for item in frozen if not item.startswith(ROUNDS_WORD)]
    if computing and computing != frozen:
        raise ConfigError(
            f"campaign {campaign.name} was frozen with {' '.join(facts['overrides']) or 'no overrides'}, now came {' '.join(computing)}",
            "Give the same words again (EXPERIMENT=, OVERRIDES=) or none: only cluster=... may change between rounds. "
            "For another configuration start another campaign (CAMPAIGN=...)",
        )


def plan_arms(
    campaign: Campaign, folder: Round, chosen: settings.Settings, rules: constitution.Constitution
) -> tuple[tuple[Arm, ...], dict[str, Any]]:
    """The arms of a round that is not frozen yet, before proposals, and its basis. Raises as `freeze`."""
    check_plan_fits(chosen)
    if chosen.cluster.kind == "local":  # fails now if the runtime is missing: a frozen round cannot get another
        stage_command.command(meta_stage(campaign, folder), chosen.cluster.runtime)
    policy, records = settings.policy_of(chosen), Log(campaign.log).records()
    if any(record["event"] == "end" for record in records):
        raise ConfigError(
            f"campaign {campaign.name} has ended, so its dev items are public and no round may follow",
            "Start another campaign",
        )
    check_unchanged(campaign, chosen, folder.name)
    derive.check_policy(records, folder.name, policy)
    arms = arms_of(chosen, folder.number, rules)
    return arms, plan_basis(chosen, policy, check_budget(campaign, chosen, len(arms), rules))


def rehearse(campaign: Campaign, folder: Round) -> None:
    """Compose a frozen round again and drop the result: what that loads saves the next `freeze` in this process half a second."""
    facts = facts_of(campaign)
    overrides = [*frozen_words(facts), *read_json(folder.operational), f"+round={folder.name}"]
    settings.compose(overrides, verified_code(campaign, facts) / "hydra_conf", campaign.folder)
    for of_round in (campaign.round("r0000"), folder):
        settings.load(of_round.config)


def check_unchanged(campaign: Campaign, chosen: settings.Settings, round_name: str) -> None:
    """Raise Refused (article 8) if a round's file changes what the campaign froze: model, recipe, tasks, external target,
    proposer, what is kept, or how and over how many rounds an improvement is confirmed."""
    frozen, now = settings.load(campaign.round("r0000").config).to_dict(), chosen.to_dict()
    for configuration in (frozen, now):
        configuration["parallelism"].pop(
            "recompute"
        )  # how a round computes, and not what: each round's plan chooses it
        policy = configuration.pop("policy")
        configuration |= {f"policy.{name}": policy[name] for name in ("proposals", "choice", "confirmation", "rounds")}
    changed = sorted(key for key, value in frozen.items() if key not in MAY_DIFFER and value != now[key])
    if changed:
        raise Refused(
            "8", "settings_changed", f"{round_name} would be planned with another {', '.join(changed)} than the campaign froze",
            f"Restore hydra/round/{round_name}.yaml; to change these settings start a new campaign",
        )  # fmt: skip


def check_budget(campaign: Campaign, chosen: settings.Settings, num_arms: int, rules: constitution.Constitution) -> int:
    """Check the most that the round could cost, with what was spent, against article 4. Returns the GPU-seconds spent. Raises Refused."""
    gpus = gpus_of_arm(chosen)
    ended = [
        path for path in campaign.folder.glob("rounds/*/a*/attempt_*/result.h5") if gpus and results.status_of(path)
    ]
    spent = sum(results.read_attributes(path)["gpu_seconds"] for path in ended)
    spent += sum(model_server.gpu_seconds(each) for each in campaign.frozen_rounds())
    check_cost(chosen, num_arms, rules, int(spent))
    return int(spent)


def check_cost(
    chosen: settings.Settings, num_arms: int, rules: constitution.Constitution, spent_gpu_seconds: int
) -> None:
    """Check the most that a round could cost against article 4, with what was spent before. Raises Refused."""
    recipe, gpus = chosen.recipe, gpus_of_arm(chosen)
    rules.check_spending(
        recipe.num_steps * recipe.batch_size * recipe.sequence_length,
        Fraction(gpus * chosen.cluster.time_limit_minutes, 60),
        num_arms,
        Fraction(spent_gpu_seconds, 3600),
        Fraction(chosen.serving_gpus * chosen.cluster.agent.time_limit_minutes, 60),
    )


def _write(
    campaign: Campaign, folder: Round, facts: Mapping[str, Any], code_dir: Path, chosen: settings.Settings, basis: Mapping[str, Any],
    arms: tuple[Arm, ...],
) -> None:  # fmt: skip
    if chosen.cluster.kind == "slurm":
        slurm_submit.check_names([folder.slurm_dir, code_dir], job_name(folder))
    config, policy = settings.remembered(chosen), settings.policy_of(chosen)
    digests = (facts["image"]["tree_digest"], facts["constitution_digest"], facts["code_digest"])
    frozen = Plan(facts["campaign"], folder.name, *digests, canonical.digest_text(config), policy, arms)
    freeze_forecast(campaign, folder, chosen, len(arms))
    freeze_plan(campaign, frozen, config, basis)
    if chosen.cluster.kind == "slurm":
        write_sbatch_texts(campaign, folder, code_dir)


def freeze_forecast(campaign: Campaign, folder: Round, chosen: settings.Settings, num_arms: int) -> None:
    """Log and write what the round is forecast to take, before its plan, so that nobody can adapt it to what happens. Nothing rests on it."""
    try:
        expected = forecast.forecast(chosen, num_arms, campaign.frozen_rounds())
    except (
        PipelineError,
        OSError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # a damaged file of an earlier round
        print(f"note: no forecast is made for {folder.name}: {error}", file=sys.stderr)
        return
    if expected:
        content = expected.as_record(folder.number == 1)
        Log(campaign.log).append_news("forecast", {"round": folder.name}, forecast=content)
        write_file(folder.forecast, canonical.encoded(content))


def write_sbatch_texts(campaign: Campaign, folder: Round, code_dir: Path) -> None:
    """Write what sbatch gets for a frozen round, for people to read."""
    texts = sbatch_parameters.sbatch_texts(folder.slurm_dir, code_dir, arrays(campaign, folder), resources(folder))
    for name, text in texts.items():
        write_file(folder.slurm_dir / f"{name}.sbatch", text)
