"""Learning rates, step by step, from NeMo's own schedule classes.

The shape of the schedule is an axis of a recipe, named by a class of `nemo.core.optim.lr_scheduler` (nemo-toolkit
3.0.0). All of them are closed forms of the step, so a run needs a list of numbers and no scheduler object: the class
is driven once over a dummy optimizer and the list is what trains, what is written to progress.jsonl and what a
checkpoint keeps.

Importing NeMo costs 2.3 s of a process here with warm caches and 4 to 6 s with cold ones (Lightning, torchmetrics,
scipy, transformers come along; loading the submodule without its packages' `__init__` saved nothing). So one rank
imports it and broadcasts the list, and a resumed run, which finds the list in its checkpoint, does not import it at
all.
"""

import warnings

from substrate.errors import UsageError

# The classes determined by what a recipe has: peak, warm-up, length and final rate. After the warm-up: half a cosine,
# a parabola, a square root and a straight line down to the final rate, and constant. The others want more
# (NoamAnnealing the model's width).
SHAPES = ("CosineAnnealing", "SquareAnnealing", "SquareRootAnnealing", "WarmupAnnealing", "WarmupHoldPolicy")


def learning_rates(shape: str, *, peak: float, num_steps: int, warmup_steps: int, min_lr_ratio: float) -> list[float]:
    """Returns the learning rate of each step 0 .. num_steps - 1.

    With NeMo's warm-up every shape starts at peak / (warmup_steps + 1), not at zero, and reaches the peak at step
    `warmup_steps`. Cosine afterwards: min + (peak - min) (1 + cos(pi (step - warmup) / (num_steps - warmup))) / 2,
    SGDR (arXiv:1608.03983), eq. 5. Raises UsageError for a shape that is not in SHAPES.
    """
    if shape not in SHAPES:
        raise UsageError(f"schedule {shape!r}; valid are {', '.join(SHAPES)}")
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies, about each other
        from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=peak)
    arguments = {"warmup_steps": warmup_steps, "max_steps": num_steps, "min_lr": peak * min_lr_ratio}
    scheduler = AVAILABLE_SCHEDULERS[shape](optimizer, **arguments)
    rates = []
    for _ in range(num_steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()  # torch warns of a scheduler that moves before its optimizer
        scheduler.step()
    return rates


def learning_rates_on_all_ranks(shape: str, *, rank: int, **arguments: float) -> list[float]:
    """`learning_rates`, computed on rank 0 and broadcast: one import of NeMo a run. All ranks must call it."""
    import torch.distributed as dist

    # The shape is checked before the import, and by every rank: a wrong name must not leave the others waiting.
    if shape not in SHAPES:
        raise UsageError(f"schedule {shape!r}; valid are {', '.join(SHAPES)}")
    box = [learning_rates(shape, **arguments) if rank == 0 else None]  # type: ignore[arg-type]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]
