"""Put the newest head where the campaign cannot rewrite it: a file elsewhere, a note in a git repository. Slurm's comments: launch.py.

Both are a convenience, and neither stops a round: a place that cannot be written is told, and the report prints the anchor anyway.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.campaign.heads import Anchor
from pipeline.config.schema import Chain

NOTES = "postrain"


def keep(chosen: Chain, anchor: Anchor) -> None:
    """In every place that the configuration names; says on stderr what could not be written."""
    for place, written in ((chosen.anchor_file, to_file), (chosen.anchor_git, to_git)):
        if place:
            try:
                written(Path(place), anchor)
            except (OSError, subprocess.SubprocessError) as error:
                print(f"the head could not be put into {place}: {error}; it is {anchor}", file=sys.stderr)


def to_file(path: Path, anchor: Anchor) -> None:
    """A line at its end, unless it is there already. Worth something where others than the campaign's owner may write, or it is synced away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        file.seek(0)
        if str(anchor) not in file.read().split():
            file.write(f"{anchor}\n")


def to_git(repository: Path, anchor: Anchor) -> None:
    """A line in the note of HEAD under refs/notes/postrain; push it and others hold it: git push origin refs/notes/postrain."""
    git = ["git", "-C", str(repository), "notes", f"--ref={NOTES}"]
    shown = subprocess.run([*git, "show", "HEAD"], capture_output=True, text=True).stdout
    if str(anchor) not in shown.split():
        subprocess.run([*git, "append", "-m", str(anchor), "HEAD"], check=True, capture_output=True, timeout=60)
