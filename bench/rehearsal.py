"""Rehearse one arm through the real stages on random weights, and print what each phase took.

    python -m bench.rehearsal                                         the miniature, on the cores of this machine
    python -m bench.rehearsal --experiment nano_30b --at /dev/shm     63 GB of weights in memory, on a machine with GPUs
    python -m bench.rehearsal --experiment nano_30b --weights FOLDER  the same with a checkpoint that is there

It makes a checkpoint in the published form, freezes a campaign, and runs the reference's arm by the command that a job runs: the image is
verified and forked, the sandbox probed, 20 packed steps trained, the adapter sealed, 60 items judged with a short limit, the result published.
Nothing is learned from random weights; the seconds and bytes are those of the real path. `first-contact` does the same on a site's own
checkpoint, gate by gate.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Campaign
from pipeline.config import settings
from pipeline.rounds import init

ROOT = Path(__file__).resolve().parent.parent
STEPS, ITEMS_PER_FAMILY, NEW_TOKENS = 20, 10, 64
SHORT = [
    f"recipe.num_steps={STEPS}", "recipe.warmup_steps=1", f"tasks.num_dev_per_family={ITEMS_PER_FAMILY}",
    f"tasks.num_fresh_per_family={ITEMS_PER_FAMILY}", f"tasks.max_new_tokens={NEW_TOKENS}", "policy.axes=[]",
]  # fmt: skip


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    )


def phases_of(path: Path) -> list[tuple[str, float]]:
    """(phase, seconds until the next one begins), in the order of the marks."""
    marks = read_json_lines(path)
    return [(mark["phase"], then["at"] - mark["at"]) for mark, then in zip(marks, marks[1:], strict=False)]


def make_checkpoint(experiment: str, folder: Path) -> None:
    """Write random weights of the experiment's model in the published form, by half of the cores."""
    model = settings.compose([f"experiment={experiment}"]).model.name
    what = [
        str(folder),
        "--model",
        f"hydra_conf/model/{model}.yaml",
        "--processes",
        str(max((os.cpu_count() or 1) // 2, 1)),
    ]
    command = [sys.executable, "-m", "substrate.base.make_miniature", *what]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def rehearse(experiment: str, folder: Path, weights: Path | None, overrides: list[str]) -> list[tuple[str, float, int]]:
    """Run the arm. Returns (what, seconds, bytes that it wrote or read; 0 where they mean nothing)."""
    rows: list[tuple[str, float, int]] = []

    def timed(what: str, began: float, num_bytes: int) -> None:
        rows.append((what, time.monotonic() - began, num_bytes))
        print(f"{what}: {rows[-1][1]:.1f} s", file=sys.stderr, flush=True)

    if weights is None:
        began, weights = time.monotonic(), folder / "checkpoint"
        make_checkpoint(experiment, weights)
        timed("make the checkpoint", began, size_of(weights))

    began, campaign = time.monotonic(), Campaign(folder / "rehearsal")
    chosen = [f"experiment={experiment}", "cluster=local", f"cluster.weights_dir={weights}", *SHORT, *overrides]
    init.init(campaign, chosen, is_probe=True)
    timed("freeze the campaign (image, digests of the weights)", began, size_of(campaign.image))

    began, first = time.monotonic(), campaign.round("r0000")
    stage = ["worker", str(campaign.folder), "--round", "r0000", "a0"]
    subprocess.run([sys.executable, "-m", "pipeline", *stage], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - began
    attempt = first.attempts("a0")[0]
    written = {"train": size_of(attempt.adapter_dir), "score": size_of(attempt.result)}
    rows += [(f"arm: {phase}", seconds, written.get(phase, 0)) for phase, seconds in phases_of(attempt.phases)]
    rows.append(("arm, from the start of its process to its end", whole, size_of(attempt.folder)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="nano_mini", help="nano_mini, or nano_30b on a machine with GPUs")
    parser.add_argument(
        "--at", type=Path, help="folder for checkpoint and campaign, removed at the end; /tmp by default"
    )
    parser.add_argument("--weights", type=Path, help="a checkpoint that is there; by default a random one is made")
    parser.add_argument(
        "overrides", nargs="*", help="further settings, such as parallelism=tp1 cluster.gpus_per_node=1"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    with tempfile.TemporaryDirectory(dir=arguments.at, prefix="rehearsal-") as folder:
        rows = rehearse(arguments.experiment, Path(folder), arguments.weights, arguments.overrides)
    print(f"{arguments.experiment}: {STEPS} steps, {6 * ITEMS_PER_FAMILY} items of up to {NEW_TOKENS} tokens")
    print(f"{'phase':<54}{'seconds':>9}{'MB':>10}")
    for what, seconds, num_bytes in rows:
        print(f"{what:<54}{seconds:>9.1f}{f'{num_bytes / 1e6:,.1f}' if num_bytes else '':>10}")


if __name__ == "__main__":
    main()
