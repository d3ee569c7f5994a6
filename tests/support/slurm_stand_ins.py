"""Stand-ins for Slurm's clients that print given texts. The fixture `clients` of tests/cluster/conftest.py puts them on PATH."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest


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
