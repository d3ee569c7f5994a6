"""Trains one adapter as a task file says: `python -P -m substrate.train [/task/task.json]` (docs/contract.md, kind
`train`).

    read the task -> join the ranks -> base model + adapter -> stream, learning rates, checkpoint -> steps -> adapter

What is trained and on what is the recipe's; the mathematics of layout is the model's; here is the loop that they
share. It looks at the stop file before every step. Started without RANK in the environment, it starts the ranks of
this host itself and passes on their exit code.

Exit 0 done; 75 stopped with the state saved: start again; 64 the task file is wrong; 65 the data are wrong; 66 the
training diverged; 67 out of memory.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from substrate.entry import Parser
from substrate.errors import Diverged, OutOfMemory, Stopped, UsageError, exit_code_of
from substrate.recipes import load_recipe
from substrate.task import Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from substrate.model.layout import Placement
    from substrate.parallel import Parallel

STARTED = time.monotonic()
# A loss of more than so many times that of guessing evenly, log(vocabulary), does not come back.
DIVERGED_FACTOR = 3.0
ADAM_BETAS, ADAM_EPS = (0.9, 0.95), 1e-8  # the betas of Nemotron-H's own training (arXiv:2504.03624)


class Progress:
    """`/out/progress.jsonl`: a line a step, flushed, on rank 0. Tokens and seconds are sums over all starts."""

    def __init__(self, path: Path, *, rank: int, done_steps: int) -> None:
        self._path = path if rank == 0 else None
        if rank == 0:
            # Steps after the checkpoint will be made again; their lines of the run that was killed go.
            kept = [line for line in _lines(path) if done_steps and json.loads(line).get("step", 0) <= done_steps]
            path.write_text("".join(kept), encoding="utf-8")

    def write(self, phase: str, **values: float) -> None:
        """Appends {"phase": phase, **values}."""
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, **values}) + "\n")


class Training:
    """One run: the model with its adapter, and all that changes from step to step. All ranks build it together."""

    def __init__(self, task: Task, parallel: "Parallel") -> None:
        import torch

        from substrate.model import ModelConfig, build_model, kernels, load_base
        from substrate.schedule import learning_rates

        self.task, self.parallel = task, parallel
        if parallel.rank == 0:
            kernels.tell(parallel.device)
        self.recipe = recipe = load_recipe(task.recipe)
        self.stream = recipe.stream(task.train_data, task.tokenizer, parallel, task.seed)
        torch.manual_seed(task.seed + parallel.dp_rank)  # for dropout: alike in a tensor-parallel group
        recompute = bool(task.parallelism.get("recompute", False))
        self.model = build_model(ModelConfig.from_dict(task.model), parallel, recompute=recompute)
        load_base(self.model, task.base)
        recipe.attach(self.model, task.seed)
        self.model.train()
        self.trainable = [tensor for tensor in self.model.parameters() if tensor.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trainable, lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=recipe.weight_decay
        )
        for tensor in self.trainable:  # AdamW makes them at its first step, a checkpoint fills them before
            zeros = {"exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
            self.optimizer.state[tensor] = {"step": torch.zeros(()), **zeros}
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.rates = [0.0] * recipe.num_steps
        if not self._resume():
            self.rates = learning_rates(
                recipe.schedule,
                peak=recipe.learning_rate,
                num_steps=recipe.num_steps,
                warmup_steps=recipe.warmup_steps,
                min_lr_ratio=recipe.min_lr_ratio,
                rank=parallel.rank,
            )
        self.progress = Progress(task.out / "progress.jsonl", rank=parallel.rank, done_steps=self.step)

    def run(self) -> None:
        """Makes the steps that are left and saves the adapter. Raises Stopped, Diverged."""
        self.progress.write("start", seconds=round(time.monotonic() - STARTED, 3))
        begun = time.monotonic() - self.seconds
        while self.step < self.recipe.num_steps:
            if self.parallel.agree(self.task.stop.exists()):
                self._save_checkpoint()
                raise Stopped(f"stopped after step {self.step} of {self.recipe.num_steps}; the state is saved")
            loss, grad_norm = self._make_step()
            self.seconds = time.monotonic() - begun
            self.progress.write(
                "train",
                step=self.step,
                num_steps=self.recipe.num_steps,
                loss=loss,
                grad_norm=grad_norm,
                learning_rate=self.rates[self.step - 1],
                tokens=self.tokens,
                seconds=round(self.seconds, 3),
            )
            if self.step % self.recipe.checkpoint_every == 0 and self.step < self.recipe.num_steps:
                self._save_checkpoint()
        self.recipe.save(self.model, self.task.out / "adapter")

    def _make_step(self) -> tuple[float, float]:
        """One optimizer step. Returns the batch's loss (nats a learned token) and the gradient norm before clipping."""
        from substrate.stages import accumulate_gradients

        batch = self.stream[self.step]
        self.optimizer.zero_grad(set_to_none=True)
        local_loss = accumulate_gradients(
            self.model,
            batch.micro_batches,
            lambda micro_batch: self.recipe.outputs(self.model, micro_batch),
            lambda outputs, micro_batch: self.recipe.loss(outputs, micro_batch, batch.num_targets),
        )
        batch_loss = self.parallel.total(local_loss)
        self._check("loss", batch_loss, DIVERGED_FACTOR * math.log(self.model.architecture.vocab_size))
        self.parallel.finalize_gradients(self.model)
        grad_norm = self.parallel.clip_gradients(self.model, self.recipe.clip_norm)
        self._check("gradient norm", grad_norm, math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.step]
        self.optimizer.step()
        self.step += 1
        self.tokens += batch.num_tokens
        return batch_loss, grad_norm

    def _check(self, what: str, value: float, limit: float) -> None:
        """Raises Diverged, alike on every rank: parameters are still those before this step."""
        if not math.isfinite(value) or value > limit:
            kept = sorted(path.name for path in self.checkpoints.glob("step_*"))
            raise Diverged(
                f"the {what} of step {self.step + 1} is {value:.4g}; valid is a finite number up to {limit:.4g}. "
                f"The last checkpoint is {kept[-1] if kept else 'none'}; a lower learning rate or clip_norm may hold"
            )

    def _resume(self) -> bool:
        """Takes up the newest checkpoint, where there is one."""
        import torch

        from substrate import checkpoint
        from substrate.model.tensors import Checkpoint, fill

        found = checkpoint.newest(self.checkpoints, self._identity())
        if found is None:
            return False
        path, record = found
        with torch.no_grad(), Checkpoint(path) as saved:
            for place in self._placements():
                fill(place, saved)
            if self._random_name in saved.names:
                state = torch.get_rng_state()
                torch.set_rng_state(saved.read(self._random_name, tuple(state.shape), slice(None)))
        for tensor in self.trainable:
            self.optimizer.state[tensor]["step"].fill_(record["step"])
        self.step, self.tokens, self.seconds, self.rates = (
            record[name] for name in ("step", "tokens", "seconds", "rates")
        )
        return True

    def _save_checkpoint(self) -> None:
        from substrate import checkpoint

        numbers = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "rates": self.rates}
        record = {**numbers, "identity": self._identity(), "layout": self.task.parallelism}
        checkpoint.save(self.checkpoints, self._written_here(), record)

    def _written_here(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """What this rank writes of the state, by name, whole and on the host."""
        import torch

        from substrate.model.tensors import owned

        yield from owned(self._placements(), self.parallel.groups)
        if self.parallel.tp_rank == 0:
            yield self._random_name, torch.get_rng_state()

    def _placements(self) -> "Iterator[Placement]":
        """Of every trained tensor and of its two moments."""
        from substrate.model import trainable_placements

        for place in trainable_placements(self.model):
            yield place
            for moment in ("exp_avg", "exp_avg_sq"):
                yield place.of(self.optimizer.state[place.tensor][moment], f"{moment}/")

    @property
    def _random_name(self) -> str:
        """Of the generator's state (dropout): alike in a tensor-parallel group. Another layout draws anew."""
        return f"random/pp{self.parallel.pp_rank}/dp{self.parallel.dp_rank}"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.task.out / "checkpoints"

    def _identity(self) -> dict[str, Any]:
        task = self.task
        return {"model": task.model, "recipe": task.recipe, "seed": task.seed}


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that a kill may have cut short; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def _check_origin() -> None:
    """In a sandbox the package must be the image's: refuses one that was found elsewhere."""
    root, here = os.environ.get("SUBSTRATE_ROOT"), Path(__file__).resolve()
    if root and not here.is_relative_to(Path(root).resolve()):
        raise UsageError(f"substrate was imported from {here.parent}; valid is below SUBSTRATE_ROOT {root}")


def main() -> None:
    """Reads the command line and the task; starts the ranks, or is one."""
    parser = Parser(prog="substrate.train", description="Train one adapter as a task file says.")
    parser.add_argument("task", type=Path, nargs="?", default=Path("/task/task.json"), help="task file of kind train")
    path = parser.parse_args().task
    _check_origin()
    task = Task.read(path)
    load_recipe(task.recipe)  # a mistake in it is told before any rank starts and imports torch
    if task.num_ranks > 1 and "RANK" not in os.environ:
        from substrate.launch import run_ranks

        sys.exit(run_ranks("substrate.train", [str(path)], task.num_ranks))

    from substrate.parallel import start

    parallel = start(task.parallelism)
    try:
        task.out.mkdir(parents=True, exist_ok=True)
        Training(task, parallel).run()
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
    """What a rank's part of the base needs, beside what the device has."""
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
