"""Log-probabilities of next tokens, several documents to a row where there are several, and the loss made of them.

Shapes: B sequences, L tokens of each, S positions (S = L).
"""

import torch.nn.functional as F
from torch import Tensor

from substrate.model.hybrid import HybridModel
from substrate.model.sequences import Packing


def token_log_probs(
    model: HybridModel, tokens_BL: Tensor, labels_BL: Tensor, documents_BL: Tensor | None = None
) -> Tensor:
    """log p(label | tokens up to it), (B, L) in nats, float32. labels[:, i] is the token after tokens[:, i].

    documents_BL: where several documents share a row, the number of each token's document; positions of one document
    do not see another. Lengths are padded to a multiple of the tensor-parallel size; padding on the right changes
    nothing before it. A stage of a pipeline that is not the last returns its hidden states instead.
    """
    length = tokens_BL.shape[1]
    surplus = -length % model.pg_collection.tp.size()
    device = next(model.parameters()).device
    tokens_BL, labels_BL = (F.pad(t.to(device), (0, surplus)) for t in (tokens_BL, labels_BL))
    packing = None
    if documents_BL is not None:
        packing = Packing(F.pad(documents_BL.to(device), (0, surplus), value=int(documents_BL.max()) + 1))
    outputs = model(tokens_BL, None, None, labels=labels_BL, packed_seq_params=packing)
    return -outputs[:, :length] if model.post_process else outputs


def token_losses(
    model: HybridModel, tokens_BL: Tensor, labels_BL: Tensor, mask_BL: Tensor, documents_BL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats over the tokens where mask is 1, and their number: 0-d, of this data-parallel rank.

    Divide the sum by the number of targets of the whole batch before backward.
    """
    log_probs_BL = token_log_probs(model, tokens_BL, labels_BL, documents_BL)
    mask_BL = mask_BL.to(log_probs_BL)
    return -(log_probs_BL * mask_BL).sum(), mask_BL.sum()
