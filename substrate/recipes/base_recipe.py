"""What all training methods share: the checked keys of hydra_conf/recipe/*.yaml, and the steps of a run that they decide.

A method is a subclass in a file of its own. It overrides what is particular to it, such as the batch or the loss of a
step, and declares its own numbers as a dataclass `Options`.

By default a LoRA is trained (Hu et al., arXiv:2106.09685): y = W x + (alpha / rank) B A x, with A random and B zero at the
start, so that step 0 is the base model. The router has no adapter in any method: it stays as pretrained.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from substrate.data.rows import CURRICULA, WEIGHTINGS, Example, Plan, Prepared, prepare, read_examples
from substrate.interface.errors import DataError, UsageError
from substrate.interface.fields import read_fields
from substrate.training.optimizer import OPTIMIZERS
from substrate.training.recipe import Recipe
from substrate.training.schedule import SHAPES
from substrate.training.selection import CHOICES

if TYPE_CHECKING:
    import torch

    from substrate.data.batches import Batch, MicroBatch
    from substrate.data.tokenizer import Tokenizer
    from substrate.model import HybridModel
    from substrate.training.run import Training

TRACE_STYLES = ("stepwise", "short")


@dataclass(frozen=True)
class Lora:
    """The keys of `recipe.lora`: which modules get a pair of factors A and B, and their size."""

    rank: int  # r, columns of B and rows of A
    alpha: int  # the pair's output is scaled by alpha / rank
    dropout: float  # share of the pair's inputs set to zero in training
    targets: list[str]  # modules that get a pair, by their published names: substrate.model.lora.TARGETS

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "from 0 to below 1")
        require(bool(self.targets), "lora.targets", self.targets, "at least one module")


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


@dataclass(frozen=True)
class BaseRecipe(Recipe):
    """A recipe that trains a LoRA on the training file; subclasses add the loss. Raises UsageError for a wrong key."""

    method: str  # a key of substrate.recipes.METHODS
    sequence_length: int  # most tokens of an example; longer ones are left out and listed in the data card
    trace_style: str  # style of the reasoning that is learned, one of TRACE_STYLES
    epochs: float  # passes through the chosen examples; 0: use as many different ones as the file has
    curriculum: str  # order of a family's examples, one of substrate.data.rows.CURRICULA
    real_share: float  # share of real rows among the examples; above 0 the image needs tasks.train_csv
    holdout_per_family: int  # examples of each family that are not trained on
    lora: Lora
    mix: dict[str, float] = field(hash=False)  # share of each family in the stream; a family without one is left out
    options: dict[str, float] = field(hash=False)  # the method's own numbers
    slice_share: float  # of the generated places of a family with a slice, those that are filled from the slice alone

    OPTIONS: ClassVar[type] = NoOptions

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "micro_batch_tokens", "sequence_length", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("learning_rate", "clip_norm"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("weight_decay", "epochs", "holdout_per_family"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name, valid in (
            ("schedule", SHAPES),
            ("optimizer", OPTIMIZERS),
            ("trace_style", TRACE_STYLES),
            ("loss_weighting", WEIGHTINGS),
            ("curriculum", CURRICULA),
        ):
            require(getattr(self, name) in valid, name, getattr(self, name), f"one of {', '.join(valid)}")
        require(0 <= self.warmup_steps < self.num_steps, "warmup_steps", self.warmup_steps, "0 to num_steps - 1")
        for name in ("min_lr_ratio", "real_share", "slice_share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        shares = self.mix.values()
        require(min(shares, default=-1) >= 0 and sum(shares) > 0, "mix", self.mix, "shares >= 0, one of them > 0")
        chosen = self.selection
        require(chosen.choice in CHOICES, "selection.choice", chosen.choice, f"one of {', '.join(CHOICES)}")
        require(chosen.last_k >= 1, "selection.last_k", chosen.last_k, "at least 1")
        weights = chosen.family_weights
        require(set(weights) <= set(self.mix), "selection.family_weights", weights, f"families of the mix {self.mix}")
        require(
            min(weights.values(), default=1.0) >= 0 and (not weights or sum(weights.values()) > 0),
            "selection.family_weights",
            weights,
            "weights >= 0, one of them > 0; an empty mapping weighs all equally",
        )
        counted = [family for family, share in self.mix.items() if share > 0 and (not weights or weights.get(family))]
        require(bool(counted), "selection.family_weights", weights, "a weight > 0 of a family with a share")
        if chosen.choice == "best":
            require(self.holdout_per_family >= 1, "holdout_per_family", self.holdout_per_family, "above 0 for `best`")
        _ = self.own  # raises for a wrong option

    @cached_property
    def own(self) -> Any:
        """The method's own numbers as its `OPTIONS` dataclass."""
        return read_fields(self.OPTIONS, self.options, "recipe.options")

    def check_layout(self, pp: int, dp: int) -> None:
        """Raises UsageError if this recipe cannot run on `pp` stages and `dp` data-parallel ranks."""
        if self.selection.choice == "best" and (pp > 1 or self.holdout_per_family % dp):
            raise UsageError(
                f"recipe.selection.choice is best with pp={pp}, dp={dp}, holdout_per_family={self.holdout_per_family}; "
                "it needs pp=1 and a holdout_per_family that dp divides"
            )

    def prepare(self, train_data: Path, encoder: "Tokenizer", seed: int) -> Prepared:
        """Chooses the rows of the run from the training file."""
        plan = Plan(
            mix=self.mix,
            real_share=self.real_share,
            epochs=self.epochs,
            curriculum=self.curriculum,
            holdout_per_family=self.holdout_per_family,
            sequence_length=self.sequence_length,
            num_places=self.num_steps * self.batch_size,
            seed=seed,
            slice_share=self.slice_share,
        )
        return prepare(read_examples(train_data), lambda example: self._encode(example, encoder), plan)

    def check_solutions(self, train_data: Path, encoder: "Tokenizer") -> None:
        """Raises DataError if the method cannot learn from the solutions of the training file; by default it can."""

    def attach(self, model: "torch.nn.Module", seed: int) -> None:
        """Freezes the model and adds a LoRA pair to each target module."""
        from substrate.model import add_lora

        add_lora(model, self.lora.rank, self.lora.alpha, self.lora.dropout, self.lora.targets, seed)

    def batch(self, run: "Training") -> "Batch":
        """Returns the batch of the next step, cut to this data-parallel rank's part."""
        return run.stream[run.step]

    def rate_scale(self, step: int) -> float:
        """Returns the factor on the schedule's learning rate at a step, counted from 0."""
        return 1.0

    def outputs(self, model: "HybridModel", batch: "MicroBatch", temperature: float = 1.0) -> "torch.Tensor":
        """Returns log-probabilities of the learned labels, (1, L) in nats, 0 elsewhere; hidden states unless this is the last stage."""
        from substrate.model import token_log_probs

        learned_1L = batch.weights_1L != 0
        return token_log_probs(model, batch.tokens_1L, batch.labels_1L, batch.lengths, temperature, learned_1L)

    def teaches(self, batch: "Batch") -> bool:
        """Whether the loss of this batch has a gradient at all: a cross-entropy always has."""
        return True

    def save(self, run: "Training", folder: Path) -> None:
        """Writes the adapter (docs/contract.md). All ranks call it."""
        from substrate.model import save_adapter

        save_adapter(run.model, folder)

    def _encode(self, example: Example, encoder: "Tokenizer") -> tuple[list[int], list[int]]:
        try:
            trace = example.traces[self.trace_style]
            return encoder.encode_prompt(example.prompt), encoder.encode_answer(trace, example.answer)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{example.item_id} cannot be encoded: {error!r}; a trace {self.trace_style} without tags is needed"
            ) from None


def require(holds: bool, key: str, value: object, valid: str) -> None:
    """Raises UsageError that names the key unless `holds`. `valid` completes the sentence "valid is ..."."""
    if not holds:
        raise UsageError(f"recipe.{key} is {value!r}; valid is {valid}")
