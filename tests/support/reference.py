"""transformers' Nemotron-H as an independent implementation: its model from our configuration, its weights as files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from substrate.model import ModelConfig
from tests.support.paths import ROOT

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
CONFIGS = ROOT / "hydra_conf" / "model"


def small_config(**changes: Any) -> ModelConfig:
    """All layer types, lengths that fill no chunk evenly; small enough for many steps."""
    values = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    small = {"pattern": "ME*M", "hidden_size": 48, "vocab_size": 64, "mamba_chunk_size": 16, "num_experts": 4}
    small["mamba_num_groups"] = 4  # at tp=4 one a rank, and the two query groups are on two ranks each
    return ModelConfig.from_dict(values | small | changes)


def reference_config(config: ModelConfig) -> Any:
    return transformers.NemotronHConfig(
        hybrid_override_pattern=config.pattern,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.attention_head_dim,
        mamba_num_heads=config.mamba_num_heads,
        mamba_head_dim=config.mamba_head_dim,
        ssm_state_size=config.mamba_state_dim,
        n_groups=config.mamba_num_groups,
        conv_kernel=config.mamba_conv_kernel,
        chunk_size=config.mamba_chunk_size,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.moe_top_k,
        moe_intermediate_size=config.moe_ffn_size,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_ffn_size,
        routed_scaling_factor=config.moe_router_scaling,
        layer_norm_epsilon=config.norm_eps,
        max_position_embeddings=config.max_sequence_length,
    )


def random_reference(config: ModelConfig, seed: int = 1) -> Any:
    """A model with random weights, correction biases and decays included: zeros would hide a wrong place."""
    torch.manual_seed(seed)
    model = transformers.NemotronHForCausalLM(reference_config(config))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1 and "A_log" not in name:
                tensor.add_(torch.empty_like(tensor).uniform_(-0.2, 0.2))
            elif tensor.dim() > 1:
                tensor.mul_(3)  # from 0.02: logits that differ, choices of experts that are no ties
        for name, tensor in model.named_buffers():
            if "correction_bias" in name:
                tensor.uniform_(-0.2, 0.2)
    return without_floor(model)


def load_reference(folder: Path) -> Any:
    """The model in a folder that it wrote, or with config.json and our weights."""
    return without_floor(transformers.NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32))


def without_floor(model: Any) -> Any:
    """transformers puts a floor of 0.001 under dt, which neither the published model nor megatron-core has."""
    for block in model.model.layers:
        if hasattr(block.mixer, "time_step_limit"):
            block.mixer.time_step_limit = (0.0, float("inf"))
    model.config.use_cache = False  # a cache wants an attention layer
    return model.eval()


def with_deltas(model: Any, pairs: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The reference's parameters with scale * B A added, by PEFT's names: differentiable in the pairs, any target."""
    weights = dict(model.named_parameters())
    for name in (name for name in pairs if name.endswith("lora_A.weight")):
        delta = scale * pairs[name.replace("lora_A", "lora_B")] @ pairs[name]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").replace("backbone.", "model.")
        if ".experts." in module:  # stacked there, a module an expert in the published model
            before, _, rest = module.partition(".experts.")
            expert, part = rest.split(".")
            place = torch.zeros_like(weights[f"{before}.experts.{part}"])
            place[int(expert)] = 1.0
            weights[f"{before}.experts.{part}"] = weights[f"{before}.experts.{part}"] + place * delta
        else:
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + delta
    return weights
