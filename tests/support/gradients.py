"""Compare a function and its gradients with a plain form in float64."""

import torch


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def compare(ours, plain, arguments: list[torch.Tensor], num_outputs: int = 1, close: float = 2e-6) -> None:
    """Values and all gradients, for random gradients of the outputs; ours computes in float32."""
    found = []
    for function, kind in ((ours, torch.float32), (plain, torch.float64)):
        leaves = [argument.to(kind).requires_grad_() for argument in arguments]
        outputs = function(*leaves)
        outputs = outputs[:num_outputs] if isinstance(outputs, tuple) else (outputs,)
        total = sum((output * drawn(*output.shape, seed=9).to(output)).sum() for output in outputs)
        found.append([*outputs, *torch.autograd.grad(total, leaves)])
    for mine, expected in zip(*found, strict=True):
        scale = float(expected.detach().abs().max()) + 1e-9
        torch.testing.assert_close(mine.double() / scale, expected / scale, rtol=0, atol=close)
