"""Entry: train one adapter as a task file of kind `train` says (docs/contract.md).

    python -P -m substrate.train [/task/task.json]

The process reads the task, joins the other ranks and runs `training.run.Training`, which writes the adapter. Started
without RANK in the environment, it starts the ranks of this host itself and exits with their exit code. The exit codes
are those of `interface/errors.py`.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from substrate.interface.command_line import Parser
from substrate.interface.errors import OutOfMemory, UsageError, exit_code_of
from substrate.interface.task import Task
from substrate.recipes import load_recipe

if TYPE_CHECKING:
    from substrate.distributed.groups import Parallel


def _check_origin() -> None:
    """Raises UsageError if a sandbox (SUBSTRATE_ROOT) runs another copy of the package than the image's."""
    root, here = os.environ.get("SUBSTRATE_ROOT"), Path(__file__).resolve()
    if root and not here.is_relative_to(Path(root).resolve()):
        raise UsageError(
            f"substrate was imported from {here.parent}; it must lie below SUBSTRATE_ROOT {root}: set PYTHONPATH to that"
        )


def main() -> None:
    """Reads the command line and the task, then starts the ranks or runs as one of them."""
    parser = Parser(prog="substrate.train", description="Train one adapter as a task file says.")
    parser.add_argument("task", type=Path, nargs="?", default=Path("/task/task.json"), help="task file of kind train")
    path = parser.parse_args().task
    _check_origin()
    task = Task.read(path)
    # Checked here, before any rank starts and imports torch.
    recipe = load_recipe(task.recipe)
    recipe.check_layout(task.parallelism["pp"], task.parallelism["dp"])
    if task.num_ranks > 1 and "RANK" not in os.environ:
        from substrate.distributed.launch import run_ranks

        sys.exit(run_ranks("substrate.train", [str(path)], task.num_ranks))

    from substrate.distributed.groups import start
    from substrate.training.run import Training

    parallel = start(task.parallelism)
    try:
        task.out.mkdir(parents=True, exist_ok=True)
        Training(task, recipe, parallel).run()
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"rank {parallel.rank}: {_memory(task, parallel)}; {str(error).splitlines()[0]}"
            ) from None
        raise
    finally:
        parallel.shutdown()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, or on the host, where torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _memory(task: Task, parallel: "Parallel") -> str:
    """Says how much memory a rank's part of the base needs, and how much is free."""
    import torch

    from substrate.model import ModelConfig
    from substrate.model.published import num_published_parameters

    config = ModelConfig.from_dict(task.model)
    ranks = parallel.world_size // parallel.dp * (parallel.ep if parallel.ep > 1 else 1)
    part = num_published_parameters(config) * config.torch_dtype.itemsize // ranks
    if parallel.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(parallel.device)
    else:
        free, total = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    return f"the base alone is {part / 1e9:.2f} GB a rank, {free / 1e9:.2f} of {total / 1e9:.2f} GB are free now"


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
