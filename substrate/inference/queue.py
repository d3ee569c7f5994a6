"""The items of a decoding task as one queue over all sets, and the journals from which an interrupted run goes on.

    queue = Queue(sets, tokenizer, limit, out, work)
    with closing(Journal(out, replica, work)) as journal:
        for item in queue.share(queue.done(), replica, num_replicas):
            journal.add(item, row)
    queue.finish(progress)                      # one file for each set, when every item has a row

No item waits for the items of another set or shard: a sequence that runs to its limit occupies one slot, and all others
go on. Each replica appends finished items to a journal of its own, one line each. A start reads all journals, and decodes
what none of them has. An item is decoded whole: a line that a kill cut off is not read.

A completion counts only for the work that made it. So the first line of a journal names that work: the digest of model,
decoding, adapter, prompts, engine and version (`generate.work_of`). A journal of other work is left aside, and its
items are decoded again.
"""

import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from substrate.interface.command_line import read_json_lines, write_json_lines
from substrate.interface.errors import DataError

if TYPE_CHECKING:
    from substrate.data.tokenizer import Tokenizer

PROMPT_FIELDS = {"item_id": str, "family": str, "prompt": str}
ROW_FIELDS = {"item_id": str, "completion": str, "num_tokens": int, "truncated": bool}
PROGRESS_SECONDS = 2.0
POLL_SECONDS = 0.1


class Item(NamedTuple):
    """One prompt."""

    set_name: str
    item_id: str  # unique within its set
    ids: list[int]


class Queue:
    """The items of all sets, and which of them have a row."""

    def __init__(self, sets: Mapping[str, Path], tokenizer: "Tokenizer", limit: int, out: Path, work: str = "") -> None:
        """limit: tokens of the longest sequence. work: what journals must name so that their rows count.

        Raises DataError for a prompt that leaves no room for a completion.
        """
        self._out, self._names, self.work = out, list(sets), work
        self.items = [
            Item(name, row["item_id"], tokenizer.encode_prompt(row["prompt"]))
            for name, path in sets.items()
            for row in read_json_lines(path, PROMPT_FIELDS)
        ]
        for item in self.items:
            if len(item.ids) >= limit:
                raise DataError(
                    f"prompt of {item.item_id} has {len(item.ids)} tokens; the model's longest sequence is {limit}"
                )
        # Near lengths enter together, so that few positions of a pass over prompts are padding.
        self.items.sort(key=lambda item: (len(item.ids), item.set_name, item.item_id))
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self._read: dict[Path, int] = {}  # journal -> bytes read of it
        self._others: set[Path] = set()  # journals of other work
        self._wanted = {item[:2] for item in self.items}
        if len(self._wanted) < len(self.items):
            (twice, _), *_ = Counter(item[:2] for item in self.items).most_common(1)
            raise DataError(f"the prompts of {twice[0]} name {twice[1]} twice; each item comes once")

    def refresh(self) -> None:
        """Reads what all journals have got since the last call. A line that is damaged counts as none."""
        for path in sorted(self._out.glob("journal.*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            lines = whole.splitlines()
            if lines and path not in self._read and _parsed(lines.pop(0)) != {"work": self.work}:
                self._others.add(path)
                why = f"it is not of the work {self.work}"
                print(f"the items of {path.name} are decoded again: {why}", file=sys.stderr, flush=True)
            if whole:
                self._read[path] = self._read.get(path, 0) + len(whole)
            for row in map(_parsed, lines) if path not in self._others else ():
                key = (row.pop("set", None), row.get("item_id"))
                is_whole = all(type(row.get(name)) is kind for name, kind in ROW_FIELDS.items())
                if is_whole and isinstance(key[0], str) and key in self._wanted:
                    self.rows[key] = row

    def done(self) -> list[tuple[str, str]]:
        """Returns the sets and ids of the items that have a row, those of finished sets included."""
        finished = {name for name in self._names if (self._out / f"{name}.jsonl").exists()}
        self.refresh()
        return [item[:2] for item in self.items if item.set_name in finished or item[:2] in self.rows]

    def share(self, done: Collection[tuple[str, str]], replica: int, num_replicas: int) -> list[Item]:
        """Returns the items that this replica decodes: every `num_replicas`-th one, if it has no row.

        The deal does not depend on `done`, because another replica may have begun before this one looked.
        """
        without = set(done)
        return [item for item in self.items[replica::num_replicas] if item[:2] not in without]

    def finish(self, progress: "Progress") -> None:
        """Waits until every item has a row, then writes `<set>.jsonl` in item-id order and removes the journals."""
        missing = [name for name in self._names if not (self._out / f"{name}.jsonl").exists()]
        self.refresh()
        while any(item[:2] not in self.rows for item in self.items if item.set_name in missing):
            time.sleep(POLL_SECONDS)
            self.refresh()
            progress.tell(self.rows.values())
        progress.tell(self.rows.values(), is_last=True)
        for name in missing:
            ids = sorted(item.item_id for item in self.items if item.set_name == name)
            write_json_lines(self._out / f"{name}.jsonl", [self.rows[name, item_id] for item_id in ids])
        for path in self._out.glob("journal.*.jsonl"):
            path.unlink()

    def wait(self) -> None:
        """Waits until another rank has called `finish`."""
        while not all((self._out / f"{name}.jsonl").exists() for name in self._names):
            time.sleep(POLL_SECONDS)


def _parsed(line: bytes) -> dict[str, Any]:
    """Returns the object of a journal's line; an empty one where the line is damaged."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


class Journal:
    """The rows of one replica since its start, in the order in which its sequences end.

    Each start has a file of its own: those of earlier ones may belong to another user, and a kill may have cut their end.
    """

    def __init__(self, out: Path, replica: int, work: str = "") -> None:
        names = (out / f"journal.{replica:02d}.{start}.jsonl" for start in itertools.count())
        self._file: IO[bytes] = next(path for path in names if not path.exists()).open("xb")
        self._first = json.dumps({"work": work}).encode() + b"\n"

    def add(self, item: Item, row: Mapping[str, Any]) -> None:
        """Appends the row of one finished item; before the first one, the line that names the work.

        So a start that finishes nothing leaves an empty journal, and whoever looks for progress finds none.
        """
        self._file.write(self._first + json.dumps({"set": item.set_name, **row}).encode() + b"\n")
        self._first = b""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Progress:
    """Writes `progress.jsonl` for all replicas: at most one line in two seconds, and one at the end."""

    def __init__(self, out: Path, num_items: int, num_before: int) -> None:
        """num_before: items that an earlier start has done, which do not enter the rate."""
        self._path, self._total, self._before = out / "progress.jsonl", num_items, num_before
        self._began = self._last = time.monotonic()

    def tell(self, rows: Collection[Mapping[str, Any]], is_last: bool = False) -> None:
        """rows: those of the items that are done."""
        now = time.monotonic()
        if not is_last and now - self._last < PROGRESS_SECONDS:
            return
        self._last, seconds, done = now, now - self._began, len(rows)
        rate = (done - self._before) / seconds if seconds else 0.0
        left = (self._total - done) / rate if rate else 0.0
        line = {
            "phase": "generate",
            "done": done,
            "total": self._total,
            "tokens": sum(row["num_tokens"] for row in rows),
            "seconds": round(seconds, 3),
            "items_per_second": round(rate, 3),
            "seconds_left": round(left, 1),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
