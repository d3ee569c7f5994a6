"""Entry: complete the prompts of a task file of kind `generate` (docs/contract.md).

    python -P -m substrate.generate [/task/task.json]

    in    {"item_id": "roman-000012", "family": "roman", "prompt": "..."}
    out   {"item_id": "roman-000012", "completion": "...", "num_tokens": 57, "truncated": false}

Items are sorted by length and cut into shards of a few batches, which `inference/decode.py` decodes. A shard is written
whole when it is done, so a killed run resumes with the missing shards. Its files equal those of an uninterrupted run
byte for byte, because the same sequences share a batch. A sequence ends at an end id of the checkpoint or before a stop
text; it is truncated after `max_new_tokens` or at the model's longest sequence.

Started without RANK in the environment, the process starts `judge_tp` ranks. All decode the same; rank 0 writes.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from substrate.interface.command_line import Parser, read_json_lines, read_text, write_json_lines, write_text
from substrate.interface.errors import DataError, UsageError, exit_code_of

if TYPE_CHECKING:
    from substrate.data.tokenizer import Tokenizer
    from substrate.distributed.groups import Parallel
    from substrate.model import HybridModel, ModelConfig


PROMPT_FIELDS = {"item_id": str, "family": str, "prompt": str}
SHARD_BATCHES = 4  # batches per shard: a kill loses at most so many, but slots run empty at the end of each shard
STOP_WINDOW = 64  # newest tokens that are searched for a stop text
PROGRESS_SECONDS = 2.0


@dataclass(frozen=True)
class Task:
    """A checked task file of kind `generate`. Paths are those inside the sandbox."""

    model: dict[str, Any]
    judge_tp: int  # tensor-parallel ranks
    decoding: dict[str, Any]  # fields of decode.Decoding
    base: Path
    tokenizer: Path
    adapter: Path | None
    sets: dict[str, Path]  # name of a set -> its prompts
    out: Path

    @classmethod
    def read(cls, path: Path) -> "Task":
        """Raises DataError if the file cannot be read, UsageError if it breaks the contract."""
        try:
            task = json.loads(read_text(path))
            header = (task.get("schema"), task.get("kind"))
            config, paths = task["config"], task["paths"]
            read = cls(
                model=config["model"],
                judge_tp=int(config["parallelism"]["judge_tp"]),
                decoding=dict(config["decoding"]),
                base=Path(paths["base"]),
                tokenizer=Path(paths["tokenizer"]),
                adapter=Path(paths["adapter"]) if paths["adapter"] is not None else None,
                sets={name: Path(prompts) for name, prompts in paths["sets"].items()},
                out=Path(paths["out"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"task file {path}: {error!r}; it must be a JSON object with config and paths of kind generate"
            ) from None
        if header != (1, "generate"):
            raise UsageError(f"task file {path} has schema and kind {header}; valid is (1, 'generate')")
        if read.judge_tp < 1:
            raise UsageError(f"task file {path}: judge_tp is {read.judge_tp}; valid is at least 1")
        _check_decoding(read.decoding, f"task file {path}: decoding")
        return read


def _check_decoding(values: dict[str, Any], where: str) -> None:
    """Raises UsageError unless `values` fit `decode.Decoding`, which needs torch to import."""
    rules = {
        "max_new_tokens": (int, lambda v: v >= 1, "an integer of at least 1"),
        "batch_size": (int, lambda v: v >= 1, "an integer of at least 1"),
        "temperature": (float | int, lambda v: 0 <= v < 100, "a number from 0 (greedy)"),
        "top_p": (float | int, lambda v: 0 < v <= 1, "a number above 0, up to 1"),
        "seed": (int, lambda v: True, "an integer"),
        "stop": (list, lambda v: all(isinstance(text, str) and text for text in v), "a list of texts"),
        "log_probs": (bool, lambda v: True, "true or false"),
    }
    for name in ("max_new_tokens", "batch_size"):
        if name not in values:
            raise UsageError(f"{where} lacks {name}; give {rules[name][2]}")
    for name, value in values.items():
        kind, holds, valid = rules.get(name, (object, lambda v: False, f"one of the keys {', '.join(rules)}"))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not holds(value):
            raise UsageError(f"{where}: {name} is {value!r}; valid is {valid}")


class Shard(NamedTuple):
    """Items decoded together, and the file that is written when all are done."""

    path: Path
    prompts: list[tuple[str, list[int]]]  # item id, token ids

    def finished(self) -> list[dict[str, Any]] | None:
        """Returns the rows that an earlier start wrote, or None if there are none of these items."""
        if not self.path.exists():
            return None
        rows = read_json_lines(self.path, {"item_id": str, "completion": str, "num_tokens": int, "truncated": bool})
        same = sorted(row["item_id"] for row in rows) == sorted(item_id for item_id, _ in self.prompts)
        return rows if same else None


def shards(task: Task, name: str, items: list[dict[str, Any]], tokenizer: "Tokenizer", limit: int) -> list[Shard]:
    """Cuts a set into shards, shortest prompts first. Raises DataError if a prompt leaves no room for a completion.

    limit: tokens of the model's longest sequence.
    """
    prompts = [(item["item_id"], tokenizer.encode_prompt(item["prompt"])) for item in items]
    for item_id, ids in prompts:
        if len(ids) >= limit:
            raise DataError(f"prompt of {item_id} has {len(ids)} tokens; the model's longest sequence is {limit}")
    prompts.sort(key=lambda prompt: (len(prompt[1]), prompt[0]))
    size = SHARD_BATCHES * task.decoding["batch_size"]
    groups = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
    return [Shard(task.out / f"{name}.{number:04d}.jsonl", group) for number, group in enumerate(groups)]


def generate(task: Task, parallel: "Parallel") -> None:
    """Decodes the task with the native engine; all ranks call it together."""
    import torch

    from substrate.data.tokenizer import Tokenizer
    from substrate.model import ModelConfig, kernels

    if parallel.rank == 0:
        kernels.tell(parallel.device)
    config = ModelConfig.from_dict(task.model)
    model = load_model(config, parallel, task.base, task.adapter)
    tokenizer = Tokenizer.from_file(task.tokenizer)

    def decode(shard: Shard, progress: "Progress") -> Iterator[dict[str, Any]]:
        return decode_shard(model, tokenizer, shard.prompts, task.decoding, progress)

    engine = ("native", torch.__version__)
    write_sets(task, tokenizer, config.max_sequence_length, engine, decode, parallel.rank, parallel.share)


def write_sets(
    task: Task,
    tokenizer: "Tokenizer",
    limit: int,
    engine: tuple[str, str],
    decode: "Callable[[Shard, Progress], Iterator[dict[str, Any]]]",
    rank: int = 0,
    share: Callable[[Any], Any] = lambda value: value,
) -> None:
    """Decodes the missing shards of every set. Writes `engine.json` and, in item-id order, `<set>.jsonl`.

    limit: tokens of the longest sequence. engine: name and version. share: gives every rank the value of rank 0.
    """
    sets = {name: read_json_lines(path, PROMPT_FIELDS) for name, path in task.sets.items()}
    task.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_text(task.out / "engine.json", json.dumps(dict(zip(("engine", "version"), engine, strict=True))))
    for name, items in sets.items():
        if (task.out / f"{name}.jsonl").exists():
            continue
        done: list[dict[str, Any]] = []
        progress = Progress(task.out / "progress.jsonl", name, len(items), rank=rank)
        parts = shards(task, name, items, tokenizer, limit)
        for shard in parts:
            # Only rank 0 looks: it may be ahead and have written a shard that the others have yet to decode with it.
            rows = share(shard.finished() if rank == 0 else None)
            if rows is None:
                rows = list(decode(shard, progress))
                if rank == 0:
                    write_json_lines(shard.path, rows)
            else:
                progress.skip(len(rows))
            done += rows
        if rank == 0:
            write_json_lines(task.out / f"{name}.jsonl", sorted(done, key=lambda row: row["item_id"]))
            for shard in parts:
                shard.path.unlink()


def decode_shard(
    model: "HybridModel",
    tokenizer: "Tokenizer",
    prompts: list[tuple[str, list[int]]],
    values: dict[str, Any],
    progress: "Progress",
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a shard in the order in which their sequences end."""
    from substrate.inference.decode import Decoding, decode

    decoding = Decoding(**{**values, "stop": tuple(values.get("stop", ()))})

    def cut(text: str) -> int:
        """Returns where the first stop text begins, or the length of the text without one."""
        return min((text.find(stop) for stop in decoding.stop if stop in text), default=len(text))

    def stopped(ids: list[int]) -> bool:
        text = tokenizer.decode(ids[-STOP_WINDOW:]) if decoding.stop else ""
        return cut(text) < len(text)

    for one in decode(model, prompts, decoding, tokenizer.end_ids, stopped):
        text = tokenizer.decode(one.ids)
        row = {
            "item_id": one.item_id,
            "completion": text[: cut(text)],
            "num_tokens": len(one.ids),
            "truncated": one.truncated,
        }
        if decoding.log_probs:
            row["log_probs"] = [round(log_prob, 6) for log_prob in one.log_probs]
        progress.add(len(one.ids))
        yield row


class Progress:
    """Writes `progress.jsonl` on rank 0: at most one line in two seconds, and one at the end of each set."""

    def __init__(self, path: Path, name: str, total: int, *, rank: int) -> None:
        self._path = path if rank == 0 else None
        self._name, self._total = name, total
        self._done = self._skipped = self._tokens = 0
        self._began = self._last = time.monotonic()

    def skip(self, num_items: int) -> None:
        """Counts items that an earlier start has done, which do not enter the rate."""
        self._skipped += num_items
        self.add(0, num_items)

    def add(self, num_tokens: int, num_items: int = 1) -> None:
        """Counts finished items and their tokens."""
        self._done += num_items
        self._tokens += num_tokens
        now = time.monotonic()
        if self._path and (self._done == self._total or now - self._last >= PROGRESS_SECONDS):
            self._last, seconds = now, now - self._began
            rate = (self._done - self._skipped) / seconds if seconds else 0.0
            left = (self._total - self._done) / rate if rate else 0.0
            line = {
                "phase": "generate",
                "set": self._name,
                "done": self._done,
                "total": self._total,
                "tokens": self._tokens,
            }
            line |= {"seconds": round(seconds, 3), "items_per_second": round(rate, 3), "seconds_left": round(left, 1)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def load_model(config: "ModelConfig", parallel: "Parallel", base: Path, adapter: Path | None) -> "HybridModel":
    """Returns the model ready for `decode.decode`, with the adapter if there is one."""
    from substrate.model import build_model, load_adapter, load_base

    model = build_model(config, parallel, sequence_parallel=False)
    load_base(model, base)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


def main() -> None:
    """Reads the command line and the task, then starts the ranks or decodes as one of them."""
    parser = Parser(prog="substrate.generate", description="Complete prompts as a task file says.")
    parser.add_argument(
        "task", type=Path, nargs="?", default=Path("/task/task.json"), help="task file of kind generate"
    )
    path = parser.parse_args().task
    task = Task.read(path)
    if task.judge_tp > 1 and "RANK" not in os.environ:
        from substrate.distributed.launch import run_ranks

        sys.exit(run_ranks("substrate.generate", [str(path)], task.judge_tp))

    from substrate.distributed.groups import start

    parallel = start({"tp": task.judge_tp, "pp": 1, "ep": 1, "cp": 1, "dp": 1})
    try:
        generate(task, parallel)
    finally:
        parallel.shutdown()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
