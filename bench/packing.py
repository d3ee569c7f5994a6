"""Compare training steps on packed rows with steps on padded rows: same model, rows and weights, in turn in one process.

    python -m bench.packing [--recipe sft_lora] [--tp 2] [--budgets 1024 4096] [--steps 12]

The rows are those of a shipped recipe on `tasks=small` (`--level full` has the competition's). Padded steps are what the trainer made
before rows were packed: rows sorted by length, `--rows` to a pass, each pass as long as its longest row. The table has the median step,
its ratio to the padded one (above 1 is faster), and the share of padding. All steps make the same gradients, and the losses must agree.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402

from substrate.data.batches import Shape, make_batch  # noqa: E402
from substrate.data.rows import Row, read_examples  # noqa: E402
from substrate.data.tokenizer import Tokenizer  # noqa: E402
from substrate.distributed.groups import start  # noqa: E402
from substrate.model import ModelConfig, add_lora, build_model, load_base, token_log_probs  # noqa: E402
from substrate.payload import write_payload  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
Pass = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int] | None]
"""Tokens, labels and weights of a pass, (B, L), and the lengths of packed rows."""


def rows_of(level: str, count: int) -> list[Row]:
    """The first `count` solved puzzles of a task file, families in turn."""
    tasks = yaml.safe_load((ROOT / "hydra_conf" / "tasks" / f"{level}.yaml").read_text())
    tokenizer = Tokenizer.from_file(ROOT / "substrate" / "base" / "tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        each = -(-count // len(tasks["families"]))
        write_payload(Path(folder), seed=1, level=level, num_per_family=each, families=tasks["families"])
        examples = list(read_examples(Path(folder) / "data" / "train.jsonl"))
    by_family = [[one for one in examples if one.family == family] for family in tasks["families"]]
    return [
        Row(
            one.item_id,
            one.family,
            tokenizer.encode_prompt(one.prompt),
            tokenizer.encode_answer(one.traces["stepwise"], one.answer),
            one.answer,
        )
        for turn in zip(*by_family, strict=True)
        for one in turn
    ][:count]


def packed(rows: Sequence[Row], budget: int, tp: int) -> list[Pass]:
    """The passes of a step as the trainer makes them."""
    passes = make_batch(rows, Shape(budget, tp)).micro_batches
    return [(each.tokens_1L, each.labels_1L, each.weights_1L, each.lengths) for each in passes]


def padded(rows: Sequence[Row], size: int, tp: int) -> list[Pass]:
    """The same step in passes of `size` rows, each padded to the longest."""
    ordered = sorted(rows, key=lambda row: row.num_tokens)
    singles = [packed([row], 1, 1)[0] for row in ordered]
    share = sum(len(row.learned) for row in rows)
    passes: list[Pass] = []
    for begin in range(0, len(singles), size):
        part, some = singles[begin : begin + size], ordered[begin : begin + size]
        length = -(-part[-1][0].shape[1] // tp) * tp
        tokens, labels, weights = (
            torch.cat([F.pad(each[n], (0, length - each[n].shape[1])) for each in part]) for n in range(3)
        )
        # A row alone has weights of 1 / its own learned tokens.
        weights *= torch.tensor([[len(row.learned) / share] for row in some])
        passes.append((tokens, labels, weights, None))
    return passes


def measure(rank: int, asked: argparse.Namespace, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(asked.tp), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    parallel = start({"tp": asked.tp, "pp": 1, "ep": 1, "cp": 1, "dp": 1})
    recipe = yaml.safe_load((ROOT / "hydra_conf" / "recipe" / "sft_lora.yaml").read_text())
    changes = yaml.safe_load((ROOT / "hydra_conf" / "recipe" / f"{asked.recipe}.yaml").read_text())
    size, lora = (recipe | changes)["batch_size"], recipe["lora"]
    model = build_model(
        ModelConfig.from_dict(yaml.safe_load((ROOT / "hydra_conf/model/tiny.yaml").read_text())), parallel
    )
    load_base(model, ROOT / "substrate" / "base" / "model.safetensors")
    trained = add_lora(model.train(), lora["rank"], lora["alpha"], 0.0, lora["targets"], seed=1)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(passes: Sequence[Pass]) -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for tokens, labels, weights, lengths in passes:
            loss = -(token_log_probs(model, tokens, labels, lengths) * weights).sum()
            loss.backward()
            total += loss.item()
        parallel.finalize_gradients(model)
        parallel.clip_gradients(model, 1.0)
        return total

    kinds: dict[str, Callable[[Sequence[Row]], list[Pass]]] = {
        f"padded, {asked.rows or size} rows": lambda rows: padded(rows, asked.rows or size, asked.tp)
    }
    for budget in asked.budgets:
        kinds[f"packed, {budget} tokens"] = lambda rows, budget=budget: packed(rows, budget, asked.tp)  # type: ignore[misc]
    rows = rows_of(asked.level, size * asked.steps)
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    losses: dict[str, list[float]] = {name: [] for name in kinds}
    places = dict.fromkeys(kinds, 0)
    passes_of = dict.fromkeys(kinds, 0)
    for number in range(asked.steps):
        batch = rows[number * size : (number + 1) * size]
        for name, cut in kinds.items():
            begun = time.perf_counter()
            passes = cut(batch)
            losses[name].append(step(passes))
            taken[name].append(time.perf_counter() - begun)
            places[name] += sum(each[0].numel() for each in passes)
            passes_of[name] += len(passes)
        optimizer.step()
    if rank == 0:
        first = next(iter(kinds))
        tokens = sum(row.num_tokens - 1 for row in rows)
        print(
            f"recipe {asked.recipe}, tasks {asked.level}, TP {asked.tp}: {size} rows a step, {tokens / len(rows):.0f} tokens a row"
        )
        print(f"{'':<24}{'passes':>8}{'padding':>10}{'ms a step':>11}{'ratio':>8}{'apart':>10}")
        for name in kinds:
            ms = 1000 * statistics.median(taken[name][2:])
            ratio = statistics.median(a / b for a, b in zip(taken[first][2:], taken[name][2:], strict=True))
            apart = max(abs(a - b) for a, b in zip(losses[first], losses[name], strict=True))
            padding = f"{100 * (1 - tokens / places[name]):.1f} %"
            print(f"{name:<24}{passes_of[name] / asked.steps:>8.1f}{padding:>10}{ms:>11.1f}{ratio:>8.2f}{apart:>10.1e}")
    parallel.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="sft_lora", help="its batch_size is taken")
    parser.add_argument("--level", default="small", choices=["small", "full"])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rows", type=int, default=0, help="rows in a padded pass; 0: all of a step")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--port", type=int, default=29711)
    asked = parser.parse_args()
    mp.spawn(measure, (asked, asked.port), nprocs=asked.tp)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
