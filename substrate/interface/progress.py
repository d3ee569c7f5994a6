"""`/out/progress.jsonl`, what a training says of itself: a line a step, and lines of other phases between them."""

import json
from pathlib import Path
from typing import Any

from substrate.interface.command_line import write_text


class Progress:
    """Written by rank 0, flushed line by line. Tokens and seconds of a step are sums over all starts."""

    def __init__(self, path: Path, *, rank: int, done_steps: int) -> None:
        self._path = path if rank == 0 else None
        if rank == 0:
            # Steps after the checkpoint will be made again; their lines of the run that was killed go.
            kept = [line for line in _lines(path) if done_steps and json.loads(line).get("step", 0) <= done_steps]
            write_text(path, "".join(kept))

    def write(self, phase: str, **values: Any) -> None:
        """Appends {"phase": phase, **values}."""
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, **values}) + "\n")


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that a kill may have cut short; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]
