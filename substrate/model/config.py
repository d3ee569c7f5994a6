"""The configuration of a Nemotron-H: one frozen dataclass with exactly the keys of `hydra_conf/model/*.yaml`.

Nemotron-H is a stack of layers `x + mixer(norm(x))`. One letter of `pattern` gives the mixer of each: M a Mamba-2 mixer,
`*` grouped-query attention without positions, E a mixture of experts. The published checkpoints
(nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B, `config.json`) name the same numbers; nothing else of the architecture varies.

Sources: Nemotron-H, arXiv:2504.03624; Nemotron 3 Nano technical report (NVIDIA, 2025); Mamba-2, arXiv:2405.21060.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from substrate.interface.errors import UsageError

LAYER_LETTERS = "ME*"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelConfig:
    """Every number of the architecture. Sizes are those of the whole model, before sharding."""

    name: str  # the name in logs and adapter files
    pattern: str  # one letter per layer: M Mamba-2, E mixture of experts, * attention
    hidden_size: int  # width of the residual stream
    vocab_size: int  # tokens; a multiple of the tensor-parallel size
    num_attention_heads: int  # query heads
    num_query_groups: int  # key/value heads
    attention_head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    mamba_state_dim: int  # N in the paper
    mamba_num_groups: int  # heads of one group share B and C
    mamba_conv_kernel: int  # taps of the causal convolution
    mamba_chunk_size: int  # most tokens in one quadratic block of the scan
    num_experts: int  # routed experts
    moe_top_k: int  # routed experts per token
    moe_ffn_size: int  # hidden units of a routed expert
    moe_shared_expert_ffn_size: int  # hidden units of the expert that sees every token
    moe_router_scaling: float  # factor on the normalised weights of the chosen experts
    norm_eps: float
    max_sequence_length: int  # tokens, prompt and completion
    dtype: str  # of parameters and activations: a key of DTYPES
    weights: str  # base checkpoint, relative to the image

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Makes a configuration from a mapping. Raises UsageError for a wrong key, type or value."""
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise UsageError(f"model has the unknown key {', '.join(unknown)}; valid keys are {', '.join(fields)}")
        if missing := [name for name in fields if name not in values]:
            raise UsageError(f"model lacks the key {', '.join(missing)}; all of {', '.join(fields)} are needed")
        converted = {name: _convert(name, values[name], kind) for name, kind in fields.items()}
        return cls(**converted)

    def __post_init__(self) -> None:
        if not self.pattern or set(self.pattern) - set(LAYER_LETTERS):
            raise UsageError(f"model.pattern is {self.pattern!r}; valid are one or more of the letters {LAYER_LETTERS}")
        if self.dtype not in DTYPES:
            raise UsageError(f"model.dtype is {self.dtype!r}; valid are {', '.join(DTYPES)}")
        for whole, part in [
            ("num_attention_heads", "num_query_groups"),
            ("mamba_num_heads", "mamba_num_groups"),
        ]:
            if getattr(self, whole) % getattr(self, part):
                raise UsageError(
                    f"model.{whole} is {getattr(self, whole)}; it must be a multiple of {part} {getattr(self, part)}"
                )
        if self.moe_top_k > self.num_experts:
            raise UsageError(f"model.moe_top_k is {self.moe_top_k}; valid is at most num_experts {self.num_experts}")

    def check_tensor_parallel(self, tp: int) -> None:
        """Raises UsageError unless `tp` ranks can share the heads, groups, experts and vocabulary evenly."""
        for name in (
            "num_attention_heads",
            "mamba_num_groups",
            "moe_ffn_size",
            "moe_shared_expert_ffn_size",
            "vocab_size",
        ):
            if getattr(self, name) % tp:
                raise UsageError(f"tensor-parallel size is {tp}; it must divide model.{name} {getattr(self, name)}")
        if tp % self.num_query_groups and self.num_query_groups % tp:
            raise UsageError(
                f"tensor-parallel size is {tp}; it must be a multiple or a divisor of num_query_groups {self.num_query_groups}"
            )

    def to_transformers(self) -> dict[str, Any]:
        """Returns the `config.json` from which transformers builds its NemotronHForCausalLM."""
        return {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "dtype": self.dtype,
            "hybrid_override_pattern": self.pattern,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": False,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.attention_head_dim,
            "mamba_num_heads": self.mamba_num_heads,
            "mamba_head_dim": self.mamba_head_dim,
            "ssm_state_size": self.mamba_state_dim,
            "n_groups": self.mamba_num_groups,
            "conv_kernel": self.mamba_conv_kernel,
            "chunk_size": self.mamba_chunk_size,
            "time_step_min": 0.0,  # transformers clamps dt to at least this; the published model does not
            "n_routed_experts": self.num_experts,
            "num_experts_per_tok": self.moe_top_k,
            "moe_intermediate_size": self.moe_ffn_size,
            "moe_shared_expert_intermediate_size": self.moe_shared_expert_ffn_size,
            "routed_scaling_factor": self.moe_router_scaling,
            "layer_norm_epsilon": self.norm_eps,
            "max_position_embeddings": self.max_sequence_length,
        }

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def mamba_inner_size(self) -> int:
        """Width of z and of x inside the Mamba mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_bc_size(self) -> int:
        """Width of B, and of C, over all groups."""
        return self.mamba_num_groups * self.mamba_state_dim


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Checks type and sign of a value; the only conversion is from int to float."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"model.{name} is {value!r}; it must be of type {kind.__name__}")
    if isinstance(value, int | float) and value <= 0:
        raise UsageError(f"model.{name} is {value!r}; it must be positive")
    return value
