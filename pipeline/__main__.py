"""The commands: `python -m pipeline VERB`. Each stage takes a campaign's folder, and each command ends with what to type next.

    round DIR [HYDRA OVERRIDES]    make the campaign if it is not there; freeze the next round, run or submit it
    worker DIR ROUND ARM           one arm              meta DIR [ROUND]      aggregate, decide, write the next overrides
    status DIR [ROUND]             what is going on     image build|verify|show

Exit codes: 0 done, 1 the work failed, 2 usage or configuration, 3 refused by the constitution, 4 integrity, 75 interrupted with the
state saved (start it again).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import NotFound, PipelineError
from pipeline.layout import Campaign, Round, read_json
from pipeline.records import Outcome

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn expected errors into their sentence and exit code."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = verb("init", init_verb, "Freeze a new campaign (what the first `round` does by itself).")
    sub.add_argument("campaign", type=Path)
    sub.add_argument("overrides", nargs="*", help="Hydra overrides, such as experiment=smoke recipe.num_steps=100")

    sub = verb("round", round_verb, "Freeze the next round and run it (cluster=local) or submit it to Slurm.")
    sub.add_argument("campaign", type=Path, help="folder of the campaign, made by the first round")
    sub.add_argument("overrides", nargs="*", help="Hydra overrides; after the first round only cluster=...")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="show plan and sbatch text; write nothing")
    how.add_argument("--no-submit", action="store_true", help="freeze only: for sbatch and multirun")
    how.add_argument(
        "--wait", action="store_true", help="follow until the round is closed (always so with cluster=local)"
    )

    sub = verb("worker", worker_verb, "Run one arm of a frozen round: what each task of the array does.")
    sub.add_argument("campaign", type=Path)
    sub.add_argument("round")
    sub.add_argument("arm", help="a0 to a7, or the array index")
    sub.add_argument("--plan", metavar="SHA256", help="refuse unless the frozen plan has this digest")

    sub = verb("meta", meta_verb, "Aggregate a round's arms, decide, write the next round's overrides.")
    sub.add_argument("campaign", type=Path)
    sub.add_argument("round", nargs="?", help="default: the newest")

    sub = verb("status", status_verb, "Show every arm of a round, from its files.")
    sub.add_argument("campaign", type=Path)
    sub.add_argument("round", nargs="?", help="default: the newest")
    sub.add_argument("--json", action="store_true")

    sub = verb("image", image_verb, "Build, verify or show the substrate image.")
    sub.add_argument("act", choices=("build", "verify", "show"))
    sub.add_argument("path", type=Path, nargs="?", default=Path("build/image/substrate.sqsh"))
    sub.add_argument("overrides", nargs="*", help="build: Hydra overrides that choose the training puzzles (tasks=...)")
    return top


def init_verb(arguments: argparse.Namespace) -> None:
    from pipeline.init import init

    init(Campaign.at(arguments.campaign), arguments.overrides)
    print(f"campaign {arguments.campaign} is frozen\nnext: python -m pipeline round {arguments.campaign}")


def round_verb(arguments: argparse.Namespace) -> int | None:
    from pipeline import launch
    from pipeline.init import init

    campaign = Campaign.at(arguments.campaign)
    if arguments.dry_run:
        dry_run(campaign, arguments.overrides)
        return None
    if not campaign.folder.exists():
        init(campaign, arguments.overrides)
        print(f"campaign {arguments.campaign} is frozen (image, code, constitution, commitments)")
    folder = launch.freeze(campaign, launch.next_round(campaign), arguments.overrides)
    show_plan(folder)
    if arguments.no_submit:
        for stages in launch.arrays(campaign, folder):
            indices = ",".join(stage[3].removeprefix("a") for stage in stages)
            print(f"next: sbatch --array={indices} slurm/round.sbatch {arguments.campaign} {stages[0][2]}")
        print(f"then: sbatch --dependency=afterany:ID[:ID] slurm/meta.sbatch {arguments.campaign} {folder.name}")
        return None
    if launch.is_local(folder):
        return run_local(arguments.campaign, campaign, folder)
    began = time.monotonic()
    record = launch.submit(campaign, folder)
    print(
        f"submitted in {time.monotonic() - began:.2f} s: arrays {record['array_job_ids']}, meta {record['meta_job_id']}"
    )
    print(f"next: python -m pipeline status {arguments.campaign}")
    return follow_slurm(arguments.campaign, campaign, folder) if arguments.wait else None


def dry_run(campaign: Campaign, overrides: list[str]) -> None:
    """Plan and sbatch texts of the next round, made in a throw-away copy: nothing of the campaign is touched."""
    import shutil
    import tempfile

    from pipeline import launch
    from pipeline.init import init

    with tempfile.TemporaryDirectory() as folder:
        draft = Campaign.at(Path(folder, campaign.name))
        if campaign.folder.exists():
            shutil.copytree(
                campaign.folder, draft.folder, ignore=shutil.ignore_patterns("a?", "*.h5", "*.sqsh", "meta")
            )
        else:
            init(draft, overrides)
        frozen = launch.freeze(draft, launch.next_round(draft), overrides)
        show_plan(frozen)
        for path in sorted(frozen.slurm_dir.glob("*.sbatch")):
            print(f"\n--- {path.name}\n{path.read_text().replace(str(draft.folder), str(campaign.folder))}")


def show_plan(folder: Round) -> None:
    from pipeline.campaign import read_plan

    frozen, digest = read_plan(folder)
    print(f"round {folder.name}, plan {digest[:16]}:")
    for arm in frozen.arms:
        moved = ", ".join(f"{key}={value}" for key, value in arm.overrides) or f"repeats the {arm.replicate_of} recipe"
        print(f"  {arm.name}  {arm.role:<9}  {moved}")


def run_local(shown: Path, campaign: Campaign, folder: Round) -> int:
    """Run a round on this machine with a live table where a terminal looks on, a line a change elsewhere."""
    from pipeline import launch, status
    from pipeline.view import follow

    began = time.monotonic()
    with follow(
        lambda: [row for each in rounds_of(campaign, folder) for row in status.round_status(campaign, each)]
    ) as watch:
        try:
            launch.run_here(campaign, folder, watch)
        finally:
            watch()
    return report_end(shown, campaign, folder, time.monotonic() - began)


def follow_slurm(shown: Path, campaign: Campaign, folder: Round) -> int:
    """Follow a submitted round by its files until the meta job closed it or wrote why it did not."""
    from pipeline import status
    from pipeline.view import follow

    began = time.time()
    with follow(lambda: status.round_status(campaign, folder)) as watch:
        while not folder.closed.exists():
            if (
                folder.evidence.exists()
                and folder.evidence.stat().st_mtime > began
                and not folder.decisions_dir.exists()
            ):
                break
            watch()
            time.sleep(1)
    return report_end(shown, campaign, folder, time.time() - began)


def rounds_of(campaign: Campaign, folder: Round) -> list[Round]:
    """r0000 beside r0001, whose jobs run together; else the round alone."""
    return [campaign.round("r0000"), folder] if folder.number == 1 else [folder]


def report_end(shown: Path, campaign: Campaign, folder: Round, seconds: float) -> int:
    """What was decided, where the time went, what to type next."""
    from pipeline import status

    totals = status.breakdown(rounds_of(campaign, folder))
    print(
        f"\n{folder.name} took {seconds:.0f} s; of the workers' time: "
        + ", ".join(f"{n} {t:.0f} s" for n, t in totals.items())
    )
    if folder.evidence.exists():
        show_scores(campaign, folder)
    if not folder.closed.exists():
        print(f"undecided; see `python -m pipeline meta {shown} {folder.name}`")
        return 1
    for line in read_json(sorted(folder.decisions_dir.glob("*.json"))[-1])["reasons"]:
        print(f"  {line}")
    print(f"next: python -m pipeline round {shown}    (reads {campaign.overrides(f'r{folder.number + 1:04d}').name})")
    return 0


def show_scores(campaign: Campaign, folder: Round) -> None:
    """Every arm's accuracies beside the reference's and the base's, and what the reference gained over the base."""
    from rich.console import Console

    from pipeline import evidence, meta, view
    from pipeline.campaign import read_plan

    base = meta.read_arm(campaign.round("r0000"), read_plan(campaign.round("r0000"))[0], "a1", "base")
    outcomes = [Outcome(**fields) for fields in read_json(folder.evidence)["outcomes"]]
    Console(width=120).print(view.scores([base, *outcomes]))
    if base.scored("dev") and outcomes[0].scored("dev"):
        print(f"reference over base on dev: {view.interval(evidence.paired_lift(outcomes[0], base, 'dev', 'base'))}")


def worker_verb(arguments: argparse.Namespace) -> None:
    campaign = Campaign.at(arguments.campaign)
    run_frozen_code(campaign)
    from pipeline import worker

    arm = f"a{arguments.arm}" if arguments.arm.isdigit() else arguments.arm
    attempt = worker.work(campaign, campaign.round(arguments.round), arm, arguments.plan)
    print(
        f"{arguments.round}/{arm} "
        + (f"is published ({attempt.folder.name})" if attempt else "was published before; nothing to do")
    )
    print(f"next, when all arms are: python -m pipeline meta {arguments.campaign} {arguments.round}")


def meta_verb(arguments: argparse.Namespace) -> int:
    campaign = Campaign.at(arguments.campaign)
    run_frozen_code(campaign)
    from pipeline import meta

    folder = campaign.round(arguments.round or newest_frozen(campaign))
    decision = meta.close(campaign, folder)
    print(f"{folder.name}: {decision.state}" + (f", kept {decision.kept}" if decision.kept else ""))
    for reason in decision.reasons:
        print(f"  {reason}")
    if decision.state == "undecided":
        print(
            f"next: run the missing arms (python -m pipeline worker {arguments.campaign} {folder.name} aN), then meta again"
        )
        return 1
    print(f"next: python -m pipeline round {arguments.campaign}")
    return 0


def status_verb(arguments: argparse.Namespace) -> None:
    from pipeline import status

    campaign = Campaign.at(arguments.campaign)
    if not campaign.frozen.exists():
        raise NotFound(
            f"{arguments.campaign} is not a campaign", f"`python -m pipeline round {arguments.campaign}` makes one"
        )
    folder = campaign.round(arguments.round or newest_frozen(campaign))
    if not folder.plan.exists():
        raise NotFound(
            f"round {folder.name} is not frozen", f"Frozen: {', '.join(r.name for r in campaign.frozen_rounds())}"
        )
    rows = status.round_status(campaign, folder)
    submitted: dict[str, Any] = read_json(folder.submitted) if folder.submitted.exists() else {}
    if arguments.json:
        body = {
            "round": folder.name,
            "closed": folder.closed.exists(),
            "submitted": submitted,
            "arms": status.as_json(rows),
        }
        print(json.dumps(body, indent=1))
        return
    from rich.console import Console

    Console().print(status.table(rows))
    if folder.closed.exists():
        print(f"closed; next: python -m pipeline round {arguments.campaign}")
    else:
        print(f"open; when its arms are done: python -m pipeline meta {arguments.campaign} {folder.name}")


def image_verb(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from pipeline import image, settings
    from pipeline.init import build_image

    if arguments.act == "build":
        info = build_image(settings.compose(arguments.overrides), arguments.path)
    elif arguments.act == "verify":
        info = image.verify(arguments.path, image.show(arguments.path).tree_digest)
    else:
        info = image.show(arguments.path)
    print(json.dumps({"path": str(arguments.path), **asdict(info)}, indent=1))


def newest_frozen(campaign: Campaign) -> str:
    names = [folder.name for folder in campaign.frozen_rounds()]
    if not names or names == ["r0000"]:
        raise NotFound(
            f"{campaign.folder} has no frozen round yet", f"`python -m pipeline round {campaign.folder}` starts one"
        )
    return names[-1]


def run_frozen_code(campaign: Campaign) -> None:
    """Go on as the campaign's frozen code, in a private mount namespace; returns there, and only there."""
    from pipeline import namespace
    from pipeline.campaign import facts_of, verified_code

    code_dir = verified_code(campaign, facts_of(campaign))
    if ROOT != code_dir:
        os.environ["PYTHONPATH"] = str(code_dir)
        os.execv(sys.executable, [sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])
    os.environ["PYTHONPATH"] = str(code_dir)
    namespace.enter_private_namespace([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        sys.exit(1)
