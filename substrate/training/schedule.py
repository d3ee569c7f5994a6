"""Learning rates of all steps, computed by NeMo's own schedule classes.

The shape of the schedule is a key of the recipe, named by a class of `nemo.core.optim.lr_scheduler` (nemo-toolkit
3.0.0). Every shape is a closed form of the step, so a run needs a list of numbers and no scheduler object. The class is
run once over a dummy optimizer; its list is what trains, what progress.jsonl shows and what a checkpoint keeps.

Importing NeMo costs 1 s on a quiet CPU (Lightning, torchmetrics and the compiler come along; loading the submodule without
its packages' `__init__` saved nothing), and 2.6 s together with what torchmetrics imports where it is installed. So only
rank 0 imports it, through `importing_nemo`, and sends the list to the others; a resumed run reads the list from its checkpoint.
"""

import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from substrate.interface.errors import UsageError

# The classes that peak, warm-up, length and final rate determine. After the warm-up they fall to the final rate as half a
# cosine, a parabola, a square root or a straight line, or stay constant. Other classes need more, such as the model's width.
SHAPES = ("CosineAnnealing", "SquareAnnealing", "SquareRootAnnealing", "WarmupAnnealing", "WarmupHoldPolicy")
UNNEEDED = ("scipy", "transformers")  # by NeMo's schedules and optimizers


def learning_rates(
    shape: str, *, peak: float, num_steps: int, warmup_steps: int, min_lr_ratio: float, rank: int = 0
) -> list[float]:
    """Returns the learning rate of each step 0 .. num_steps - 1. All ranks must call it together.

    With NeMo's warm-up every shape starts at peak / (warmup_steps + 1), not at zero, and reaches the peak at step
    `warmup_steps`. Cosine afterwards: min + (peak - min) (1 + cos(pi (step - warmup) / (num_steps - warmup))) / 2,
    which is SGDR's (arXiv:1608.03983, eq. 5) for one period. Raises UsageError for a shape that is not in SHAPES.
    """
    # Every rank checks before it imports, so that a wrong name leaves no rank waiting for rank 0.
    if shape not in SHAPES:
        raise UsageError(f"schedule is {shape!r}; valid are {', '.join(SHAPES)}")
    relative = _from_rank_0(shape, num_steps, warmup_steps, min_lr_ratio, rank)
    return [peak * rate for rate in relative]


def nemo_rates(shape: str, num_steps: int, warmup_steps: int, min_lr_ratio: float) -> list[float]:
    """Runs NeMo's class at peak 1 and returns its rate at each step."""
    import torch

    with importing_nemo():
        from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    arguments = {"warmup_steps": warmup_steps, "max_steps": num_steps, "min_lr": min_lr_ratio}
    scheduler = AVAILABLE_SCHEDULERS[shape](optimizer, **arguments)
    rates = []
    for _ in range(num_steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()  # torch warns if a scheduler steps before its optimizer
        scheduler.step()
    return rates


@contextmanager
def importing_nemo() -> Iterator[None]:
    """In its body NeMo is imported without warnings, and as on a machine that has none of UNNEEDED.

    torchmetrics, which comes along with Lightning, imports these where it finds them: scipy to mend one of its names, transformers for
    metrics of texts. Both can be imported again afterwards. A package that was imported before stays.
    """
    hidden = [name for name in UNNEEDED if name not in sys.modules]
    version = importlib.metadata.version

    def version_of_others(distribution_name: str) -> str:
        if distribution_name in hidden:
            raise importlib.metadata.PackageNotFoundError(distribution_name)
        return version(distribution_name)

    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # which tells importers that there is no such module
    importlib.metadata.version = version_of_others
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NeMo's dependencies warn about one another
            yield
    finally:
        importlib.metadata.version = version
        for name in hidden:
            del sys.modules[name]


def _from_rank_0(shape: str, num_steps: int, warmup_steps: int, min_lr_ratio: float, rank: int) -> list[float]:
    import torch.distributed as dist

    box = [nemo_rates(shape, num_steps, warmup_steps, min_lr_ratio) if rank == 0 else []]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]
