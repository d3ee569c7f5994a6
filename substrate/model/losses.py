"""Log-probabilities of next tokens, also for several documents in one row, and the cross-entropy made of them.

Shapes: B sequences, L tokens of each, S positions (this rank's part under sequence parallelism), T tokens of all
sequences, U hidden size, V vocabulary here.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from substrate.model.hybrid import HybridModel
from substrate.model.linear import ColumnLinear
from substrate.ops.sequences import Packing

LOGITS_BYTES = 2**28  # most bytes of logits that exist at a time on a rank


def token_log_probs(
    model: HybridModel,
    tokens_BL: Tensor,
    labels_BL: Tensor,
    lengths: Sequence[int] | None = None,
    temperature: float = 1.0,
    wanted_BL: Tensor | None = None,
) -> Tensor:
    """Returns log p(label | tokens up to it), (B, L) in nats, float32. labels[:, i] is the token after tokens[:, i].

    lengths: if the only row (B = 1) holds several documents, the tokens of each; together L. No document sees another.
    temperature: p is softmax(logits / temperature), from which a sampler at this temperature draws.
    wanted_BL: where it is False, no logits are computed, and 0 is returned. It is on the host, so that nothing waits.
    L is padded on the right to a multiple of the tensor-parallel size, which changes no value. A pipeline stage that is
    not the last returns its hidden states instead.
    """
    length = tokens_BL.shape[1]
    surplus = -length % model.pg_collection.tp.size()
    device = next(model.parameters()).device
    tokens_BL, labels_BL = (F.pad(t.to(device), (0, surplus)) for t in (tokens_BL, labels_BL))
    packing = None
    if lengths is not None and len(lengths) > 1:
        # The last document takes the padding: it comes after all of its tokens, so that none of them sees it.
        packing = Packing([*lengths[:-1], lengths[-1] + surplus], device)
    hidden_SBU = model.hidden_states(tokens_BL, packing)
    if not model.post_process:
        return hidden_SBU
    if wanted_BL is not None:
        wanted_BL = F.pad(wanted_BL, (0, surplus))
    log_probs_BL = chunked_log_probs(
        model.output_layer, hidden_SBU, labels_BL, temperature=temperature, wanted_BL=wanted_BL
    )
    return log_probs_BL[:, :length]


def chunked_log_probs(
    layer: ColumnLinear,
    hidden_SBU: Tensor,
    labels_BL: Tensor,
    chunk_bytes: int = LOGITS_BYTES,
    temperature: float = 1.0,
    wanted_BL: Tensor | None = None,
) -> Tensor:
    """Returns log p(label), (B, L), float32, from the last hidden states (this rank's part of the sequence).

    wanted_BL: as `token_log_probs` says. A prompt's tokens are most of a row, and are not learned.
    Logits in float32 are the largest tensor of a step (4.3 GB for 8,192 tokens of the 30B). So they are computed for a
    few tokens at a time. Where the output layer is trained and there is more than one piece, they are computed again in
    the backward pass.
    """
    rows_TU = layer.enter(hidden_SBU).flatten(0, 1)
    labels_T = labels_BL.T.flatten()
    num_tokens, places = len(labels_T), None
    if wanted_BL is not None:
        # One at least, because a rank without any must take part in the sums over ranks.
        places = (
            wanted_BL.T.flatten().nonzero().flatten() if wanted_BL.any() else torch.zeros(1, dtype=torch.int64)
        ).to(rows_TU.device)
        rows_TU, labels_T = _Picked.apply(rows_TU, places), labels_T[places]
    num_rows = max(1, chunk_bytes // (4 * layer.weight.shape[0]))
    pieces = list(zip(rows_TU.split(num_rows), labels_T.split(num_rows), strict=True))
    if layer.adapter is None and not layer.weight.requires_grad:
        first = layer.weight.shape[0] * layer.tp_group.rank()
        learns = torch.is_grad_enabled() and rows_TU.requires_grad
        log_probs_T = _FrozenLogProbs.apply(
            rows_TU, labels_T - first, layer.weight, num_rows, temperature, layer.tp_group, learns
        )
    elif len(pieces) == 1 or not torch.is_grad_enabled():
        log_probs_T = -torch.cat([_losses_of(layer, rows, labels, temperature) for rows, labels in pieces])
    else:
        losses = [
            checkpoint(_losses_of, layer, rows, labels, temperature, use_reentrant=False) for rows, labels in pieces
        ]
        log_probs_T = -torch.cat(losses)
    if places is not None:
        log_probs_T = log_probs_T.new_zeros(num_tokens).index_put((places,), log_probs_T)
    return log_probs_T.unflatten(0, (-1, labels_BL.shape[0])).T


class _FrozenLogProbs(torch.autograd.Function):
    """log p(label) of each row by a frozen output layer, with a gradient that is computed at once.

    The gradient of a row's log-probability is W^T (onehot - p) times a number that the backward pass brings. So it is made
    while the row's logits exist, and no logits are kept or computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_TU: Tensor,
        labels_T: Tensor,
        weight_VU: Tensor,
        num_rows: int,
        temperature: float,
        ranks: dist.ProcessGroup,
        learns: bool,
    ) -> Tensor:
        """labels_T: counted from the first of this rank's part of the vocabulary, so others' lie outside of it."""
        log_probs_T = torch.empty(len(rows_TU), device=rows_TU.device)
        of_rows = torch.empty_like(rows_TU) if learns else None
        is_alone = ranks.size() == 1
        for begin in range(0, len(rows_TU), num_rows):
            piece = slice(begin, begin + num_rows)
            logits_TV = F.linear(rows_TU[piece], weight_VU).float()
            if temperature != 1:
                logits_TV /= temperature
            top_T1 = logits_TV.amax(-1, keepdim=True)
            if not is_alone:
                dist.all_reduce(top_T1, op=dist.ReduceOp.MAX, group=ranks)
            labels_T1 = labels_T[piece].unsqueeze(1)
            is_here = ((labels_T1 >= 0) & (labels_T1 < len(weight_VU))).float()
            labels_T1 = labels_T1 * is_here.to(labels_T1.dtype)
            chosen_T1 = logits_TV.sub_(top_T1).gather(1, labels_T1).mul_(is_here)
            sum_T1 = logits_TV.exp_().sum(-1, keepdim=True)
            if not is_alone:
                dist.all_reduce(chosen_T1, group=ranks)
                dist.all_reduce(sum_T1, group=ranks)
            log_probs_T[piece] = (chosen_T1 - sum_T1.log()).squeeze(1)
            if of_rows is not None:
                logits_TV.div_(sum_T1).scatter_add_(1, labels_T1, -is_here)
                torch.mm(logits_TV.to(rows_TU.dtype), weight_VU, out=of_rows[piece])
        ctx.save_for_backward(of_rows)
        ctx.temperature = temperature
        return log_probs_T

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor | None, ...]:
        (of_rows,) = ctx.saved_tensors
        scale_T1 = (gradient_T / -ctx.temperature).unsqueeze(1)
        return (of_rows * scale_T1).to(of_rows.dtype), None, None, None, None, None, None


class _Picked(torch.autograd.Function):
    """x[places] along the first dimension, each place once, so that the gradient is written and not added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.shape = places, x.shape
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(ctx.shape).index_copy_(0, ctx.places, gradient), None


def _losses_of(layer: ColumnLinear, rows_TU: Tensor, labels_T: Tensor, temperature: float) -> Tensor:
    """Returns the cross-entropy of each row; the vocabulary is sharded over tensor-parallel ranks."""
    logits_TV = layer.product(rows_TU).float()
    if temperature != 1:
        logits_TV = logits_TV / temperature
    return vocab_parallel_cross_entropy(logits_TV.unsqueeze(1), labels_T.unsqueeze(1)).squeeze(1)


def token_losses(
    model: HybridModel, tokens_BL: Tensor, labels_BL: Tensor, mask_BL: Tensor, lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the summed cross-entropy in nats where mask is 1, and the number of those tokens, both 0-d and of this rank.

    Divide the sum by the number of targets of the whole batch before backward.
    """
    log_probs_BL = token_log_probs(model, tokens_BL, labels_BL, lengths)
    mask_BL = mask_BL.to(log_probs_BL)
    return -(log_probs_BL * mask_BL).sum(), mask_BL.sum()
