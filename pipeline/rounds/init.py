"""`init`: freeze a campaign before its first round, so that everything later can be checked against what stood at the start.

Frozen are the substrate image, the code that will judge, the constitution, the configuration, the commitments to every secret seed
and the public half of the signing key. The folder is made aside and renamed: a campaign that exists is whole. r0000 is planned
here (the reference trained once, the base as it is); its two jobs run beside those of the first round.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.campaign import canonical, constitution, files, keys
from pipeline.campaign.errors import ConfigError, NotFound, WorkFailed
from pipeline.campaign.facts import dump_yaml, load_constitution, parse_yaml, runtime_digest
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import CODE_ROOT, Campaign
from pipeline.campaign.log import Log
from pipeline.campaign.records import Plan
from pipeline.config import settings
from pipeline.config.fit import check_plan_fits
from pipeline.decision import plan
from pipeline.execution import base_weights
from pipeline.rounds import arms
from pipeline.rounds.freeze import freeze_plan, is_operational, plan_basis, write_overrides
from pipeline.sandbox import entries, image
from pipeline.stats import critical_values
from pipeline.stats.design import Design

FROZEN_CODE = ("pipeline", "constitution", "hydra_conf")
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it stands in job names, commands and records
TRAINING_SEED = 20260602
"""Seed of the training puzzles in the image; public, unlike those of dev and fresh."""


def init(campaign: Campaign, overrides: Sequence[str], *, is_draft: bool = False) -> None:
    """Make `campaign` and everything that must be fixed before round 1.

    is_draft: for a campaign that nobody will run: its image has a few puzzles, and names no checkpoint of a site's.
    Raises ConfigError when it exists or the configuration does not fit, Refused and IntegrityError by the constitution.
    """
    if campaign.folder.exists():
        raise ConfigError(f"{campaign.folder} exists", "Choose another name (CAMPAIGN=...), or remove it")
    if not NAME.fullmatch(campaign.name):
        raise ConfigError(
            f"{campaign.name!r} cannot name a campaign", "Letters, digits and . _ - serve, a letter or digit first"
        )
    rules = load_constitution()
    chosen = settings.compose(overrides)
    check_plan_fits(chosen)
    if chosen.tasks.train_csv and not Path(chosen.tasks.train_csv).is_file():
        raise ConfigError(f"tasks.train_csv = {chosen.tasks.train_csv} is no file", "The competition's page has it")
    arms.arms_of(chosen, 1, rules)  # a campaign that cannot plan its first round is not made
    aside = None
    try:
        campaign.folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{campaign.name}.", dir=campaign.folder.parent))
        draft = Campaign(aside)
        aside.chmod(0o755)
        draft.vault.mkdir(mode=0o700)
        info = build_image(chosen, draft.image, draft.held_out_dir, is_draft=is_draft)
        check_real_rows(chosen, draft, is_draft)
        code_digest = freeze_code(draft.code_dir)
        seeds = make_seeds(rules.num_rounds)
        write_file(draft.seeds, canonical.encoded(seeds), mode=0o600)
        design = design_of(chosen, rules)
        critical, source = critical_of(design)
        facts: dict[str, Any] = {
            "schema": 1,
            "campaign": f"{campaign.name}-{os.urandom(4).hex()}",
            "image": {"tree_digest": info.tree_digest, "sqsh_sha256": info.sqsh_sha256},
            "runtime_digest": runtime_digest(),
            "constitution_digest": rules.digest,
            "code_digest": code_digest,
            "revision": revision(),
            "overrides": [item for item in overrides if not is_operational(item)],
            "commitments": {name: keys.commitment(name, seed) for name, seed in seeds.items()},
            "articles": rules.articles,
            "design": design.to_json(),
            "critical": critical,
            "critical_source": source,
            "families": sorted(chosen.tasks.families),
            "external": chosen.external.kind,
            "public_key": keys.make_key(draft.signing_key),
        }
        frozen_yaml = dump_yaml(facts)
        write_file(draft.frozen, frozen_yaml)
        Log(draft.log).append("init", facts=facts, campaign_yaml=canonical.digest_text(frozen_yaml))
        for name in ("r0000", "r0001"):
            write_overrides(draft, name, {"round": name})
        frozen = Plan(
            facts["campaign"], "r0000", info.tree_digest, rules.digest, code_digest, canonical.digest_text(settings.to_yaml(chosen)),
            settings.policy_of(chosen), plan.reference_arms(chosen.seed),
        )  # fmt: skip
        freeze_plan(draft, frozen, settings.to_yaml(chosen), plan_basis(chosen, settings.policy_of(chosen), 0))
        os.rename(aside, campaign.folder)
    except OSError as error:
        raise WorkFailed(
            f"cannot make {campaign.folder}: {error}", "Free space or rights there, then run it again"
        ) from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)


def build_image(
    chosen: settings.Settings, out: Path, held_out: Path | None = None, *, is_draft: bool = False
) -> image.ImageInfo:
    """Pack the substrate with the training puzzles of this configuration. Raises WorkFailed with the generator's last words.

    held_out: folder for the real rows that are not trained on, where tasks.train_csv names some; None leaves them out of the image
    and of everything else.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="payload-") as folder:
        payload = Path(folder, "payload")
        shutil.copytree(CODE_ROOT / "substrate", payload / "substrate", ignore=SKIPPED)
        for name in ("base", "manifest.yaml"):  # they stand beside the package in the image, inside it in the checkout
            shutil.move(payload / "substrate" / name, payload / name)
        check_recipe(chosen, payload)
        if not is_draft and base_weights.are_outside(chosen.to_dict()["model"]):
            name_base(chosen, payload)
        arguments = ["--out", str(payload), "--seed", str(TRAINING_SEED)]
        num_puzzles = 1 if is_draft else chosen.tasks.num_train_per_family
        arguments += ["--level", chosen.tasks.level, "--num-per-family", str(num_puzzles)]
        arguments += ["--families", *chosen.tasks.families]
        for path in chosen.tasks.registered:
            arguments += ["--registered", str(Path(path).resolve())]
        if chosen.tasks.train_csv and not is_draft:
            arguments += ["--csv", str(Path(chosen.tasks.train_csv).resolve())]
            arguments += ["--held-out", str(held_out or Path(folder, "held-out"))]
        run_substrate(payload, "payload", arguments, "the training puzzles could not be made")
        return image.build(payload, out)


def check_recipe(chosen: settings.Settings, payload: Path) -> None:
    """Have the image's own code look at the recipe: what it knows of a method, nothing here does. Raises ConfigError."""
    asked = Path(payload.parent, "recipes.json")
    asked.write_text(
        json.dumps({"recipes": [chosen.to_dict()["recipe"]], "parallelism": chosen.to_dict()["parallelism"]})
    )
    try:
        run_substrate(payload, "recipes", [str(asked)], "the recipe is refused")
    except WorkFailed as error:
        raise ConfigError(
            error.what, f"hydra_conf/recipe/{chosen.recipe.method}.yaml has every key with its meaning"
        ) from None


def name_base(chosen: settings.Settings, payload: Path) -> None:
    """Put the names and digests of the site's checkpoint in the place of the tiny base, and its tokenizer, checked."""
    source = chosen.cluster.weights_dir
    manifest = base_weights.build_manifest(source)
    run_substrate(payload, "formats.published_tokenizer", [source], "the published tokenizer does not serve")
    base = payload / Path(chosen.model.weights).parent
    shutil.rmtree(payload / "base")
    base.mkdir(parents=True)
    write_file(payload / chosen.model.weights, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    shutil.copyfile(Path(source, "tokenizer.json"), payload / "base" / "tokenizer.json")
    described = parse_yaml((payload / "manifest.yaml").read_text())
    described |= {
        "name": f"substrate-{chosen.model.name}",
        "base": {"file": chosen.model.weights, "architecture": chosen.model.name},
    }
    described["tokenizer"] = {"file": "base/tokenizer.json", "sha256": manifest["files"]["tokenizer.json"]["sha256"]}
    write_file(payload / "manifest.yaml", dump_yaml(described))


def run_substrate(payload: Path, entry: str, arguments: Sequence[str], what: str) -> None:
    """An entry of the payload's own code. Raises WorkFailed with its last words."""
    done = entries.run(payload, entry, arguments)
    if done.returncode:
        raise WorkFailed(f"{what}: {' '.join(done.stderr.strip().splitlines()[-1:])}")


def freeze_code(code_dir: Path) -> str:
    """Copy what judges and decides into the campaign; returns its tree digest."""
    draft = code_dir / "draft"
    for name in FROZEN_CODE:
        shutil.copytree(CODE_ROOT / name, draft / name, ignore=SKIPPED)
    # A file where Python would make a folder for its bytecode: whoever runs this code leaves it as it was frozen.
    for package in sorted({module.parent for module in (draft / "pipeline").rglob("*.py")}):
        write_file(package / "__pycache__", "")
    digest = files.tree_digest(draft)
    os.rename(draft, code_dir / digest[:16])
    return digest


def make_seeds(num_rounds: int) -> dict[str, str]:
    """Secret seeds of the whole campaign: dev, the board, each budgeted round's fresh set, and dev sets to replace reversed ones."""
    rounds = [f"r{number:04d}" for number in range(1, num_rounds + 1)]
    names = ["dev", "board", *(f"fresh/{name}" for name in rounds), *(f"dev/{name}" for name in rounds[1:])]
    return {name: keys.new_seed() for name in names}


def design_of(chosen: settings.Settings, rules: constitution.Constitution) -> Design:
    """What the power of this campaign's tests depends on."""
    tasks, target = chosen.tasks, chosen.external
    return Design(
        rounds=rules.num_rounds,
        arms=rules.arms_per_round,
        families=len(tasks.families),
        dev_items=tasks.num_dev_per_family,
        fresh_items=tasks.num_fresh_per_family,
        board_rows=0 if target.kind == "none" else target.rows,
        submissions=0 if target.kind == "none" else target.submissions,
    )


def check_real_rows(chosen: settings.Settings, draft: Campaign, is_draft: bool) -> None:
    """Whether as many real rows are held out as the local board wants: it could not score anything later. Raises ConfigError."""
    wanted = chosen.external.rows - chosen.external.generated_rows if chosen.external.kind == "local" else 0
    if not wanted or is_draft:
        return
    found = len((draft.held_out_dir / "prompts.jsonl").read_text("utf-8").splitlines())
    if found < wanted:
        raise ConfigError(
            f"{found} real rows are held out, the board wants {wanted}", "Lower external.rows or external.real_share"
        )


def critical_of(design: Design) -> tuple[dict[str, str], str]:
    """Critical values and where they come from: simulated for this design, else bounds that hold without a simulation."""
    try:
        content = critical_values.read_critical_values(design)
    except NotFound:
        return critical_values.bounds(
            design
        ), "bounds: Bonferroni and Ville; `python -m pipeline evidence nulls --design` has sharper ones"
    return content["critical"], f"constitution/nulls/{critical_values.file_name(design)}"


def revision() -> str:
    """Git revision of the checkout, with `+changes` where it is not clean; "unknown" outside git."""
    done = subprocess.run(
        ["git", "-C", str(CODE_ROOT), "describe", "--always", "--dirty=+changes", "--abbrev=40"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"
