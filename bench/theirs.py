"""What bench/gpu.py compares with: transformers' Nemotron-H and peft's LoRA, on the same device in the same run.

With mamba-ssm and without causal-conv1d, transformers' step would begin a fused path that needs both. It is hidden then, and the step takes
mamba-ssm's scan and torch's convolution.
"""

import importlib.util
import time
from collections.abc import Callable

import peft
import torch
import transformers
from transformers.models.nemotron_h import modeling_nemotron_h

from substrate.model import ModelConfig


def random_model(config: ModelConfig, device: torch.device, recompute: bool) -> transformers.PreTrainedModel:
    """transformers' model with its own random weights, made on the device in the model's dtype."""
    transformers.logging.set_verbosity_error()
    if importlib.util.find_spec("causal_conv1d") is None:  # None: there is no fused path
        modeling_nemotron_h.mamba2_split_conv1d_scan_combined = lambda *_, **__: None
    # Initialisation takes the logarithm of these, and published files have 0.
    scan = {"time_step_min": 0.001, "time_step_max": 0.1}
    settings = transformers.NemotronHConfig.from_dict(config.to_transformers() | scan)
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.torch_dtype)
    try:
        with device:
            model = transformers.NemotronHForCausalLM(settings)
    finally:
        torch.set_default_dtype(before)
    if recompute:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def stepper(
    model: transformers.PreTrainedModel, tokens: torch.Tensor, rank: int, targets: list[str]
) -> Callable[[], None]:
    """A function that does one LoRA step on `tokens`, of shape (1, length). The model is changed in place."""
    model.config.use_cache = False
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=32, target_modules=targets)).train()
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(adapted(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()

    return step


def decoding_rate(model: transformers.PreTrainedModel, batch: int, prompt_tokens: int, num_new: int) -> float:
    """Tokens per second of greedy `generate` after the prompts, with every sequence at its full length. The first run only warms up."""
    prompts = torch.randint(3, model.config.vocab_size, (batch, prompt_tokens), device=model.device)

    def taken(new: int) -> float:
        how = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        began = time.perf_counter()
        with torch.no_grad():
            model.generate(prompts, attention_mask=torch.ones_like(prompts), **how).tolist()
        return time.perf_counter() - began

    taken(num_new)
    # The pass over the prompts writes the first token.
    return batch * (num_new - 1) / (taken(num_new) - taken(1))
