"""The training loop: a model with its adapter, and everything that changes from step to step.

    rows of the training file -> batch of a step -> gradients -> optimizer -> checkpoint, candidate -> the next step

The recipe decides what is trained, on which rows and with which loss. The loop checks the stop file before every step.
A run that resumes from a checkpoint goes on from exactly the state that was saved. On a CPU it makes the same adapter, to
the last bit, as one that was never stopped (docs/exactness.md).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from substrate.data.batches import Batch, Shape, Stream, by_row, make_batch
from substrate.data.rows import Row
from substrate.data.tokenizer import Tokenizer
from substrate.interface.command_line import write_json
from substrate.interface.errors import Diverged, Stopped, UsageError
from substrate.interface.progress import Progress
from substrate.interface.task import Task
from substrate.model import ModelConfig, build_model, learning_targets, load_base, trainable_placements
from substrate.model.tensors import Checkpoint, fill, owned
from substrate.ops import kernels
from substrate.training import checkpoint
from substrate.training.optimizer import allocate, make_optimizer, moments
from substrate.training.pipeline_stages import accumulate_gradients
from substrate.training.recipe import Recipe
from substrate.training.schedule import learning_rates
from substrate.training.selection import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from substrate.distributed.groups import Parallel
    from substrate.model.layout import Placement
    from substrate.training.rollouts import Sampler, Sampling


STARTED = time.monotonic()
# A loss above this multiple of uniform guessing's, log(vocabulary), does not recover.
DIVERGED_FACTOR = 3.0
SELECTED = "selected"
Result = TypeVar("Result")


class Training:
    """A training run, built by all ranks together. Its public attributes and methods are for recipes."""

    def __init__(self, task: Task, recipe: Recipe, parallel: "Parallel") -> None:
        self.task, self.recipe, self.parallel = task, recipe, parallel
        if parallel.rank == 0:
            kernels.tell(parallel.device)
        recipe.check_layout(parallel.pp, parallel.dp)
        self.tokenizer = Tokenizer.from_file(task.tokenizer)
        prepared = recipe.prepare(task.train_data, self.tokenizer, task.seed)
        if parallel.rank == 0:
            write_json(task.out / "data_card.json", prepared.card)
        self.rows, self._holdout = prepared.rows, prepared.holdout
        self.shape = Shape(recipe.micro_batch_tokens, parallel.tp, parallel.dp_rank, parallel.dp)
        self.stream = self.stream_of(self.rows)
        self.sampled: Stream | None = None  # batches of the model's own completions, set by the recipe rft
        torch.manual_seed(task.seed + parallel.dp_rank)  # for dropout: tensor-parallel ranks must agree (model/lora.py)
        recompute = str(task.parallelism.get("recompute", "none"))
        self.model = build_model(ModelConfig.from_dict(task.model), parallel, recompute=recompute)
        load_base(self.model, task.base)
        recipe.attach(self.model, task.seed)
        self.model.train()
        self.trainable = [tensor for tensor in self.model.parameters() if tensor.requires_grad]
        self.optimizer = make_optimizer(recipe.optimizer, self.trainable, recipe.weight_decay)
        every, last = recipe.checkpoint_every, recipe.num_steps
        self._selector = Selector(recipe.selection, sorted({*range(every, last, every), last}), self.trainable)
        self.copies: dict[str, list[Tensor]] = {}  # of the trainable tensors, by name, kept in checkpoints (`copy`)
        self.kept: dict[str, Any] = {}  # a recipe's own state in checkpoints, as JSON, equal on all ranks
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self._saver = checkpoint.Saver.from_environment(recipe.checkpoint_every)
        self.rates = [0.0] * recipe.num_steps
        if not self._resume():
            rates = learning_rates(
                recipe.schedule,
                peak=recipe.learning_rate,
                num_steps=recipe.num_steps,
                warmup_steps=recipe.warmup_steps,
                min_lr_ratio=recipe.min_lr_ratio,
                rank=parallel.rank,
            )
            self.rates = [rate * recipe.rate_scale(step) for step, rate in enumerate(rates)]
        self._targets_learn = self.step > 0  # known from the first step that teaches anything
        self.progress = Progress(task.out / "progress.jsonl", rank=parallel.rank, done_steps=self.step)

    def run(self) -> None:
        """Makes the remaining steps and saves the adapter. Raises Stopped or Diverged."""
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
            if self._selector.is_due(self.step):
                self._offer_candidate()
            if self.step < self.recipe.num_steps and self._saver.is_due(self.step, self.parallel.agree):
                self._save_checkpoint()
        self._selector.apply()
        self.recipe.save(self, self.task.out / "adapter")

    def stream_of(self, rows: Sequence[Row]) -> Stream:
        """Returns batches of these rows, of the run's shape."""
        return Stream(rows, self.recipe.batch_size, self.shape, self.recipe.loss_weighting)

    def sampler(self, how: "Sampling") -> "Sampler":
        """Returns the decoding engine on the model in training."""
        from substrate.training.rollouts import Sampler

        return Sampler(self.model, self.parallel, self.tokenizer, how, self.progress)

    def copy(self, name: str) -> None:
        """Stores a copy of the trainable tensors as they are now; checkpoints keep it."""
        self.copies[name] = [tensor.detach().clone() for tensor in self.trainable]

    def with_copy(self, name: str, act: Callable[[], Result]) -> Result:
        """Calls `act` while the copy replaces the trainable tensors, and returns its result."""
        now = [tensor.detach().clone() for tensor in self.trainable]
        self._put(self.copies[name])
        try:
            return act()
        finally:
            self._put(now)

    def log_probs(self, rows: Sequence[Row], temperature: float = 1.0) -> dict[str, list[float]]:
        """Returns item id -> log-probability of each learned token, in nats, on every rank.

        Data-parallel ranks score a part each, so their number must divide the rows'.
        """
        found: dict[str, list[float]] = {}
        self.model.eval()
        for micro_batch in make_batch(rows, self.shape).micro_batches:
            with torch.no_grad():
                outputs_1L = self.recipe.outputs(self.model, micro_batch, temperature)
            for row, values in zip(micro_batch.rows, by_row(micro_batch, outputs_1L), strict=True):
                found[row.item_id] = values[-len(row.learned) :].tolist()
        self.model.train()
        return self.parallel.gather(found)

    def _put(self, values: Sequence["Tensor"]) -> None:
        for tensor, value in zip(self.trainable, values, strict=True):
            tensor.detach().copy_(value)

    def _make_step(self) -> tuple[float, float]:
        """Makes one optimizer step. Returns the batch's loss (nats a learned token) and the gradient norm before clipping."""
        batch: Batch = self.recipe.batch(self)
        self.optimizer.zero_grad(set_to_none=True)
        local_loss = accumulate_gradients(
            self.model,
            batch.micro_batches,
            lambda micro_batch: self.recipe.outputs(self.model, micro_batch),
            self.recipe.loss,
        )
        batch_loss = self.parallel.total(local_loss)
        self._check("loss", batch_loss, DIVERGED_FACTOR * math.log(self.model.architecture.vocab_size))
        self.parallel.finalize_gradients(self.model)
        self._targets_learn = self._targets_learn or self._check_targets(batch)
        grad_norm = self.parallel.clip_gradients(self.model, self.recipe.clip_norm)
        self._check("gradient norm", grad_norm, math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.step]
        self.optimizer.step()
        for tensor in (
            self.trainable
        ):  # casts of it are made again (model/lora.py), also after an optimizer that writes to `.data`
            torch.autograd.graph.increment_version(tensor)
        self.step += 1
        self.tokens += batch.num_tokens
        return batch_loss, grad_norm

    def _check(self, what: str, value: float, limit: float) -> None:
        """Raises Diverged on every rank unless `value` is finite and at most `limit`. This step has changed no parameter."""
        if not math.isfinite(value) or value > limit:
            kept = sorted(path.name for path in self.checkpoints.glob("step_*"))
            raise Diverged(
                f"the {what} of step {self.step + 1} is {value:.4g}; valid is a finite number up to {limit:.4g}. "
                f"The last checkpoint is {kept[-1] if kept else 'none'}; try a lower learning rate or clip_norm"
            )

    def _check_targets(self, batch: Batch) -> bool:
        """Returns whether each target has a gradient, over all layers and ranks; False if the batch cannot tell.

        Raises UsageError on every rank, before anything has changed, for targets that no gradient reaches.
        """
        learns = self.parallel.any_rank(learning_targets(self.model))
        silent = sorted(target for target, has_gradient in learns.items() if not has_gradient)
        if silent and len(silent) == len(learns) and not self.parallel.agree(self.recipe.teaches(batch)):
            return False
        if silent:
            raise UsageError(
                f"no gradient reaches the LoRA target {', '.join(silent)} in step {self.step + 1}, in any layer, so it would "
                "never be trained; a kernel that computes with the weight alone bypasses its adapter: leave it out of "
                "recipe.lora.targets, or use a kernel that calls the layer (substrate/ops/kernels.py)"
            )
        return True

    def _offer_candidate(self) -> None:
        """Offers the current state to the selector, with its holdout losses if the choice depends on them."""
        losses = {}
        if self._selector.needs_holdout:
            losses = {family: self._holdout_loss(rows) for family, rows in self._holdout.items()}
        loss = self._selector.offer(self.step, losses)
        chosen = self._selector.at_steps
        self.progress.write("candidate", step=self.step, holdout_loss=loss, by_family=losses, chosen_steps=chosen)

    def _holdout_loss(self, rows: Sequence[Row]) -> float:
        """Returns the mean cross-entropy of the rows' learned tokens, in nats."""
        total = 0.0
        self.model.eval()
        for micro_batch in make_batch(rows, self.shape).micro_batches:
            with torch.no_grad():
                outputs_1L = self.recipe.outputs(self.model, micro_batch)
            total -= float((outputs_1L * micro_batch.weights_1L.to(outputs_1L)).sum())
        self.model.train()
        return self.parallel.total(total)

    def _resume(self) -> bool:
        """Loads the newest checkpoint. Returns whether there is one."""
        found = checkpoint.newest(self.checkpoints, self._identity())
        if found is None:
            return False
        path, record = found
        for name in record["copies"]:
            self.copy(name)
        self.kept = record["recipe"]
        self._selector.restore(record["selection"])
        if record["step"]:
            allocate(self.optimizer, record["step"])
        with torch.no_grad(), Checkpoint(path) as saved:
            for place in self._placements():
                fill(place, saved)
            # Tensor-parallel ranks have equal states, so a rank that the saved layout lacked takes the first one's. Stages
            # and data-parallel ranks that it lacked draw anew, all ranks of a tensor-parallel group alike.
            for name in (self._random_name(self.parallel.tp_rank), self._random_name(0)):
                if name in saved.names:
                    torch.set_rng_state(saved.read(name, tuple(torch.get_rng_state().shape), slice(None)))
                    break
        self.step, self.tokens, self.seconds, self.rates = (
            record[name] for name in ("step", "tokens", "seconds", "rates")
        )
        self._saver.saved_step = self.step
        return True

    def _save_checkpoint(self) -> None:
        numbers = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "rates": self.rates}
        kept = {"copies": list(self.copies), "recipe": self.kept, "selection": self._selector.record()}
        record = {**numbers, **kept, "identity": self._identity(), "layout": self.task.parallelism}
        self._saver.save(self.checkpoints, self._written_here(), record)

    def _written_here(self) -> "Iterator[tuple[str, Tensor]]":
        """Yields the tensors of the state that this rank writes, by name, whole and on the host."""
        yield from owned(self._placements(), self.parallel.groups)
        yield self._random_name(self.parallel.tp_rank), torch.get_rng_state()

    def _placements(self) -> "Iterator[Placement]":
        """Yields the placement of every trained tensor, of its moments and of its copies."""
        copies = {**self.copies, **({SELECTED: self._selector.chosen} if self._selector.chosen else {})}
        number_of = {id(tensor): number for number, tensor in enumerate(self.trainable)}
        for place in trainable_placements(self.model):
            yield place
            for name, moment in moments(self.optimizer, place.tensor).items():
                yield place.of(moment, f"{name}/")
            for name, tensors in copies.items():
                yield place.of(tensors[number_of[id(place.tensor)]], f"{name}/")

    def _random_name(self, tp_rank: int) -> str:
        """Name of a rank's state of the host's generator, from which the seeds of dropout masks are drawn, on a GPU too."""
        return f"random/pp{self.parallel.pp_rank}/dp{self.parallel.dp_rank}/tp{tp_rank}"

    @property
    def checkpoints(self) -> Path:
        return self.task.out / "checkpoints"

    def _identity(self) -> dict[str, Any]:
        task = self.task
        return {"model": task.model, "recipe": task.recipe, "seed": task.seed}
