"""Reads and writes base checkpoints and adapters as safetensors with the published names, at any number of ranks.

    base      backbone.layers.<N>.mixer.<module>...                                one file, or the published shards
    adapter   base_model.model.backbone.layers.<N>.mixer.<module>.lora_A.weight    PEFT's names, float32, whole tensors

Files hold whole tensors; a rank reads its part of each (`layout.py`). No file is a pickle, because an adapter comes out
of a sandbox. docs/contract.md has both formats.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from substrate.interface.errors import DataError, UsageError
from substrate.model.layout import layout, named_generator
from substrate.model.lora import EXPERT, adapted_modules, adapter_name, adapters, add_lora
from substrate.model.tensors import Checkpoint, collect, fill, owned, write_shards

PREFIX = "backbone"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def init_weights(model: Any, seed: int) -> None:
    """Fills a model for pretraining. Whole tensors are drawn by (seed, name) and then cut, so ranks do not matter.

    Matrices are normal with standard deviation 1/sqrt(inputs), divided by sqrt(layers) if they write to the residual
    stream (GPT-2). Mamba-2's own parameters are as in its paper: -A uniform in 1..16, dt log-uniform in 0.001..0.1, D 1.
    """
    num_layers = len(model.architecture.pattern)
    with torch.no_grad():
        for place in layout(model):
            whole = [_initial(name, place.shape(i), num_layers, seed) for i, name in enumerate(place.names)]
            place.tensor.copy_(place.local(torch.cat(whole)))


def load_base(model: Any, path: Path | str) -> None:
    """Reads a base checkpoint: a .safetensors file, or a folder with one or with the published shards.

    Raises DataError that names the first missing, surplus or misshapen tensor, or says what is wrong with the file.
    """
    with torch.no_grad(), Checkpoint(Path(path)) as checkpoint:
        checkpoint.check_names(model.architecture)
        for place in layout(model):
            fill(place, checkpoint)


def save_base(model: Any, path: Path | str) -> None:
    """Writes the whole model. All ranks must call it together.

    path: a .safetensors file, which rank 0 writes with the whole model in host memory; or a folder, for shards of at
    most SHARD_BYTES with the published index, of which each rank holds one at a time.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        _write(collect(owned(layout(model), model.pg_collection)), path)
        return
    path.mkdir(parents=True, exist_ok=True)
    files = write_shards(owned(layout(model), model.pg_collection), path, "model")
    weight_map = collect((name, file) for file, names in files.items() for name in names)
    if torch.distributed.get_rank() == 0:
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    torch.distributed.barrier()


def save_adapter(model: Any, folder: Path | str, prefix: str = PREFIX) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`. All ranks must call it; rank 0 writes.

    prefix: how names of layers begin: `backbone` as published, `model` for peft on transformers' model.
    """
    found = adapters(model)
    places = (place for adapter in found for place in adapter.placements())
    kept = {adapter_name(name, factor) for adapter in found for name in adapter.active for factor in "AB"}
    tensors = collect(
        (name.replace(f".{PREFIX}.", f".{prefix}."), tensor.float())
        for name, tensor in owned(places, model.pg_collection)
        if name in kept
    )
    modules = collect((module, None) for adapter in found for module in adapter.peft_targets())
    # A pipeline stage may have no adapter, so rank and alpha come from any stage that has one.
    config = collect(
        (key, value)
        for adapter in found[:1]
        for key, value in (("r", adapter.rank), ("lora_alpha", adapter.alpha), ("lora_dropout", adapter.dropout))
    ) | {
        "peft_type": "LORA",
        "target_modules": sorted(modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.architecture.name,
    }
    folder = Path(folder)
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write(tensors, folder / ADAPTER_FILE)


def load_adapter(model: Any, folder: Path | str) -> None:
    """Loads an adapter from `save_adapter` into a model, adding the layers that its configuration names.

    A model that has adapters already keeps them, and they must match. Raises DataError that names a missing, surplus or
    misshapen tensor.
    """
    config = _read_adapter_config(Path(folder) / ADAPTER_CONFIG)
    targets = {EXPERT.sub("experts.", target) for target in config["target_modules"]}
    if not adapters(model):
        try:
            add_lora(model, config["r"], config["lora_alpha"], config["lora_dropout"], sorted(targets), seed=0)
        except UsageError as error:
            raise DataError(f"{ADAPTER_CONFIG}: {error}") from None
    with torch.no_grad(), Checkpoint(Path(folder) / ADAPTER_FILE) as checkpoint:
        modules = adapted_modules(model.architecture, targets)
        expected = {adapter_name(name, factor) for name in modules for factor in "AB"}
        for adapter in adapters(model):
            place_A, place_B = adapter.placements()
            fill(place_A, checkpoint)
            fill(place_B, checkpoint, {adapter_name(n, "B") for n in adapter.base.names if n not in adapter.active})
        if surplus := sorted(checkpoint.names - expected):
            raise DataError(
                f"{ADAPTER_FILE} holds {surplus[0]}, which the model does not have; check adapter and model"
            )


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Rank 0 writes a temporary file and renames it, so that the file is complete when it exists; the others wait."""
    if torch.distributed.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file({name: tensors[name] for name in sorted(tensors)}, partial)
        partial.replace(path)
    torch.distributed.barrier()


def _read_adapter_config(path: Path) -> dict[str, Any]:
    """Reads the configuration and checks the keys that `load_adapter` uses."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; a readable JSON file is needed") from None
    kinds = {"r": int, "lora_alpha": int | float, "lora_dropout": int | float, "target_modules": list}
    for key, kind in kinds.items():
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise DataError(f"{path.name}: {key} is missing or of another type; it must be of type {kind}")
    return config


def _initial(name: str, shape: tuple[int, ...], num_layers: int, seed: int) -> Tensor:
    """Draws one whole tensor as `init_weights` describes."""
    generator = named_generator(seed, name)
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return torch.ones(shape)
    if name.endswith(("bias", "e_score_correction_bias")) and not name.endswith("dt_bias"):
        return torch.zeros(shape)
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(1, 16, generator=generator).log()
    if name.endswith("dt_bias"):
        dt = torch.empty(shape).uniform_(math.log(0.001), math.log(0.1), generator=generator).exp()
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    std = 1 / math.sqrt(math.prod(shape[1:]))
    if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
        std /= math.sqrt(num_layers)
    return torch.empty(shape).normal_(0, std, generator=generator)
