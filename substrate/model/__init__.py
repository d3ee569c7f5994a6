"""Nemotron-H on megatron-core: configuration, sharded model, adapters, weights. `__all__` is what other packages use."""

from substrate.distributed import cpu  # noqa: F401  first, because it prepares the import of megatron-core
from substrate.model.config import ModelConfig
from substrate.model.hybrid import HybridModel, build_model
from substrate.model.lora import add_lora, learning_targets, merge_lora, trainable_placements
from substrate.model.losses import token_log_probs, token_losses
from substrate.model.weights import init_weights, load_adapter, load_base, save_adapter, save_base

__all__ = [
    "HybridModel", "ModelConfig", "add_lora", "build_model", "init_weights", "learning_targets",
    "load_adapter", "load_base", "merge_lora", "save_adapter", "save_base", "token_log_probs", "token_losses",
    "trainable_placements",
]  # fmt: skip
