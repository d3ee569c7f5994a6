"""Run the benchmarks that need no GPU, and write docs/performance.md: what they print, with machine, date and versions (`make bench`).

    python -m bench.report [--to docs/performance.md]

Nothing else should run meanwhile: each ratio is of two sides in one process, but a busy machine still spreads them.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
PACKAGES = ("torch", "transformers", "peft", "megatron-core")
PARTS = {
    "A LoRA step beside transformers and peft": ["bench.model"],
    "Decoding beside transformers": ["bench.generate"],
    "Packed rows beside a row a pass": ["bench.packing"],
    "One arm through all stages": ["bench.rehearsal"],
    "An audit by the number of rounds": ["bench.audit"],
}
HEAD = """# Performance

`make bench` writes this page on the machine at hand; `docs/log.md` has what was tried, with its prediction and its result. Ratios are of one
run, both sides in turn; above 1 ours is faster. What runs on a GPU is measured by `python -m bench.gpu --theirs`, and is not on this page.

"""


def machine() -> str:
    """This machine and the versions, as one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    return (
        f"{datetime.date.today()}, {cores} cores ({platform.machine()}), {memory:.0f} GiB, load {os.getloadavg()[0]:.1f} before it; "
        f"Python {platform.python_version()}, {versions}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=PAGE)
    arguments = parser.parse_args()
    text = HEAD + machine() + "\n"
    for title, words in PARTS.items():
        print(f"{title}: python -m {' '.join(words)}", file=sys.stderr, flush=True)
        ran = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        text += f"\n## {title}\n\n`python -m {' '.join(words)}`\n\n" + "".join(
            f"    {line}\n" for line in ran.stdout.splitlines()
        )
    arguments.to.write_text(text)
    print(f"{arguments.to} is written")


if __name__ == "__main__":
    main()
