"""Process groups of a run, from torchrun's environment or of one process alone, and the sums over ranks.

    axis   splits                             a parameter's gradient on one rank is
    tp     matrices, heads, vocabulary, and   complete if the parameter is sharded; if it is replicated, that of this
           between them the sequence          rank's part of the sequence (or of a product): sum over tp
    dp     the batch                          that of this rank's sequences: sum over dp
    pp     the layers                         complete: a parameter is on one stage (`training/pipeline_stages.py`)
    ep     the experts, inside tp x dp        that of all tokens sent to this rank's experts: sum over their replicas

Gradients are summed, not averaged: a loss is divided by the number of targets of the whole batch before backward, so
every gradient has its final unit and no rank needs to know how many others there are. Layouts follow Megatron-LM
(arXiv:2104.04473; sequence parallelism arXiv:2205.05198). With ep > 1 the experts are whole (expert tensor parallelism
1), as in NVIDIA's published layouts of Nemotron 3 Nano; with ep = 1 they are sharded over tp like every other matrix.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from substrate.interface.errors import UsageError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


AXES = ("tp", "pp", "ep", "cp", "dp")


@dataclass(frozen=True)
class Parallel:
    """The sizes of the axes, this process's place in them, and the collectives of training and decoding."""

    tp: int
    pp: int
    ep: int
    cp: int
    dp: int
    rank: int  # of world_size = tp x pp x cp x dp
    world_size: int
    device: torch.device
    groups: "ProcessGroupCollection"  # megatron-core's process groups, with which its modules are built

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    def finalize_gradients(self, model: torch.nn.Module) -> None:
        """Completes `.grad` of every trainable parameter, in place. A collective call after the last backward."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            if parameter.grad is None:  # an expert that saw no token still takes part in the sums
                parameter.grad = torch.zeros_like(parameter)
        partial = [p for p in trainable if getattr(p, "sequence_parallel", False)]
        experts = [p for p in trainable if not getattr(p, "allreduce", True)]
        dense = [p for p in trainable if getattr(p, "allreduce", True)]
        _sum_gradients([p for p in partial if getattr(p, "allreduce", True)], self.groups.tp)
        _sum_gradients([p for p in partial if not getattr(p, "allreduce", True)], self.groups.expt_tp)
        _sum_gradients(dense, self.groups.dp_cp)
        _sum_gradients(experts, self.groups.expt_dp)

    def clip_gradients(self, model: torch.nn.Module, max_norm: float) -> float:
        """Scales finalized gradients to an L2 norm of at most `max_norm` over the whole model. Returns the norm before.

        A replicated parameter counts once: every rank divides its piece's squared norm by the number of copies.
        """
        num_ranks = self.world_size // self.pp  # of one stage
        pieces = [(p.grad, num_ranks // self._num_shards(p)) for p in model.parameters() if p.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient, num_copies in pieces:
            squares += gradient.square().sum(dtype=torch.float64) / num_copies
        dist.all_reduce(squares)
        norm = float(squares.sqrt().item())
        if norm > max_norm:
            for gradient, _ in pieces:
                gradient.mul_(max_norm / norm)
        return norm

    def agree(self, flag: bool) -> bool:
        """Returns True on every rank if any rank passes True. A collective call."""
        said = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said.item())

    def any_rank(self, flags: Mapping[str, bool]) -> dict[str, bool]:
        """Returns every name that a rank passes, with True if any rank passes True for it. A collective call."""
        said: list[dict[str, bool]] = [{}] * self.world_size
        dist.all_gather_object(said, dict(flags))
        return {name: any(other.get(name, False) for other in said) for each in said for name in each}

    def share(self, value: Any) -> Any:
        """Returns rank 0's value, a picklable object, on every rank. A collective call."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the entries of all data-parallel ranks, in the order of these ranks. A collective call."""
        parts: list[dict[str, Any]] = [{}] * self.dp
        dist.all_gather_object(parts, dict(mine), group=self.groups.dp)
        return {name: value for part in parts for name, value in part.items()}

    def largest(self, number: int) -> int:
        """Returns the largest number that a rank passes. A collective call."""
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def total(self, value: float) -> float:
        """Sums over data-parallel ranks and stages a number that tensor-parallel ranks hold equally, such as a loss."""
        summed = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed, group=self.groups.dp)
        dist.all_reduce(summed, group=self.groups.pp)
        return float(summed.item())

    def shutdown(self) -> None:
        """Leaves the process groups. Every rank calls it once, last of all."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

    def _num_shards(self, parameter: torch.nn.Parameter) -> int:
        """Returns into how many pieces the ranks of a stage split this parameter; 1 if each holds all of it."""
        sharded = getattr(parameter, "tensor_model_parallel", False)
        if not getattr(parameter, "allreduce", True):
            return self.ep * (self.groups.expt_tp.size() if sharded else 1)
        return self.tp if sharded else 1


def start(parallelism: Mapping[str, Any]) -> Parallel:
    """Joins the process groups of torchrun's environment, or makes a world of this process alone.

    parallelism: sizes of AXES as in hydra_conf/parallelism; other keys are ignored. Raises UsageError if they do not
    multiply to the number of processes. Uses NCCL with one GPU per local rank, or gloo without GPUs.
    """
    if missing := [axis for axis in AXES if axis not in parallelism]:
        raise UsageError(f"parallelism lacks {', '.join(missing)}; all of {', '.join(AXES)} are needed")
    sizes = {axis: int(parallelism[axis]) for axis in AXES}
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    _check(sizes, world_size)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    elif os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        # All ranks are on this host, and a sandbox has no interface but loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # A single process needs no rendezvous and so no port.
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size == 1 else {}
    dist.init_process_group("nccl" if on_gpu else "gloo", **alone)

    import substrate.distributed.cpu  # noqa: F401, I001  before the first import of megatron.core
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes["tp"],
        pipeline_model_parallel_size=sizes["pp"],
        context_parallel_size=sizes["cp"],
        expert_model_parallel_size=sizes["ep"],
        expert_tensor_parallel_size=sizes["tp"] if sizes["ep"] == 1 else 1,  # see the module's docstring
        create_gloo_process_groups=False,  # a second set beside NCCL's, which we do not use
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Parallel(**sizes, rank=rank, world_size=world_size, device=device, groups=groups)


def _check(sizes: Mapping[str, int], world_size: int) -> None:
    """Raises UsageError for a layout that is not supported or does not fit the number of processes."""
    text = " ".join(f"{axis}={size}" for axis, size in sizes.items())
    if sizes["cp"] != 1:
        raise UsageError(f"parallelism {text}; cp must be 1, because the Mamba scan is not split along the sequence")
    if sizes["tp"] * sizes["pp"] * sizes["dp"] != world_size:
        raise UsageError(f"parallelism {text} on {world_size} processes; tp x pp x dp must equal their number")
    if sizes["ep"] < 1 or (sizes["tp"] * sizes["dp"]) % sizes["ep"]:
        raise UsageError(f"parallelism {text}; ep must divide tp x dp = {sizes['tp'] * sizes['dp']}")


def _sum_gradients(parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums gradients over a group in one message for each dtype."""
    if group.size() == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        assert parameter.grad is not None
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=group)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
