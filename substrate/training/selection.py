"""Chooses which state of a run becomes its adapter: the last, the best on a holdout, or the average of the last few.

    last      the state after the last step
    best      of the states at every checkpoint, the one with the lowest holdout loss: the mean cross-entropy of learned
              tokens, averaged over families with `family_weights` if there are any
    average   the mean of the states at the last `last_k` checkpoints (stochastic weight averaging, arXiv:1803.05407)

The state chosen so far is one more copy of the trainable tensors. Checkpoints keep it, so a resumed run has it too.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


CHOICES = ("last", "best", "average")


@dataclass(frozen=True)
class Selection:
    """The keys of `recipe.selection`."""

    choice: str  # one of CHOICES
    last_k: int  # number of checkpoints that `average` uses
    family_weights: dict[str, float] = field(hash=False)  # weights of the holdout losses; empty: all families equally


@dataclass
class Selector:
    """Is offered the state at every candidate step; `chosen` holds the tensors of the choice so far."""

    how: Selection
    steps: "Sequence[int]"  # candidate steps, including the last step
    trainable: "Sequence[Tensor]"
    chosen: "list[Tensor]" = field(default_factory=list)
    at_steps: list[int] = field(default_factory=list)  # steps of the states that make up the choice
    loss: float = float("inf")  # lowest holdout loss so far

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` steps is a candidate."""
        steps = self.steps[-self.how.last_k :] if self.how.choice == "average" else self.steps
        return self.how.choice != "last" and step in steps

    @property
    def needs_holdout(self) -> bool:
        return self.how.choice == "best"

    def offer(self, step: int, holdout: dict[str, float]) -> float:
        """Considers the current state with its holdout loss by family, and returns the weighted loss."""
        weights = self.how.family_weights or dict.fromkeys(holdout, 1.0)
        total = sum(weights.get(family, 0.0) for family in holdout)
        loss = sum(weights.get(family, 0.0) * value for family, value in holdout.items()) / total if total else 0.0
        if self.how.choice == "average":
            self.at_steps.append(step)
            self._move(1 / len(self.at_steps))
        elif loss < self.loss:
            self.loss, self.at_steps = loss, [step]
            self._move(1.0)
        return loss

    def _move(self, share: float) -> None:
        """Moves the choice towards the current state by `share`; 1 copies the state."""
        if not self.chosen:
            self.chosen = [tensor.detach().clone() for tensor in self.trainable]
        for chosen, tensor in zip(self.chosen, self.trainable, strict=True):
            chosen.lerp_(tensor.detach(), share)

    def apply(self) -> None:
        """Replaces the last state with the choice."""
        if self.chosen:
            for tensor, chosen in zip(self.trainable, self.chosen, strict=True):
                tensor.detach().copy_(chosen)

    def record(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps beside the tensors."""
        return {"at_steps": self.at_steps, "loss": None if self.loss == float("inf") else self.loss}

    def restore(self, record: dict[str, Any]) -> None:
        """Takes over a checkpoint's record and allocates the tensors, which the caller fills."""
        self.at_steps = list(record["at_steps"])
        self.loss = float("inf") if record["loss"] is None else record["loss"]
        if self.at_steps:
            self.chosen = [tensor.detach().clone() for tensor in self.trainable]
