"""Optimizers by the names under which NeMo registers them, and the moments that a checkpoint keeps of them.

    adamw  adam  adamax  adan  adagrad  rmsprop  sgd

A name is a key of `nemo.core.optim.optimizers.AVAILABLE_OPTIMIZERS` (nemo-toolkit 3.0.0). Of NeMo's others, adafactor and
novograd compute with norms or factors of a whole matrix, of which a rank may hold a part only; rprop needs the gradient of
all data; adadelta sets its own rate; the fused ones need Apex.

What NeMo registers under most of these names is torch's own class. It is taken from torch, because importing NeMo costs
1 s in every rank; only adan is NeMo's own and is imported from there. A moment is a tensor of the parameter's shape that
an optimizer keeps between steps. It is cut among ranks as its parameter is, so a checkpoint can hold it whole.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from substrate.training.schedule import importing_nemo

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

# Options beside rate and weight decay. The betas are those of Nemotron-H's own training (arXiv:2504.03624); adan's are its
# authors' (arXiv:2208.06677).
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95)},
    "adam": {"betas": (0.9, 0.95)},
    "adamax": {"betas": (0.9, 0.95)},
    "adan": {},
    "adagrad": {},
    "rmsprop": {"alpha": 0.95},
    "sgd": {"momentum": 0.9},
}
# Names of torch's classes that NeMo registers.
FROM_TORCH = {
    "adamw": "AdamW",
    "adam": "Adam",
    "adamax": "Adamax",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "sgd": "SGD",
}


def make_optimizer(name: str, tensors: "Sequence[Tensor]", weight_decay: float) -> "Optimizer":
    """Returns the optimizer at rate 0. weight_decay: in adamw and adan of the weights themselves, else added to gradients."""
    import torch

    kind = getattr(torch.optim, FROM_TORCH[name]) if name in FROM_TORCH else _from_nemo(name)
    optimizer: Optimizer = kind(tensors, lr=0.0, weight_decay=weight_decay, **OPTIMIZERS[name])
    return optimizer


def moments(optimizer: "Optimizer", tensor: "Tensor") -> "dict[str, Tensor]":
    """Returns the tensor's moments by their names; none before the first step."""
    state = optimizer.state.get(tensor, {})
    return {name: state[name] for name in sorted(state) if name != "step"}


def allocate(optimizer: "Optimizer", step: int) -> None:
    """Makes the moments of an optimizer that has made `step` steps; the caller fills them.

    The optimizer makes them itself, in a step at rate 0 with gradients of 0.
    """
    import torch

    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for tensor in tensors:
        if "step" in optimizer.state[tensor]:
            optimizer.state[tensor]["step"].fill_(step)
    for group in optimizer.param_groups:
        if "step" in group:  # adan counts here
            group["step"] = step


def _from_nemo(name: str) -> Any:
    with importing_nemo():
        from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    return AVAILABLE_OPTIMIZERS[name]
