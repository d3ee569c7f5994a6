"""The model that decodes: the tensors of a `HybridModel` as flat layers, and the passes of continuous batching.

    model = InferenceModel(hybrid)           # takes its tensors; adapters are merged or cast once
    cache = model.new_cache(num_slots=64, max_length=1024)
    logits_BV = model.prompts(cache.take(prompts), cache)
    logits_BV = Steps(model, cache).run(longest)    # steps.py

The hybrid model may be one in training, with sequence parallelism: decoding needs no second set of modules. It must have
all its layers on this rank. What is trained afterwards, the inference model does not follow; make a new one.

N rows, B sequences, S positions, U hidden size, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from substrate.inference.cache import Cache, Prompts, Step
from substrate.inference.experts import Experts
from substrate.inference.layers import Attention, Mamba
from substrate.inference.projections import Projection, joined, summed

if TYPE_CHECKING:
    from substrate.model import HybridModel


class InferenceModel:
    """Embedding, layers and output of one rank."""

    def __init__(self, model: "HybridModel") -> None:
        self.architecture, groups = model.architecture, model.pg_collection
        self.embedding_VU = model.embedding.word_embeddings.weight.detach()
        self.eps, self.tp = self.architecture.norm_eps, groups.tp
        self.norms: list[Tensor] = []
        self.mixers: list[Mamba | Attention | Experts] = []
        for letter, layer in zip(self.architecture.pattern, model.decoder.layers, strict=True):
            if letter == "M":
                norm = layer.norm
                self.mixers.append(Mamba(layer.mixer))
            elif letter == "*":
                norm = layer.input_layernorm
                self.mixers.append(Attention(layer.self_attention))
            else:
                norm = layer.pre_mlp_layernorm
                self.mixers.append(Experts(layer.mlp, groups))
            self.norms.append(norm.weight.detach())
        self.final_norm = model.decoder.final_norm.weight.detach()
        self.output = Projection(model.output_layer)

    def new_cache(self, num_slots: int, max_length: int) -> Cache:
        """Returns an empty cache of `num_slots` sequences of up to `max_length` tokens."""
        layers = [mixer.new_cache(num_slots, max_length) for mixer in self.mixers]
        return Cache(layers, num_slots, max_length, self.embedding_VU)

    def prompts(self, at: Prompts, cache: Cache) -> Tensor:
        """Runs whole prompts. Returns the logits_BV after the last position of each, whole and in float32."""
        x_NU = self._embed(at.tokens_BS.flatten())
        for norm, mixer, kept in zip(self.norms, self.mixers, cache.layers, strict=True):
            x_NU = x_NU + mixer.prompts(self._norm(x_NU, norm), kept, at)
        return self._logits(x_NU.view(*at.tokens_BS.shape, -1)[:, -1])

    def step(self, tokens_B: Tensor, at: Step, cache: Cache) -> Tensor:
        """Runs one more token of each of the first B slots. Returns the logits_BV after it."""
        x_BU = self._embed(tokens_B)
        for norm, mixer, kept in zip(self.norms, self.mixers, cache.layers, strict=True):
            x_BU = x_BU + mixer.step(self._norm(x_BU, norm), kept, at)
        return self._logits(x_BU)

    def idle(self) -> None:
        """Runs the experts of this rank for the tokens of other ranks, in a pass in which this one has none."""
        nothing = self.embedding_VU.new_zeros(1, self.embedding_VU.shape[1])
        for mixer in self.mixers:
            if isinstance(mixer, Experts):
                mixer.idle(nothing)

    def set_room(self, num_tokens: int) -> None:
        """Sets the most tokens that a rank has in the next pass, where ranks with different numbers share experts."""
        for mixer in self.mixers:
            if isinstance(mixer, Experts):
                mixer.room = num_tokens

    def _norm(self, x: Tensor, weight_U: Tensor) -> Tensor:
        return F.rms_norm(x, weight_U.shape, weight_U, self.eps)

    def _embed(self, tokens_N: Tensor) -> Tensor:
        if self.tp.size() == 1:
            return self.embedding_VU[tokens_N]
        places = tokens_N - self.tp.rank() * len(self.embedding_VU)
        here = (places >= 0) & (places < len(self.embedding_VU))
        return summed(self.embedding_VU[places.where(here, 0)] * here.unsqueeze(1), self.tp)

    def _logits(self, x_BU: Tensor) -> Tensor:
        return joined(self.output(self._norm(x_BU, self.final_norm)), self.tp, 1).float()
