"""Write an anchor of the log's newest signed head to places outside of the campaign: a file, or a note in a git repository.

Writing an anchor is a convenience and never stops a round: if a place cannot be written, stderr says so, and the report prints the
anchor anyway. (launch.py also puts an anchor into the comments of Slurm jobs.)
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.campaign.heads import Anchor
from pipeline.config.schema import Chain

NOTES = "postrain"


def write_anchor(chosen: Chain, anchor: Anchor) -> None:
    """Write an anchor to every place that the configuration names. A place that cannot be written is reported on stderr."""
    for place, write in ((chosen.anchor_file, to_file), (chosen.anchor_git, to_git)):
        if place:
            try:
                write(Path(place), anchor)
            except (OSError, subprocess.SubprocessError) as error:
                print(
                    f"the head could not be put into {place}: {error}. Write it down yourself: {anchor}",
                    file=sys.stderr,
                )


def to_file(path: Path, anchor: Anchor) -> None:
    """Append the anchor to a file as a line, unless the file has it.

    That protects the log only if the campaign's owner cannot rewrite the file, for example because it is copied to another machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        file.seek(0)
        if str(anchor) not in file.read().split():
            file.write(f"{anchor}\n")


def to_git(repository: Path, anchor: Anchor) -> None:
    """Append the anchor to the note of HEAD under refs/notes/postrain, unless it is there.

    `git push origin refs/notes/postrain` gives it to others. Raises CalledProcessError if git refuses.
    """
    git = ["git", "-C", str(repository), "notes", f"--ref={NOTES}"]
    note = subprocess.run([*git, "show", "HEAD"], capture_output=True, text=True).stdout
    if str(anchor) not in note.split():
        subprocess.run([*git, "append", "-m", str(anchor), "HEAD"], check=True, capture_output=True, timeout=60)
