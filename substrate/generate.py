"""Completes the prompts of a task by greedy decoding: `python -P -m substrate.generate [/task/task.json]`.

Task kind `generate` of docs/contract.md. A prompt and its completion:

    in    {"item_id": "roman-000012", "family": "roman", "prompt": "..."}
    out   {"item_id": "roman-000012", "completion": "...", "num_tokens": 57, "truncated": false}

Prompts are sorted by length and padded on the left to batches, so that all sequences of a batch stand at the same
position: keys and values, convolution windows and scan states grow together. Padding is masked everywhere, so a
completion does not depend on the other items of its batch; float32 rounding does, and with it the choice between two
tokens that are within about 1e-4. A sequence ends with the end-of-sequence token, or truncated after `max_new_tokens`
or at the model's longest sequence.

Started without RANK in the environment, it starts `judge_tp` ranks itself; all decode the same, rank 0 writes.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from substrate.entry import Parser, read_json_lines, read_text, write_json_lines
from substrate.errors import DataError, UsageError, exit_code_of

if TYPE_CHECKING:
    from substrate.model import HybridModel, ModelConfig
    from substrate.parallel import Parallel
    from substrate.tokenizer import Tokenizer

PROMPT_FIELDS = {"item_id": str, "family": str, "prompt": str}


@dataclass(frozen=True)
class Task:
    """A checked task file of kind `generate`. Paths are those inside the sandbox."""

    model: dict[str, Any]
    judge_tp: int  # tensor-parallel ranks
    max_new_tokens: int  # of one completion, the end-of-sequence token included
    batch_size: int  # sequences decoded together
    base: Path
    tokenizer: Path
    adapter: Path | None
    sets: dict[str, Path]  # name of a set -> its prompts
    out: Path

    @classmethod
    def read(cls, path: Path) -> "Task":
        """Raises DataError where there is no file, UsageError where it is not what the contract says."""
        try:
            task = json.loads(read_text(path))
            header = (task.get("schema"), task.get("kind"))
            config, paths = task["config"], task["paths"]
            read = cls(
                model=config["model"],
                judge_tp=int(config["parallelism"]["judge_tp"]),
                max_new_tokens=int(config["decoding"]["max_new_tokens"]),
                batch_size=int(config["decoding"]["batch_size"]),
                base=Path(paths["base"]),
                tokenizer=Path(paths["tokenizer"]),
                adapter=Path(paths["adapter"]) if paths["adapter"] is not None else None,
                sets={name: Path(prompts) for name, prompts in paths["sets"].items()},
                out=Path(paths["out"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"task file {path}: {error!r}; config and paths of kind generate are needed") from None
        if header != (1, "generate"):
            raise UsageError(f"task file {path} has schema and kind {header}; valid is (1, 'generate')")
        for name in ("judge_tp", "max_new_tokens", "batch_size"):
            if getattr(read, name) < 1:
                raise UsageError(f"task file {path}: {name} is {getattr(read, name)}; at least 1 is needed")
        return read


def decode_batch(model: "HybridModel", prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations of token-id prompts, each up to and including the end-of-sequence token where it comes.

    The model is in eval mode and built without sequence parallelism. No prompt may be empty.
    """
    import torch

    from substrate.model import DecodeState
    from substrate.tokenizer import EOS_ID, PAD_ID

    length = max(map(len, prompts))
    num_steps = min(max_new_tokens, model.architecture.max_sequence_length - length)
    device = model.output_layer.weight.device
    tokens_BL = torch.tensor([[PAD_ID] * (length - len(p)) + list(p) for p in prompts], device=device)
    first_B1 = torch.tensor([[length - len(p)] for p in prompts], device=device)
    written = []
    # Not inference_mode: megatron-core keeps communication buffers between calls, and outside of it nobody could write
    # to them again.
    with torch.no_grad():
        state = DecodeState(torch.arange(length, device=device) >= first_B1, max_length=length + num_steps)
        ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for _ in range(num_steps):
            tokens_BL = state.advance(model, tokens_BL).argmax(-1, keepdim=True)
            written.append(tokens_BL)
            ended_B |= tokens_BL[:, 0] == EOS_ID
            if ended_B.all():
                break
    rows = torch.cat(written, 1).tolist()
    return [row[: row.index(EOS_ID) + 1] if EOS_ID in row else row for row in rows]


def complete(
    model: "HybridModel", tokenizer: "Tokenizer", items: list[dict[str, Any]], max_new_tokens: int, batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """Yields the completions batch by batch, shortest prompts first. Raises DataError for a prompt that is too long."""
    from substrate.tokenizer import EOS_ID

    limit = model.architecture.max_sequence_length
    prompts = [(tokenizer.encode_prompt(item["prompt"]), item["item_id"]) for item in items]
    for ids, item_id in prompts:
        if len(ids) >= limit:
            raise DataError(f"prompt of {item_id} has {len(ids)} tokens; the model's longest sequence is {limit}")
    prompts.sort(key=lambda prompt: (len(prompt[0]), prompt[1]))
    for begin in range(0, len(prompts), batch_size):
        batch = prompts[begin : begin + batch_size]
        written = decode_batch(model, [ids for ids, _ in batch], max_new_tokens)
        yield [
            {
                "item_id": item_id,
                "completion": tokenizer.decode(ids),
                "num_tokens": len(ids),
                "truncated": ids[-1] != EOS_ID,
            }
            for (_, item_id), ids in zip(batch, written, strict=True)
        ]


def generate(task: Task, parallel: "Parallel") -> None:
    """Decodes every set of a task and writes `<set>.jsonl` in item-id order, and a line of progress a batch."""
    from substrate.model import ModelConfig
    from substrate.tokenizer import Tokenizer

    started = time.monotonic()
    sets = {name: read_json_lines(path, PROMPT_FIELDS) for name, path in task.sets.items()}
    model = load_model(ModelConfig.from_dict(task.model), parallel, task.base, task.adapter)
    tokenizer = Tokenizer.from_file(task.tokenizer)
    with _progress_file(task.out, parallel.rank) as progress:
        for name, items in sets.items():
            done: list[dict[str, Any]] = []
            for rows in complete(model, tokenizer, items, task.max_new_tokens, task.batch_size):
                done += rows
                line = {
                    "phase": "generate",
                    "set": name,
                    "done": len(done),
                    "total": len(items),
                    "tokens": sum(row["num_tokens"] for row in done),
                    "seconds": round(time.monotonic() - started, 3),
                }
                progress.write(json.dumps(line) + "\n")
                progress.flush()
            if parallel.rank == 0:
                write_json_lines(task.out / f"{name}.jsonl", sorted(done, key=lambda row: row["item_id"]))


def load_model(config: "ModelConfig", parallel: "Parallel", base: Path, adapter: Path | None) -> "HybridModel":
    """The model ready for `decode_batch`."""
    from substrate.model import build_model, load_adapter, load_base

    model = build_model(config, parallel, sequence_parallel=False)
    load_base(model, base)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


def _progress_file(out: Path, rank: int) -> TextIO:
    """`progress.jsonl` on rank 0; the other ranks' lines go nowhere."""
    out.mkdir(parents=True, exist_ok=True)
    return (out / "progress.jsonl" if rank == 0 else Path(os.devnull)).open("w", encoding="utf-8")


def main() -> None:
    """Reads the command line and the task; starts the ranks, or is one."""
    parser = Parser(prog="substrate.generate", description="Complete prompts as a task file says.")
    parser.add_argument(
        "task", type=Path, nargs="?", default=Path("/task/task.json"), help="task file of kind generate"
    )
    path = parser.parse_args().task
    task = Task.read(path)
    if task.judge_tp > 1 and "RANK" not in os.environ:
        from substrate.launch import run_ranks

        sys.exit(run_ranks("substrate.generate", [str(path)], task.judge_tp))

    from substrate.parallel import start

    parallel = start({"tp": task.judge_tp, "pp": 1, "ep": 1, "cp": 1, "dp": 1})
    try:
        generate(task, parallel)
    finally:
        parallel.shutdown()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
