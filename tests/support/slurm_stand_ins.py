"""Stand-ins for Slurm's clients that print given texts. The fixtures of tests/cluster/conftest.py put them on PATH."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

# A Slurm of shell scripts: `queue` has a line for each job, `cancelled` for each id that scancel was given.
SBATCH = """#!/bin/sh
count=$(($(cat {folder}/count 2>/dev/null || echo 100) + 1))
echo $count > {folder}/count
comment=$(sed -n "s/^#SBATCH --comment=//p" "$1" | tr -d "'")
name=$(sed -n "s/^#SBATCH --job-name=//p" "$1")
take() {{ echo "$count|$name|$comment" >> {folder}/queue; }}
{body}
"""
SQUEUE = """#!/bin/sh
echo "ARRAY_JOB_ID|COMMENT"
awk -F'|' '{{print $1 "|" $3}}' {folder}/queue 2>/dev/null
exit 0
"""
SCONTROL = """#!/bin/sh
awk -F'|' -v id="$4" '$1 == id {{print "JobId=" $1 " JobName=" $2 " JobState=PENDING Comment=" $3}}' {folder}/queue
"""
SCANCEL = """#!/bin/sh
for id in "$@"; do echo $id >> {folder}/cancelled; sed -i "/^$id|/d" {folder}/queue; done
"""


class Queue:
    """Puts that Slurm on PATH. Called with what sbatch does and says; it calls `take` to take the job. Returns the folder of `queue`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch

    def __call__(self, body: str) -> Path:
        programs = {"sbatch": SBATCH.format(folder=self.folder, body=body), "srun": "#!/bin/sh\n"}
        for name, text in {"squeue": SQUEUE, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
            programs[name] = text.format(folder=self.folder)
        for name, text in programs.items():
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        self._monkeypatch.setenv("PATH", f"{self.folder}:{os.defpath}")
        return self.folder


class Clients:
    """Puts programs on PATH that print texts; a None is a program that is missing, a number one that fails so."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch

    def __call__(self, *, errors: Mapping[str, str] | None = None, **texts: str | int | None) -> Path:
        """Returns a file with a line for each call. errors: program -> what it prints on stderr. `scontrol ping` always answers."""
        for name in ("squeue", "scontrol", "sacct", "scancel", "sbatch", "srun"):
            (self.folder / name).unlink(missing_ok=True)
        for name, text in texts.items():
            if text is None:
                continue
            body = (
                f"exit {text}" if isinstance(text, int) else f"cat <<'END'\n{text.rstrip(chr(10))}\nEND" if text else ""
            )
            stderr = f"echo '{name}: {errors[name]}' >&2" if errors and name in errors else ""
            lines = ["#!/bin/sh", f'echo "{name} $*" >> {self.folder}/asked', '[ "$1" = ping ] && echo "Slurmctld is UP" && exit',
                     stderr, body]  # fmt: skip
            (self.folder / name).write_text("\n".join(lines) + "\n")
            (self.folder / name).chmod(0o755)
        self._monkeypatch.setenv("PATH", f"{self.folder}:{os.defpath}")
        (self.folder / "asked").unlink(missing_ok=True)
        return self.folder / "asked"
