"""The Nemotron-H stack on megatron-core's `MambaModel`: Mamba-2, attention without positions, mixtures of experts.

megatron-core builds and runs the model; this module chooses the parts. Where the library's own specifications use
Transformer Engine, we use torch: an RMS norm that works with sequence parallelism, an attention core on
`scaled_dot_product_attention`, linear layers with room for adapters (`lora.py`) and the mixer (`mamba.py`). The mixture
of experts is the library's: a sigmoid router in float32 whose bias affects the choice of experts but not their weights,
normalised and scaled weights of the chosen ones, one expert shared by all tokens, squared ReLU and no gate.

Sources: Nemotron-H, arXiv:2504.03624; loss-free balancing, arXiv:2408.15664; the published `config.json`.
Shapes: B batch, S sequence (this rank's part under sequence parallelism), L whole sequence, U hidden size, V
vocabulary here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from substrate.distributed.groups import Parallel
from substrate.interface.errors import UsageError
from substrate.model.config import ModelConfig
from substrate.model.experts import ExpertLayer, Experts
from substrate.model.layout import layout
from substrate.model.linear import ColumnLinear, RowLinear
from substrate.model.mamba import MambaMixer, MambaMixerSubmodules
from substrate.ops.fused import rms_norm
from substrate.ops.sequences import Packing

# The option that turns CUDA graphs off, by its name in the installed megatron-core; its default is deprecated.
NO_GRAPHS = "cuda_graph_modules" if hasattr(TransformerConfig, "cuda_graph_modules") else "cuda_graph_scope"

RECOMPUTE = ("none", "selective", "full")


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32, back in x's type. megatron-core's torch norm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon if eps is None else eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        # Each rank normalises its part of the sequence, so the gradient is partial; `Parallel.finalize_gradients` sums it.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(d)) v, causal, within each document of a packing, or over a cache; query heads share key heads."""

    def __init__(self, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """q, k, v: (S, B, heads, dim) -> (S, B, heads x dim). packed_seq_params: a Packing or None."""
        if packed_seq_params is not None:
            context: Tensor = packed_seq_params.attend(q, k, v)
            return context
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return context.permute(2, 0, 1, 3).flatten(-2)


class HybridStack(MambaStack):
    """megatron-core's layers in turn, without what its own stack does for graphs, caches, fp8 and offloading."""

    recompute = "none"  # one of RECOMPUTE, set by `build_model`

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config, post_layer_norm=False, **kwargs)
        if self.post_process:
            # Ours, because the library hard-codes Transformer Engine's.
            self.post_layer_norm = True
            self.final_norm = RMSNorm(config, config.hidden_size)

    def forward(self, hidden_states: Tensor | None, packed_seq_params: Packing | None = None, **_: Any) -> Tensor:
        """hidden_states: (S, B, U); on a later stage of a pipeline those that `set_input_tensor` brought."""
        hidden: Any = hidden_states if self.pre_process else self.input_tensor
        is_full = self.recompute == "full" and torch.is_grad_enabled()
        for layer in self.layers:
            if is_full:
                hidden = checkpoint(_through, layer, hidden, packed_seq_params, use_reentrant=False)
            else:
                hidden = _through(layer, hidden, packed_seq_params)
        return self.final_norm(hidden) if self.post_process else hidden


def _through(layer: Any, hidden: Tensor, packing: Packing | None) -> Tensor:
    """hidden + part(norm(hidden)): the pre-norm residual layer, whichever part it has."""
    if isinstance(layer, MambaLayer):
        part, _ = layer.mixer(layer.norm(hidden), packed_seq_params=packing)
    elif isinstance(layer.mlp, MoELayer):
        part, _ = layer.mlp(layer.pre_mlp_layernorm(hidden))
    else:
        attention = layer.self_attention
        q, k, v = attention.get_query_key_value_tensors(layer.input_layernorm(hidden))
        part, _ = attention.linear_proj(attention.core_attention(q, k, v, packed_seq_params=packing))
    return hidden + part


class HybridModel(MambaModel):
    """A `MambaModel` built from a `ModelConfig`, which is `architecture`; `pg_collection` has its process groups."""

    def __init__(self, architecture: ModelConfig, parallel: Parallel) -> None:
        self.architecture = architecture
        super().__init__(
            config=_transformer_config(architecture, parallel),
            mamba_stack_spec=_stack_spec(architecture),
            vocab_size=architecture.vocab_size,
            max_sequence_length=architecture.max_sequence_length,
            hybrid_override_pattern=architecture.pattern,
            position_embedding_type="none",
            pg_collection=parallel.groups,
            pre_process=parallel.pp_rank == 0,
            post_process=parallel.pp_rank == parallel.pp - 1,
        )
        for layer in self.decoder.layers:
            if isinstance(getattr(layer, "mlp", None), MoELayer):
                layer.mlp.__class__ = ExpertLayer
        if self.post_process:
            # The library hard-codes its own class here; ours is the same layer with room for an adapter.
            self.output_layer.__class__ = ColumnLinear
            self.output_layer.adapter = None

    def hidden_states(self, tokens_BL: Tensor, packing: Packing | None) -> Tensor:
        """Returns hidden states (S, B, U) after this stage's layers; on the last stage after the final norm."""
        entering = self.embedding(input_ids=tokens_BL, position_ids=None) if self.pre_process else None
        return self.decoder(hidden_states=entering, attention_mask=None, packed_seq_params=packing)

    def hidden_shape(self, tokens_BL: Tensor) -> tuple[int, int, int]:
        """Returns the shape (S, B, U) of these tokens' hidden states between two layers on this rank."""
        B, L = tokens_BL.shape
        tp = self.pg_collection.tp.size()
        length = -(-L // tp) if self.config.sequence_parallel else L
        return length, B, self.config.hidden_size


def build_model(
    config: ModelConfig,
    parallel: Parallel,
    *,
    device: torch.device | str | None = None,
    recompute: str = "none",
) -> HybridModel:
    """Builds this rank's part of the model, uninitialised: `init_weights` or `load_base` comes next.

    device: where parameters are allocated, `parallel.device` by default; "meta" allocates nothing.
    recompute: what the backward pass computes again, so that it need not be kept: "none", "selective" (convolution, scan
    and gated norm of Mamba layers, no matrix product of weights), or "full" (every layer from its input, for a third
    more work). Values and gradients are those of "none" to the last bit.
    Raises UsageError for another word, or if the tensor-, expert- or pipeline-parallel size does not fit the model.
    """
    if recompute not in RECOMPUTE:
        raise UsageError(f"recompute is {recompute!r}; valid are {', '.join(RECOMPUTE)}")
    config.check_tensor_parallel(parallel.tp)
    if len(config.pattern) % parallel.pp:
        raise UsageError(f"pp is {parallel.pp}; it must divide the {len(config.pattern)} layers of model.pattern")
    if config.num_experts % parallel.ep:
        raise UsageError(f"ep is {parallel.ep}; it must divide model.num_experts {config.num_experts}")
    with torch.device(device or parallel.device):
        model = HybridModel(config, parallel)
    set_recompute(model, recompute)
    for place in layout(model):
        if place.dim is not None:  # read by `Parallel.clip_gradients`; the library sets it only when it initialises
            place.tensor.tensor_model_parallel = True  # type: ignore[attr-defined]
    return model


def set_recompute(model: HybridModel, recompute: str) -> None:
    """Sets what the backward pass computes again from the next step on, as `build_model` says."""
    model.decoder.recompute = recompute
    for layer in model.decoder.layers:
        if isinstance(layer, MambaLayer):
            layer.mixer.is_recomputed = recompute == "selective"


def _transformer_config(config: ModelConfig, parallel: Parallel) -> TransformerConfig:
    """Returns megatron-core's configuration; other options keep their defaults, such as no fusions."""
    return TransformerConfig(
        num_layers=len(config.pattern),
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.attention_head_dim,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=False,
        activation_func=squared_relu,
        mamba_state_dim=config.mamba_state_dim,
        mamba_head_dim=config.mamba_head_dim,
        mamba_num_groups=config.mamba_num_groups,
        mamba_num_heads=config.mamba_num_heads,
        num_moe_experts=config.num_experts,
        ffn_hidden_size=config.moe_ffn_size,
        moe_ffn_hidden_size=config.moe_ffn_size,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_ffn_size,
        moe_router_topk=config.moe_top_k,
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=config.moe_router_scaling,
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,  # the bias served to balance pretraining; fine-tuning keeps it
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="allgather",  # all-to-all needs CUDA streams
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        pipeline_dtype=config.torch_dtype,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.groups.expt_tp.size(),
        sequence_parallel=parallel.tp > 1,  # activations are sharded along the sequence between the matrix products
        **{NO_GRAPHS: []},
        params_dtype=config.torch_dtype,
        bf16=config.torch_dtype is torch.bfloat16,
        # Allocates under the device context of `build_model`, with or without a GPU; values come from files or
        # `init_weights`.
        use_cpu_initialization=True,
        perform_initialization=False,
    )


def _stack_spec(config: ModelConfig) -> ModuleSpec:
    """Returns the class of each part of the stack."""
    mlp = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
    mixer = ModuleSpec(
        module=MambaMixer,
        params={"conv_kernel": config.mamba_conv_kernel, "chunk_size": config.mamba_chunk_size},
        submodules=MambaMixerSubmodules(in_proj=ColumnLinear, out_proj=RowLinear),
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnLinear, core_attention=AttentionCore, linear_proj=RowLinear
        ),
    )
    experts = ModuleSpec(
        module=MoELayer,  # `HybridModel` makes it an ExpertLayer: the library gives the process groups to this name alone
        submodules=MoESubmodules(
            experts=ModuleSpec(module=Experts, submodules=mlp),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=mlp),
        ),
    )
    return ModuleSpec(
        module=HybridStack,
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(norm=RMSNorm, mixer=mixer, mamba_bda=get_bias_dropout_add),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=RMSNorm, self_attention=attention, self_attn_bda=get_bias_dropout_add
                ),
            ),
            moe_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=RMSNorm, mlp=experts, mlp_bda=get_bias_dropout_add
                ),
            ),
        ),
    )
