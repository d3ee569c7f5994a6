"""Writes `/out/progress.jsonl`, a training run's report on itself: a line for each step, other phases between them."""

import json
from pathlib import Path
from typing import Any

from substrate.interface.command_line import write_text


class Progress:
    """Appends lines on rank 0; other ranks write nothing. Tokens and seconds of a step are totals over all starts."""

    def __init__(self, path: Path, *, rank: int, done_steps: int) -> None:
        self._path = path if rank == 0 else None
        if rank == 0:
            # Steps after the checkpoint are made again, so the lines that a killed run wrote about them are removed.
            kept = [line for line in _lines(path) if done_steps and json.loads(line).get("step", 0) <= done_steps]
            write_text(path, "".join(kept))

    def write(self, phase: str, **values: Any) -> None:
        """Appends {"phase": phase, **values}."""
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, **values}) + "\n")


def _lines(path: Path) -> list[str]:
    """Returns the whole lines of a file that a kill may have cut short, and none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]
