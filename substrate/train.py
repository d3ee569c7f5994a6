"""Trains one adapter as a task file says: `python -P -m substrate.train [/task/task.json]` (docs/contract.md, kind `train`).

    read the task -> join the ranks -> base model + adapter -> stream, learning rates, checkpoint -> steps -> adapter

What is trained and on what is the recipe's; the mathematics of layout is the model's; here is the loop that they share. It looks at the
stop file before every step. Started without RANK in the environment, it starts the ranks of this host itself and passes on their exit code.

Exit 0 done; 75 stopped with the state saved: start again; 65 the loss is not finite, or the data are wrong; 64 the task file is wrong.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from substrate.entry import Parser
from substrate.errors import DataError, Stopped, UsageError, exit_code_of

if TYPE_CHECKING:
    import torch

    from substrate.parallel import Parallel

STARTED = time.monotonic()
ADAM_BETAS, ADAM_EPS = (0.9, 0.95), 1e-8  # the betas of Nemotron-H's own training (arXiv:2504.03624)


@dataclass(frozen=True)
class Task:
    """A checked task file of kind `train`. Paths are those inside the sandbox."""

    model: dict[str, Any]
    recipe: dict[str, Any]
    parallelism: dict[str, Any]
    seed: int
    base: Path  # a .safetensors file, or a folder with one
    tokenizer: Path
    train_data: Path
    out: Path
    stop: Path

    @classmethod
    def read(cls, path: Path) -> "Task":
        """Reads and checks a task file. Raises UsageError: not there, not JSON, another schema or kind, a key missing or unknown."""
        try:
            task = json.loads(path.read_text(encoding="utf-8"))
            header, config, paths = (task.get("schema"), task.get("kind")), task["config"], task["paths"]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"task file {path}: {error!r}; an object with schema, kind, config and paths is needed") from None
        if header != (1, "train"):
            raise UsageError(f"task file {path} has schema and kind {header}; valid is (1, 'train')")
        for name, values, needed in (
            ("config", config, {"model", "recipe", "parallelism", "seed"}),
            ("paths", paths, {"base", "tokenizer", "train_data", "out", "stop"}),
        ):
            if not isinstance(values, dict) or set(values) != needed:
                raise UsageError(f"{name} of {path} has {', '.join(sorted(values))}; valid keys are {', '.join(sorted(needed))}")
        if type(config["seed"]) is not int:
            raise UsageError(f"config.seed of {path} is {config['seed']!r}; it is an integer")
        return cls(**config, **{name: Path(value) for name, value in paths.items()})


class Progress:
    """`/out/progress.jsonl`: a line a step, flushed, on rank 0. Tokens and seconds are sums since the first step, over all starts."""

    def __init__(self, path: Path, *, rank: int, done_steps: int) -> None:
        self._file = None
        if rank == 0:
            # Steps after the checkpoint will be made again; their lines of the run that was killed go.
            kept = [line for line in _lines(path) if json.loads(line).get("step", 0) <= done_steps] if done_steps else []
            path.write_text("".join(kept), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")

    def write(self, phase: str, **values: float) -> None:
        """Appends {"phase": phase, **values}."""
        if self._file:
            self._file.write(json.dumps({"phase": phase, **values}) + "\n")
            self._file.flush()


class Training:
    """One run: the model with its adapter, and all that changes from step to step."""

    def __init__(self, task: Task, parallel: "Parallel") -> None:
        import torch

        from substrate.model import ModelConfig, build_model, load_base
        from substrate.recipes import load_recipe
        from substrate.schedule import learning_rates_on_all_ranks

        self.task, self.parallel = task, parallel
        self.recipe = load_recipe(task.recipe)
        self.stream = self.recipe.stream(task.train_data, task.tokenizer, parallel, task.seed)
        torch.manual_seed(task.seed + parallel.dp_rank)  # dropout, if there is any: alike within a tensor-parallel group
        self.model = build_model(ModelConfig.from_dict(task.model), parallel)
        load_base(self.model, task.base)
        self.recipe.attach(self.model, task.seed)
        self.model.train()
        self.trainable = {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=self.recipe.weight_decay
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.rates: list[float] = []
        self._resume()
        if not self.rates:
            r = self.recipe
            self.rates = learning_rates_on_all_ranks(
                r.schedule,
                rank=parallel.rank,
                peak=r.learning_rate,
                num_steps=r.num_steps,
                warmup_steps=r.warmup_steps,
                min_lr_ratio=r.min_lr_ratio,
            )
        self.progress = Progress(task.out / "progress.jsonl", rank=parallel.rank, done_steps=self.step)

    def run(self) -> None:
        """Makes the steps that are left and saves the adapter. Raises Stopped, or DataError at a loss that is not finite."""
        self.progress.write("start", seconds=round(time.monotonic() - STARTED, 3))
        begun = time.monotonic() - self.seconds
        while self.step < self.recipe.num_steps:
            if self.parallel.agree(self.task.stop.exists()):
                self._checkpoint()
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
                self._checkpoint()
        self.recipe.save(self.model, self.task.out / "adapter")

    def _make_step(self) -> tuple[float, float]:
        """One optimizer step. Returns the batch's loss (nats a learned token) and the gradient's norm before clipping."""
        batch = self.stream[self.step]
        self.optimizer.zero_grad(set_to_none=True)
        local_loss = 0.0
        for micro_batch in batch.micro_batches:
            loss = self.recipe.loss(self.model, micro_batch, batch.num_targets)
            loss.backward()
            local_loss += loss.item()
        batch_loss = self.parallel.total(local_loss)
        if not math.isfinite(batch_loss):
            raise DataError(f"the loss of step {self.step + 1} is {batch_loss}; it must be finite. A lower learning rate may do")
        self.parallel.finalize_gradients(self.model)
        grad_norm = self.parallel.clip_gradients(self.model, self.recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.step]
        self.optimizer.step()
        self.step += 1
        self.tokens += batch.num_tokens
        return batch_loss, grad_norm

    def _resume(self) -> None:
        from substrate import checkpoint

        if not (self.task.out / "checkpoints").exists():
            return
        # AdamW makes its moments at its first step; the checkpoint fills tensors that are there.
        for tensor in self.trainable.values():
            self.optimizer.state[tensor] = _zero_moments(tensor)
        state = self._state()
        step = checkpoint.load(self.task.out / "checkpoints", state, self._identity(), rank=self.parallel.rank)
        if step is None:
            self.optimizer.state.clear()
            return
        import torch

        self.step, self.tokens, self.seconds, self.rates = step, state["tokens"], state["seconds"], state["rates"]
        torch.set_rng_state(state["rng"])

    def _checkpoint(self) -> None:
        from substrate import checkpoint

        folder = self.task.out / "checkpoints"
        checkpoint.save(folder, self.step, self._state(), self._identity(), rank=self.parallel.rank)

    def _state(self) -> dict[str, Any]:
        """This rank's tensors, which a checkpoint reads or fills in place, and the plain values beside them."""
        import torch

        return {
            "adapter": {name: tensor.detach() for name, tensor in self.trainable.items()},
            "moments": {name: self.optimizer.state.get(tensor, {}) for name, tensor in self.trainable.items()},
            "rng": torch.get_rng_state(),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "rates": self.rates,
        }

    def _identity(self) -> dict[str, Any]:
        task = self.task
        return {"model": task.model, "recipe": task.recipe, "parallelism": task.parallelism, "seed": task.seed}


def _zero_moments(tensor: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    import torch

    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that a kill may have cut short; none where there is no file."""
    return [line for line in path.open(encoding="utf-8") if line.endswith("\n")] if path.exists() else []


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
    num_ranks = int(task.parallelism.get("tp", 1)) * int(task.parallelism.get("dp", 1))
    if num_ranks > 1 and "RANK" not in os.environ:
        from substrate.launch import run_ranks

        sys.exit(run_ranks("substrate.train", [str(path)], num_ranks))

    from substrate.parallel import start

    parallel = start(task.parallelism)
    try:
        task.out.mkdir(parents=True, exist_ok=True)
        Training(task, parallel).run()
    finally:
        parallel.shutdown()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
