"""`init`: freeze a campaign before its first round, so that everything later can be compared with what was fixed at the start.

`init` freezes the substrate image, the code that will judge, the constitution, the configuration, the commitments to every secret seed and
the public half of the signing key. It makes the folder under another name and renames it, so that a campaign that exists is complete. It
also plans r0000, which trains the reference once and evaluates the base; those two jobs run beside the first round's.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.campaign import canonical, constitution, files, keys
from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.campaign.facts import dump_yaml, load_constitution, parse_yaml, runtime_digest
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import CODE_ROOT, Campaign
from pipeline.campaign.log import Log
from pipeline.campaign.records import Plan
from pipeline.claims.assess_claims import check_confirmation
from pipeline.cluster import slurm_submit
from pipeline.config import decoding, settings
from pipeline.config.fit import check_experiment, check_plan_fits, with_recompute
from pipeline.decision import family_states, plan, promotion
from pipeline.execution import base_weights
from pipeline.external import proposers
from pipeline.rounds import arms
from pipeline.rounds.freeze import freeze_plan, is_operational, plan_basis, write_overrides
from pipeline.sandbox import entries, image
from pipeline.sandbox.entries import run_substrate
from pipeline.stats import critical_values
from pipeline.stats.design import Design

FROZEN_CODE = ("pipeline", "constitution", "hydra_conf")
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What a campaign may be called: its name stands in job names, commands and records."""
TRAINING_SEED = 20260602
"""Seed of the training puzzles in the image. It is public; the seeds of dev and fresh items are secret."""
DRAFT_PUZZLES = 32  # of a family, enough to see how long solutions are


def init(campaign: Campaign, overrides: Sequence[str], *, is_draft: bool = False, is_probe: bool = False) -> None:
    """Make the folder of `campaign` with everything that must be fixed before round 1.

    is_draft: for a dry run, which trains nothing: the image has few puzzles. is_probe: for a first contact, which runs r0000 alone, so nothing
    moves an axis.

    Raises ConfigError if the folder exists or the configuration does not fit, Refused if the constitution does not allow the
    configuration, IntegrityError if the constitution was changed, and WorkFailed if a file cannot be written.
    """
    check_is_new(campaign)
    rules = load_constitution()
    chosen = settings.compose(overrides)
    check_experiment(chosen, overrides)
    check_can_be_planned(chosen, rules, is_draft, is_probe)
    if chosen.cluster.kind == "slurm":
        slurm_submit.check_names([campaign.folder], campaign.name)
    aside = None
    try:
        campaign.folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{campaign.name}.", dir=campaign.folder.parent))
        aside.chmod(0o755)
        draft = Campaign(aside)
        facts = freeze_facts(draft, campaign.name, chosen, overrides, rules, is_draft)
        plan_first_rounds(draft, facts, chosen)
        os.rename(aside, campaign.folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            check_is_new(campaign)  # somebody else made it meanwhile, and this draft is dropped
        raise WorkFailed(
            f"cannot make {campaign.folder}: {error}", "Free space or get rights there, then run it again"
        ) from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)


def check_is_new(campaign: Campaign) -> None:
    """Raise ConfigError for a folder that exists, or for a name that a campaign cannot have."""
    if campaign.folder.exists():
        cure = (
            f"`python -m pipeline round {campaign.folder}` goes on with it"
            if campaign.frozen.exists()
            else "It is no campaign"
        )
        raise ConfigError(f"{campaign.folder} exists", f"{cure}; for a new campaign choose another name (CAMPAIGN=...)")
    if not NAME.fullmatch(campaign.name):
        order = "; the folder of the campaign comes first, such as runs/nano, and then the settings"
        valid = "Valid are letters, digits and the signs . _ -, beginning with a letter or digit, such as demo-2"
        raise ConfigError(f"{campaign.name!r} cannot name a campaign", valid + order * ("=" in campaign.name))


def check_can_be_planned(
    chosen: settings.Settings, rules: constitution.Constitution, is_draft: bool, is_probe: bool = False
) -> None:
    """Raise ConfigError or Refused for a configuration of which a round could not be planned."""
    check_plan_fits(chosen)
    if base_weights.are_outside(chosen.to_dict()["model"]):
        if not is_draft or not is_elsewhere(chosen):
            base_weights.published_files(chosen.cluster.weights_dir)
    if chosen.tasks.train_csv:
        entries.describe_real_rows(chosen.tasks.train_csv, chosen.tasks.families)
    if chosen.policy.proposals.kind == "llm":
        proposers.endpoint_of(chosen.policy.proposals)
    check_confirmation(chosen.policy.confirmation, chosen.policy.rounds, rules.num_rounds)
    if chosen.policy.choice not in promotion.CHOICES:
        raise ConfigError(f"policy.choice = {chosen.policy.choice!r}", f"Valid: {', '.join(promotion.CHOICES)}")
    if not is_probe:
        arms.check_axes(chosen, rules)
    family_states.check_article(rules)


def is_elsewhere(chosen: settings.Settings) -> bool:
    """Whether the published checkpoint is named and not on this machine, where a draft may be made even so."""
    return bool(chosen.cluster.weights_dir) and not Path(chosen.cluster.weights_dir).exists()


def freeze_facts(
    draft: Campaign, name: str, chosen: settings.Settings, overrides: Sequence[str], rules: constitution.Constitution, is_draft: bool
) -> dict[str, Any]:  # fmt: skip
    """Make image, code, seeds and signing key in `draft`, then write and log the facts about them (campaign.yaml). Returns the facts."""
    draft.vault.mkdir(mode=0o700)
    info = build_image(chosen, draft.image, draft.held_out_dir, is_draft=is_draft)
    check_real_rows(chosen, draft, is_draft)
    code_digest = freeze_code(draft.code_dir)
    design = design_of(chosen, rules)
    seeds = make_seeds(design.rounds)
    write_file(draft.seeds, canonical.encoded(seeds), mode=0o600)
    critical, source = critical_values.of_design(design)
    facts: dict[str, Any] = {
        "schema": 1,
        "campaign": f"{name}-{os.urandom(4).hex()}",
        "image": {"tree_digest": info.tree_digest, "sqsh_sha256": info.sqsh_sha256},
        "runtime_digest": runtime_digest(),
        "constitution_digest": rules.digest,
        "code_digest": code_digest,
        "revision": revision(),
        "overrides": [item for item in overrides if not is_operational(item)],
        "settled": decoding.settled_of(chosen),
        "commitments": {name: keys.commitment(name, seed) for name, seed in seeds.items()},
        "articles": rules.articles,
        "design": design.to_json(),
        "choice": chosen.policy.choice,
        "confirmation": chosen.policy.confirmation,
        "critical": critical,
        "critical_source": source,
        "families": sorted(chosen.tasks.families),
        "external": chosen.external.kind,
        "public_key": keys.make_key(draft.signing_key),
    }
    frozen_yaml = dump_yaml(facts)
    write_file(draft.frozen, frozen_yaml)
    Log(draft.log).append("init", facts=facts, campaign_yaml=canonical.digest_text(frozen_yaml))
    return facts


def plan_first_rounds(draft: Campaign, facts: dict[str, Any], chosen: settings.Settings) -> None:
    """Write the overrides of r0000 and r0001, and freeze the plan of r0000."""
    for name in ("r0000", "r0001"):
        write_overrides(draft, name, {"round": name})
    arms_of_r0000 = plan.reference_arms(chosen.seed)
    chosen = with_recompute(chosen, [arm.overrides for arm in arms_of_r0000])
    config, policy = settings.to_yaml(chosen), settings.policy_of(chosen)
    digests = (facts["image"]["tree_digest"], facts["constitution_digest"], facts["code_digest"])
    frozen = Plan(facts["campaign"], "r0000", *digests, canonical.digest_text(config), policy, arms_of_r0000)
    freeze_plan(draft, frozen, config, plan_basis(chosen, policy, 0))


def build_image(
    chosen: settings.Settings, out: Path, held_out: Path | None = None, *, is_draft: bool = False
) -> image.ImageInfo:
    """Pack the substrate and the training puzzles of this configuration into the image `out`.

    held_out: the folder that gets the tenth of the rows of tasks.train_csv that is not trained on; None writes it nowhere.
    Raises ConfigError for a recipe that the image's code refuses, WorkFailed with the last line of the program that failed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="payload-") as folder:
        payload = Path(folder, "payload")
        shutil.copytree(CODE_ROOT / "substrate", payload / "substrate", ignore=SKIPPED)
        for name in ("base", "manifest.yaml"):  # the checkout has them inside the package, the image beside it
            shutil.move(payload / "substrate" / name, payload / name)
        check_recipe(chosen, payload)
        if base_weights.are_outside(chosen.to_dict()["model"]) and not (is_draft and is_elsewhere(chosen)):
            name_base(chosen, payload, is_draft)
        is_short = is_draft and not chosen.tasks.dev_slices  # a few puzzles may all lie outside of a narrow slice
        num_puzzles = DRAFT_PUZZLES if is_short else chosen.tasks.num_train_per_family
        arguments = ["--out", str(payload), "--seed", str(TRAINING_SEED), "--num-per-family", str(num_puzzles)]
        arguments += ["--level", chosen.tasks.level, "--num-dev", str(chosen.tasks.num_dev_per_family)]
        arguments += ["--slices", json.dumps(chosen.tasks.dev_slices), "--families", *chosen.tasks.families]
        for path in chosen.tasks.registered:
            arguments += ["--registered", str(Path(path).resolve())]
        if chosen.tasks.train_csv and not is_draft:
            arguments += ["--csv", str(Path(chosen.tasks.train_csv).resolve())]
            arguments += ["--held-out", str(held_out or Path(folder, "held-out"))]
        if said := run_substrate(payload, "payload", arguments, "the training puzzles could not be made"):
            print(f"real rows: {said}", file=sys.stderr)
        if told := entries.check_solutions(payload, chosen.to_dict()):
            print(f"note: {told}", file=sys.stderr)
        return image.build(payload, out)


def check_recipe(chosen: settings.Settings, payload: Path) -> None:
    """Raise ConfigError for a recipe that the image's code, which knows the methods' keys, refuses: the reference, or what an axis makes of it."""
    given = arms.values_of_axes(chosen, load_constitution())
    changed = [settings.with_overrides(chosen, [setting]) for _, setting in given]
    for recipes, what in (([chosen], "the recipe is refused"), (changed, "a value of an axis is refused")):
        question = Path(payload.parent, "recipes.json")
        asked = [each.to_dict()["recipe"] for each in recipes]
        question.write_text(json.dumps({"recipes": asked, "parallelism": chosen.to_dict()["parallelism"]}))
        try:
            run_substrate(payload, "recipes", [str(question)], what)
        except ConfigError as error:
            explained = f"hydra_conf/recipe/{chosen.recipe.method}.yaml explains every key and its valid values"
            raise ConfigError(error.what, f"{error.cure}. {explained}" if error.cure else explained) from None


def name_base(chosen: settings.Settings, payload: Path, is_draft: bool) -> None:
    """Replace the tiny base in the payload by the names and digests of the site's checkpoint, and by its tokenizer.

    The image's own code compares names and shapes of the weights with the model, and derives tokens.json. A draft stops before the bytes
    are hashed. Raises as `base_weights.describe`.
    """
    source, base = chosen.cluster.weights_dir, payload / "base"
    shutil.rmtree(base)
    base.mkdir()
    weights, tokens = base_weights.describe(source, chosen.to_dict()["model"], payload, base)
    print(f"weights: {weights}\ntokenizer: {tokens}", file=sys.stderr)
    if is_draft:
        return
    manifest = base_weights.build_manifest(source)  # last, because it reads all bytes
    write_file(payload / chosen.model.weights, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    described = parse_yaml((payload / "manifest.yaml").read_text())
    described["name"] = f"substrate-{chosen.model.name}"
    described["base"] = {"file": chosen.model.weights, "architecture": chosen.model.name}
    for name in ("tokenizer.json", "tokens.json", "chat_template.jinja"):
        described[Path(name).stem] = {"file": f"base/{name}", "sha256": files.file_digest(base / name)}
    write_file(payload / "manifest.yaml", dump_yaml(described))


def freeze_code(code_dir: Path) -> str:
    """Copy the code that judges and decides into the campaign. Returns its tree digest."""
    draft = code_dir / "draft"
    for name in FROZEN_CODE:
        shutil.copytree(CODE_ROOT / name, draft / name, ignore=SKIPPED)
    # An empty file in place of each __pycache__ keeps Python from writing bytecode into the frozen code.
    for package in sorted({module.parent for module in (draft / "pipeline").rglob("*.py")}):
        write_file(package / "__pycache__", "")
    digest = files.tree_digest(draft)
    os.rename(draft, code_dir / digest[:16])
    return digest


def make_seeds(num_rounds: int) -> dict[str, str]:
    """Name -> secret seed, for the whole campaign: dev, the board, the fresh items of each round, and the dev items that may replace others."""
    rounds = [f"r{number:04d}" for number in range(1, num_rounds + 1)]
    names = ["dev", "board", *(f"fresh/{name}" for name in rounds), *(f"dev/{name}" for name in rounds[1:])]
    return {name: keys.new_seed() for name in names}


def design_of(chosen: settings.Settings, rules: constitution.Constitution) -> Design:
    """The sizes that the power of this campaign's tests depends on."""
    tasks, target = chosen.tasks, chosen.external
    return Design(
        rounds=chosen.policy.rounds or rules.num_rounds,
        arms=rules.arms_per_round,
        families=len(tasks.families),
        dev_items=tasks.num_dev_per_family,
        fresh_items=tasks.num_fresh_per_family,
        board_rows=0 if target.kind == "none" else target.rows,
        submissions=0 if target.kind == "none" else target.submissions,
    )


def check_real_rows(chosen: settings.Settings, draft: Campaign, is_draft: bool) -> None:
    """Raise ConfigError if fewer real rows are held out than the local board needs, because it could not score anything later."""
    needed = chosen.external.rows - chosen.external.generated_rows if chosen.external.kind == "local" else 0
    if not needed or is_draft:
        return
    held_out = len((draft.held_out_dir / "prompts.jsonl").read_text("utf-8").splitlines())
    if held_out < needed:
        raise ConfigError(
            f"{held_out} real rows are held out, the board needs {needed}", "Lower external.rows or external.real_share"
        )


def revision() -> str:
    """Git revision of the checkout, followed by `+changes` if it is not clean; "unknown" outside of git."""
    words = ["git", "-C", str(CODE_ROOT), "describe", "--always", "--dirty=+changes", "--abbrev=40"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
