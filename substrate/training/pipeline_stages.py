"""Gradients of one optimizer step over the stages of a pipeline, in the one-forward-one-backward schedule (1F1B).

    stage 0   F0 F1 F2 F3 .. B0 F4 B1 F5 B2 ...
    stage 1   .. F0 F1 F2 .. B0 F3 B1 ...
    last      .. .. F0 B0 F1 B1 F2 B2 ...

A stage first runs as many forward passes as there are stages after it, then one backward pass for each forward pass. So
it holds the activations of at most that many micro-batches plus one, however many there are. This is PipeDream-flush as
in Megatron-LM (arXiv:2104.04473, section 2.2); megatron-core's own schedules need CUDA. With a single stage it is the
plain loop over micro-batches.

Hidden states between stages are (S, B, U), S this rank's part of the sequence under sequence parallelism. Every stage
knows the batch and so the shape; only hidden states and their gradients are sent.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

    from substrate.model import HybridModel


def accumulate_gradients(
    model: "HybridModel",
    micro_batches: Sequence[Any],
    run: Callable[[Any], "Tensor"],
    loss_of: Callable[["Tensor", Any], "Tensor"],
) -> float:
    """Runs all micro-batches forward and backward and adds to `.grad`. All ranks of a pipeline call it together.

    run         micro-batch -> the output of the last stage; hidden states on the others
    loss_of     (output of the last stage, micro-batch) -> 0-d loss, already divided by the size of the whole batch
    Returns the summed loss on the last stage, 0.0 on the others.
    """
    group = model.pg_collection.pp
    link = _Link(model, group)
    num_ahead = min(group.size() - 1 - group.rank(), len(micro_batches))
    in_flight: deque[tuple[Tensor | None, Tensor]] = deque()
    total = 0.0

    def forward(index: int, hidden: "Tensor | None") -> "Tensor":
        nonlocal total
        model.set_input_tensor(hidden)
        output = run(micro_batches[index])
        if link.is_last:
            output = loss_of(output, micro_batches[index])
            total += output.item()
        in_flight.append((hidden, output))
        return output.detach()

    def backward(gradient: "Tensor | None") -> "Tensor | None":
        hidden, output = in_flight.popleft()
        if output.requires_grad:  # else no trained tensor had a part in it, which the loop finds out and says
            torch.autograd.backward(output, gradient)
        return None if hidden is None else hidden.grad

    for index in range(num_ahead):
        link.exchange(to_next=forward(index, link.hidden_from_previous(micro_batches[index])))
    hidden = link.hidden_from_previous(micro_batches[num_ahead]) if num_ahead < len(micro_batches) else None
    for index in range(num_ahead, len(micro_batches)):
        output = forward(index, hidden)
        gradient = link.empty_like(in_flight[0][1])
        link.exchange(to_next=output, from_next=gradient)
        following = micro_batches[index + 1] if index + 1 < len(micro_batches) else None
        hidden = link.empty_hidden(following)
        link.exchange(to_previous=backward(gradient), from_previous=hidden)
    for _ in range(num_ahead):
        gradient = link.empty_like(in_flight[0][1])
        link.exchange(from_next=gradient)
        link.exchange(to_previous=backward(gradient))
    return total


class _Link:
    """Sends to and receives from the neighbouring stages, both in one batch, because NCCL would deadlock otherwise."""

    def __init__(self, model: "HybridModel", group: dist.ProcessGroup) -> None:
        self._model, self._group = model, group
        rank, size = group.rank(), group.size()
        ranks = dist.get_process_group_ranks(group)
        self._previous = ranks[rank - 1] if rank else None
        self._next = ranks[rank + 1] if rank + 1 < size else None
        self.is_last = self._next is None

    def exchange(self, **tensors: "Tensor | None") -> None:
        """Exchanges to_next, from_next, to_previous and from_previous, except where there is no neighbour or no tensor."""
        peers = {"next": self._next, "previous": self._previous}
        operations = []
        for name, tensor in tensors.items():
            direction, _, side = name.partition("_")
            peer = peers[side]
            if peer is not None and tensor is not None:
                act = dist.isend if direction == "to" else dist.irecv
                # `data`, because a received tensor may require gradients; it is filled before anything is computed with it.
                operations.append(
                    dist.P2POp(
                        act, tensor.detach().contiguous() if act is dist.isend else tensor.data, peer, self._group
                    )
                )
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()

    def hidden_from_previous(self, micro_batch: Any) -> "Tensor | None":
        """Receives the hidden states that enter this stage; None on the first."""
        hidden = self.empty_hidden(micro_batch)
        self.exchange(from_previous=hidden)
        return hidden

    def empty_hidden(self, micro_batch: Any | None) -> "Tensor | None":
        """Allocates the hidden states of a micro-batch; None on the first stage or without a micro-batch."""
        if self._previous is None or micro_batch is None:
            return None
        shape = self._model.hidden_shape(micro_batch.tokens_1L)
        parameter = next(self._model.parameters())
        return torch.empty(
            shape, dtype=self._model.architecture.torch_dtype, device=parameter.device, requires_grad=True
        )

    def empty_like(self, output: "Tensor") -> "Tensor | None":
        """Allocates the gradient of an output that was sent on; None on the last stage, which sends none."""
        return None if self.is_last else torch.empty_like(output)
