"""Entry: compile and tune the kernels of a model, as a task file of kind `warm_up` says (docs/contract.md).

    python -P -m substrate.warm_up [/task/task.json]

It trains and decodes for a few passes with random weights, one layer of each kind, at the sizes of the model, and with as
many ranks as training and judging have. What Triton and torch compile and tune meanwhile lies in the folders that
TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR name, and a later process of the same image finds it there. It reads no
weights and no data.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from substrate.interface.command_line import Parser, read_json, write_json
from substrate.interface.errors import UsageError, exit_code_of
from substrate.recipes import load_recipe

if TYPE_CHECKING:
    import torch

    from substrate.distributed.groups import Parallel
    from substrate.recipes.base_recipe import BaseRecipe

NEW_TOKENS = 4  # of a completion: the second step of a size is recorded as a graph, and the third replays it
PROMPTS = (5, 17, 9)  # tokens


def warm_up(config: dict[str, Any], out: Path, parallel: "Parallel") -> None:
    """Runs the passes; all ranks call it together. Rank 0 writes `kernels.json`."""
    import torch

    from substrate.inference.decode import Decoding, decode
    from substrate.model import ModelConfig, build_model
    from substrate.ops import kernels

    whole, recipe = ModelConfig.from_dict(config["model"]), load_recipe(config["recipe"])
    kinds = "".join(dict.fromkeys(whole.pattern))
    if parallel.rank == 0:
        kernels.tell(parallel.device)
    torch.manual_seed(0)
    model = build_model(ModelConfig.from_dict({**config["model"], "pattern": kinds}), parallel)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.02)
    for prompts in (PROMPTS, PROMPTS[:1]):
        items = [(str(number), torch.randint(whole.vocab_size, (n,)).tolist()) for number, n in enumerate(prompts)]
        list(decode(model.eval(), items, Decoding(NEW_TOKENS, len(items)), end_ids=()))
    train(model, recipe, whole.vocab_size)
    if parallel.rank == 0:
        write_json(out / "kernels.json", asdict(kernels.of(parallel.device)))


def train(model: Any, recipe: "BaseRecipe", vocab_size: int) -> None:
    """Makes passes as a step has them, of several documents and of one, and one pass without gradients, as a holdout has."""
    import torch

    from substrate.model import token_log_probs

    recipe.attach(model, 0)
    size = max(recipe.micro_batch_tokens, 4)
    for lengths in ([size // 2, size - size // 2], [size // 4, size // 2], [size - 1]):
        tokens_1L = torch.randint(vocab_size, (1, sum(lengths)))
        learned_1L = torch.ones_like(tokens_1L, dtype=torch.bool)

        def outputs(
            tokens: "torch.Tensor" = tokens_1L, learned: "torch.Tensor" = learned_1L, each: Any = lengths
        ) -> Any:
            return token_log_probs(model, tokens, tokens, each, wanted_BL=learned)

        model.train()
        outputs().sum().backward()
        model.eval()
        with torch.no_grad():
            outputs()


def layout(parallelism: dict[str, Any], ranks: int) -> dict[str, int]:
    """Returns the layout of one tensor-parallel group. Experts are spread as in training where the group can hold them."""
    ep = int(parallelism["ep"])
    return {"tp": ranks, "pp": 1, "cp": 1, "dp": 1, "ep": ep if ranks % ep == 0 else 1}


def main() -> None:
    """Reads the command line and the task, then starts the ranks or runs as one of them."""
    parser = Parser(prog="substrate.warm_up", description="Compile and tune kernels as a task file says.")
    parser.add_argument("task", type=Path, nargs="?", default=Path("/task/task.json"), help="task file of kind warm_up")
    path = parser.parse_args().task
    task = read_json(path)
    try:
        header, config, out = (task["schema"], task["kind"]), task["config"], Path(task["paths"]["out"])
        sizes = sorted({int(config["parallelism"][name]) for name in ("tp", "judge_tp")})
        _ = config["model"], config["recipe"], config["parallelism"]["ep"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"task file {path}: {error!r}; it must have config and paths of kind warm_up") from None
    if header != (1, "warm_up") or sizes[0] < 1:
        raise UsageError(f"task file {path} has schema and kind {header} and ranks {sizes}; valid is (1, 'warm_up')")
    if "RANK" not in os.environ and sizes != [1]:
        from substrate.distributed.launch import run_ranks

        for ranks in sizes:
            if code := run_ranks("substrate.warm_up", [str(path)], ranks):
                sys.exit(code)
        return

    from substrate.distributed.groups import start

    parallel = start(layout(config["parallelism"], int(os.environ.get("WORLD_SIZE", 1))))
    try:
        warm_up(config, out, parallel)
    finally:
        parallel.shutdown()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
