"""Entry: one forward pass over rows of token ids, with the log-probability of every next token (docs/contract.md).

    python -P -m substrate.forward [/task/task.json]

    in    {"tokens": [1, 10, 4205, ...]}
    out   {"log_probs": [-2.31, ...]}            log_probs[i] is log p(tokens[i + 1] | tokens[0..i]), in nats

A site compares them with those that another program computed from the same checkpoint. A task without rows asks for a
pass over a fixed English text, which tells a model that has learned English from one that guesses.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from substrate.interface.command_line import Parser, read_json, read_json_lines, write_json_lines, write_text
from substrate.interface.errors import DataError, UsageError, exit_code_of

ENGLISH = "The sun rises in the east and sets in the west. In winter the days are short and the nights are long."


def forward(task: dict[str, Any]) -> None:
    """Starts the ranks, or runs as one of them. Rank 0 writes `log_probs.jsonl` and `summary.json` to /out."""
    import torch

    from substrate.data.tokenizer import Tokenizer
    from substrate.distributed.groups import start
    from substrate.generate import load_model
    from substrate.model import ModelConfig, token_log_probs

    config, paths = ModelConfig.from_dict(task["config"]["model"]), task["paths"]
    parallel = start({"tp": int(task["config"]["parallelism"]["judge_tp"]), "pp": 1, "ep": 1, "cp": 1, "dp": 1})
    try:
        model = load_model(config, parallel, Path(paths["base"]), None)
        if paths["rows"] is None:
            rows = [Tokenizer.from_file(paths["tokenizer"]).encode(ENGLISH)]
        else:
            rows = [row["tokens"] for row in read_json_lines(Path(paths["rows"]), {"tokens": list})]
        check_rows(rows, config)
        found = []
        with torch.no_grad():
            for row in rows:
                ids = torch.tensor([row], device=parallel.device)
                found.append(token_log_probs(model, ids[:, :-1], ids[:, 1:])[0].tolist())
    finally:
        parallel.shutdown()
    if parallel.rank == 0:
        out = Path(paths["out"])
        flat = [value for values in found for value in values]
        if not all(math.isfinite(value) for value in flat):
            raise DataError("the forward pass gives NaN or infinity; the weights are damaged, or their type is wrong")
        write_json_lines(out / "log_probs.jsonl", [{"log_probs": values} for values in found])
        summary = {
            "tokens": len(flat),
            "nats_per_token": -sum(flat) / len(flat),
            "guessing": math.log(config.vocab_size),
        }
        write_text(out / "summary.json", json.dumps(summary))


def check_rows(rows: list[list[Any]], config: Any) -> None:
    """Raises DataError for no row, for one without a next token, for one that is too long, and for an id that is none."""
    if not rows:
        raise DataError("the file of rows is empty; give at least one line with tokens")
    for number, row in enumerate(rows, 1):
        if not 2 <= len(row) <= config.max_sequence_length:
            raise DataError(f"row {number} has {len(row)} tokens; valid are 2 to {config.max_sequence_length}")
        for token in row:
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise DataError(f"row {number} holds {token!r}; valid are token ids from 0 to {config.vocab_size - 1}")


def main() -> None:
    """Reads the command line and the task, then starts the ranks or runs as one of them."""
    parser = Parser(prog="substrate.forward", description="One forward pass, as a task file says.")
    parser.add_argument("task", type=Path, nargs="?", default=Path("/task/task.json"), help="task file of kind forward")
    path = parser.parse_args().task
    task = read_json(path)
    try:
        header, ranks = (task["schema"], task["kind"]), int(task["config"]["parallelism"]["judge_tp"])
        _ = [task["paths"][name] for name in ("base", "tokenizer", "rows", "out")], task["config"]["model"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"task file {path}: {error!r}; it must have config and paths of kind forward") from None
    if header != (1, "forward"):
        raise UsageError(f"task file {path} has schema and kind {header}; valid is (1, 'forward')")
    if ranks > 1 and "RANK" not in os.environ:
        from substrate.distributed.launch import run_ranks

        sys.exit(run_ranks("substrate.forward", [str(path)], ranks))
    forward(task)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
