"""Learning rates, step by step, from NeMo's own schedule classes.

The shape of the schedule is an axis of a recipe, named by a class of `nemo.core.optim.lr_scheduler` (nemo-toolkit
3.0.0). All of them are closed forms of the step, so a run needs a list of numbers and no scheduler object: the class is
driven once over a dummy optimizer, and that list is what trains, what stands in progress.jsonl and what a checkpoint
keeps.

Importing NeMo costs 3.3 s of a 9 s start on a quiet CPU (Lightning, torchmetrics, scipy and the compiler come along; loading the
submodule without its packages' `__init__` saved nothing). So one rank imports it and the others get its list; a resumed
run has its own in the checkpoint.
"""

import warnings

from substrate.interface.errors import UsageError

# The classes determined by what a recipe has: peak, warm-up, length and final rate. After the warm-up: half a cosine, a
# parabola, a square root and a straight line down to the final rate, and constant. The others want more (NoamAnnealing
# the model's width).
SHAPES = ("CosineAnnealing", "SquareAnnealing", "SquareRootAnnealing", "WarmupAnnealing", "WarmupHoldPolicy")


def learning_rates(
    shape: str, *, peak: float, num_steps: int, warmup_steps: int, min_lr_ratio: float, rank: int = 0
) -> list[float]:
    """The learning rate of each step 0 .. num_steps - 1: `peak` times NeMo's rates at peak 1. All ranks must call it.

    With NeMo's warm-up every shape starts at peak / (warmup_steps + 1), not at zero, and has the peak at step
    `warmup_steps`. Cosine afterwards: min + (peak - min) (1 + cos(pi (step - warmup) / (num_steps - warmup))) / 2,
    which is SGDR's (arXiv:1608.03983, eq. 5) for one period. Raises UsageError for a shape that is not in SHAPES.
    """
    # Before any import and by every rank: a wrong name must not leave the others waiting.
    if shape not in SHAPES:
        raise UsageError(f"schedule {shape!r}; valid are {', '.join(SHAPES)}")
    relative = _from_rank_0(shape, num_steps, warmup_steps, min_lr_ratio, rank)
    return [peak * rate for rate in relative]


def nemo_rates(shape: str, num_steps: int, warmup_steps: int, min_lr_ratio: float) -> list[float]:
    """Drives NeMo's class at peak 1 and returns its rate at each step."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies, about each other
        from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    arguments = {"warmup_steps": warmup_steps, "max_steps": num_steps, "min_lr": min_lr_ratio}
    scheduler = AVAILABLE_SCHEDULERS[shape](optimizer, **arguments)
    rates = []
    for _ in range(num_steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()  # torch warns of a scheduler that moves before its optimizer
        scheduler.step()
    return rates


def _from_rank_0(shape: str, num_steps: int, warmup_steps: int, min_lr_ratio: float, rank: int) -> list[float]:
    import torch.distributed as dist

    box = [nemo_rates(shape, num_steps, warmup_steps, min_lr_ratio) if rank == 0 else []]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]
