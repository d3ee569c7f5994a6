"""Adapters as files for tests: of our small model or of the shape of published ones, good by default and to be spoiled."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# module -> shape of its weight, in the model of `tests.support.reference.small_config`
MODULES = {
    "backbone.layers.0.mixer.in_proj": (520, 48), "backbone.layers.1.mixer.experts.2.up_proj": (96, 48),
    "backbone.layers.1.mixer.shared_experts.down_proj": (48, 192), "backbone.layers.2.mixer.v_proj": (48, 48),
    "backbone.layers.3.mixer.out_proj": (48, 192), "lm_head": (64, 48),
}  # fmt: skip
ENDS = ["in_proj", "experts.2.up_proj", "shared_experts.down_proj", "v_proj", "out_proj", "lm_head"]
# What peft 0.21 writes beside the fields that matter, as other people's adapters have it.
NULLS = {
    "alora_invocation_tokens": None, "arrow_config": None, "auto_mapping": None, "corda_config": None, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
    "lora_bias": False, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "peft_version": "0.21.2", "qalora_group_size": 16, "rank_pattern": {}, "alpha_pattern": {}, "revision": None,
    "target_parameters": None, "trainable_token_indices": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False, "a_field_of_tomorrow": None, "another": False, "a_third": {}, "a_fourth": [], "a_fifth": "",
}  # fmt: skip


def write(
    folder: Path, *, rank: int = 4, dtype: torch.dtype = torch.float32, modules: dict | None = None, **config: Any
) -> Path:
    """An adapter with a pair for each module; `config` changes or adds fields of its configuration."""
    rng = np.random.default_rng(5)
    tensors = {}
    for module, (rows, columns) in (modules or MODULES).items():
        own = config.get("rank_pattern", {}).get(module.rpartition(".")[2], rank)
        for factor, shape in (("A", (own, columns)), ("B", (rows, own))):
            values = torch.from_numpy(rng.integers(-8, 9, shape) / 32).to(dtype)  # exact in every type
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0}
    fields |= {"r": rank, "lora_alpha": 8, "target_modules": list(ENDS), **config}
    folder.mkdir(parents=True)
    save_torch(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(fields))
    return folder


def configure(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change(folder: Path, act: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Lets `act` change the tensors in place and writes them again."""
    tensors = load_file(folder / WEIGHTS)
    act(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_header(folder: Path, act: Callable[[str], str]) -> None:
    """Rewrites the header's text; the data stay."""
    content = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = act(content[8 : 8 + length].decode()).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
