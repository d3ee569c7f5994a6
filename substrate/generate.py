"""Entry: complete the prompts of a task file of kind `generate` (docs/contract.md).

    python -P -m substrate.generate [/task/task.json]

    in    {"item_id": "roman-000012", "family": "roman", "prompt": "..."}
    out   {"item_id": "roman-000012", "completion": "...", "num_tokens": 57, "truncated": false}

The items of all sets form one queue (`inference/queue.py`), which `inference/decode.py` decodes. Each finished item is one
line of a journal, so a killed run resumes with the missing items. A sequence ends at an end id of the checkpoint or
before a stop text; it is truncated after `max_new_tokens` or at the model's longest sequence.

Started without RANK in the environment, the process starts `judge_replicas` x `judge_tp` ranks: replicas of the model that
decode different items, each on `judge_tp` tensor-parallel ranks that decode the same.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from substrate.interface.command_line import Parser, open_plain, read_text, write_text
from substrate.interface.errors import EngineFailed, UsageError, exit_code_of

if TYPE_CHECKING:
    from substrate.data.tokenizer import Tokenizer
    from substrate.distributed.groups import Parallel
    from substrate.inference.queue import Item, Queue
    from substrate.model import HybridModel, ModelConfig


STOP_WINDOW = 64  # newest tokens that are searched for a stop text


@dataclass(frozen=True)
class Task:
    """A checked task file of kind `generate`. Paths are those inside the sandbox."""

    model: dict[str, Any]
    judge_tp: int  # tensor-parallel ranks of a replica
    judge_replicas: int  # of the model, which share the items
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
                judge_replicas=int(config["parallelism"].get("judge_replicas", 1)),
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
        for name, ranks in (("judge_tp", read.judge_tp), ("judge_replicas", read.judge_replicas)):
            if ranks < 1:
                raise UsageError(f"task file {path}: {name} is {ranks}; valid is at least 1")
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


def generate(task: Task, parallel: "Parallel") -> None:
    """Decodes the task with the native engine; all ranks call it together."""
    import torch

    from substrate.data.tokenizer import Tokenizer
    from substrate.model import ModelConfig
    from substrate.ops import kernels

    if parallel.rank == 0:
        kernels.tell(parallel.device)
    config = ModelConfig.from_dict(task.model)
    model = load_model(config, parallel, task.base, task.adapter)
    tokenizer = Tokenizer.from_file(task.tokenizer)
    queue = open_queue(task, tokenizer, config.max_sequence_length, ("native", torch.__version__))
    # Only rank 0 looks: it may be ahead, and all ranks of a replica must decode the same items.
    done = parallel.share(queue.done() if parallel.rank == 0 else None)

    def decode(items: Sequence["Item"]) -> Iterator[tuple["Item", dict[str, Any]]]:
        return decoded(model, tokenizer, items, task.decoding)

    work_through(queue, done, decode, task.out, parallel.dp_rank, parallel.dp, writes=parallel.tp_rank == 0)


def work_through(
    queue: "Queue",
    done: Sequence[tuple[str, str]],
    decode: Callable[[Sequence["Item"]], Iterator[tuple["Item", dict[str, Any]]]],
    out: Path,
    replica: int,
    num_replicas: int,
    *,
    writes: bool = True,
) -> None:
    """Decodes this replica's items, and returns when every set has its file, which replica 0 writes.

    done: the items that have a row already. writes: whether this is the rank of the replica that writes. Raises EngineFailed
    where `decode` leaves an item out or gives one twice.
    """
    from substrate.inference.queue import Journal, Progress

    is_first = writes and replica == 0
    progress = Progress(out, len(queue.items), len(done))
    left = {item[:2]: item for item in queue.share(done, replica, num_replicas)}
    with closing(Journal(out, replica, queue.work)) if writes else nullcontext() as journal:
        for item, row in decode(list(left.values())):
            if left.pop(item[:2], None) is None:
                raise EngineFailed(f"the engine ended {item.set_name}/{item.item_id} twice")
            if journal is not None:
                journal.add(item, row)
            if is_first:
                queue.refresh()
                progress.tell(queue.rows.values())
    if left:  # else replica 0 would wait for them without end
        raise EngineFailed(f"the engine ended without {len(left)} items, such as {'/'.join(next(iter(left)))}")
    # Replicas wait for files and not in a collective call, which would time out where one has a long completion left.
    if is_first:
        queue.finish(progress)
    queue.wait()


def open_queue(task: Task, tokenizer: "Tokenizer", limit: int, engine: tuple[str, str]) -> "Queue":
    """Returns the task's items and writes `engine.json`. limit: tokens of the longest sequence. engine: name and version."""
    from substrate.inference.queue import Queue

    queue = Queue(task.sets, tokenizer, limit, task.out, work_of(task, engine))
    task.out.mkdir(parents=True, exist_ok=True)
    write_text(task.out / "engine.json", json.dumps(dict(zip(("engine", "version"), engine, strict=True))))
    return queue


def work_of(task: Task, engine: tuple[str, str]) -> str:
    """Returns the digest of all that a completion follows from but the base, which is the image's or verified, and rounding.

    How many sequences and ranks work together decides rounding alone.
    """
    folder = task.adapter
    files = (
        {f"adapter/{path.relative_to(folder)}": path for path in folder.rglob("*") if path.is_file()} if folder else {}
    )
    files |= {f"sets/{name}": path for name, path in task.sets.items()}
    decoding = {name: value for name, value in task.decoding.items() if name != "batch_size"}
    parts = [task.model, decoding, engine, {name: digest_of(path) for name, path in files.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """Returns the sha256 of a file. Raises DataError if it cannot be read."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decoded(
    model: "HybridModel", tokenizer: "Tokenizer", items: Sequence["Item"], values: dict[str, Any]
) -> Iterator[tuple["Item", dict[str, Any]]]:
    """Yields each item with its row, in the order in which their sequences end."""
    from substrate.inference.decode import Decoding, decode

    decoding = Decoding(**{**values, "stop": tuple(values.get("stop", ()))})
    stops = Stops(tokenizer, values)
    for one in decode(model, [(item.item_id, item.ids) for item in items], decoding, tokenizer.end_ids, stops.are_in):
        row = {
            "item_id": one.item_id,
            "completion": stops.text_of(one.ids),
            "num_tokens": len(one.ids),
            "truncated": one.truncated,
        }
        if decoding.log_probs:
            row["log_probs"] = [round(log_prob, 6) for log_prob in one.log_probs]
        yield items[one.number], row


class Stops:
    """The texts before which a completion ends."""

    def __init__(self, tokenizer: "Tokenizer", values: dict[str, Any]) -> None:
        self._tokenizer, self._texts = tokenizer, tuple(values.get("stop", ()))

    def are_in(self, ids: list[int]) -> bool:
        """Returns whether the newest tokens hold a stop text."""
        text = self._tokenizer.decode(ids[-STOP_WINDOW:]) if self._texts else ""
        return any(stop in text for stop in self._texts)

    def text_of(self, ids: list[int]) -> str:
        """Returns the text of a completion up to its first stop text."""
        text = self._tokenizer.decode(ids)
        return text[: min((text.find(stop) for stop in self._texts if stop in text), default=len(text))]


def load_model(config: "ModelConfig", parallel: "Parallel", base: Path, adapter: Path | None) -> "HybridModel":
    """Returns the model ready for `decode.decode`, with the adapter if there is one."""
    from substrate.model import build_model, load_adapter, load_base

    model = build_model(config, parallel)
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
    num_ranks = task.judge_tp * task.judge_replicas
    if num_ranks > 1 and "RANK" not in os.environ:
        from substrate.distributed.launch import run_ranks

        sys.exit(run_ranks("substrate.generate", [str(path)], num_ranks))

    from substrate.distributed.groups import start

    parallel = start({"tp": task.judge_tp, "pp": 1, "ep": 1, "cp": 1, "dp": task.judge_replicas})
    try:
        generate(task, parallel)
    finally:
        parallel.shutdown()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
