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

from substrate.interface.command_line import as_umask_says
from substrate.interface.errors import DataError
from substrate.interface.peft_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TARGETS,
    PeftConfig,
    published_name,
    target_of,
)
from substrate.model.layout import layout, named_generator
from substrate.model.lora import adapted_modules, adapter_name, adapters, add_pairs
from substrate.model.tensors import INDEX, Checkpoint, collect, fill, owned, write_shards

PREFIX = "backbone"


def init_weights(model: Any, seed: int) -> None:
    """Fills a model for pretraining. Whole tensors are drawn by (seed, name) and then cut, so ranks do not matter.

    Matrices are normal with standard deviation 1/sqrt(inputs), divided by sqrt(layers) if they write to the residual
    stream (GPT-2). Mamba-2's own parameters are as in its paper: -A uniform in 1..16, dt log-uniform in 0.001..0.1, D 1.
    """
    num_layers = len(model.architecture.pattern)
    with torch.no_grad():
        for place in layout(model):
            whole = [initial_tensor(name, place.shape(i), num_layers, seed) for i, name in enumerate(place.names)]
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
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
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
    _write(tensors, folder / ADAPTER_WEIGHTS)


def load_adapter(model: Any, folder: Path | str) -> None:
    """Loads an adapter of PEFT's form into a model, adding pairs to the modules that it adapts.

    Ranks and scales that differ between modules become one rank (the smaller padded with zeros) and one scale (the rest
    goes into B). A model that has adapters already keeps them, and they must match. Raises DataError that names a field
    that `PeftConfig` refuses, or a tensor that is missing, surplus, misshapen or not finite.
    """
    folder = Path(folder)
    config = PeftConfig.read(folder)
    with torch.no_grad(), _Factors(folder, config) as factors:
        _check_modules(model, factors)
        rank = max(config.rank_of(module) for module in factors.modules.values())
        if not adapters(model):
            add_pairs(model, rank, config.alpha, config.dropout, factors.modules, seed=0)
        here = {name for place in layout(model) for name in place.names if name in factors.modules}
        found = adapters(model)
        if here != {name for adapter in found for name in adapter.active} or any(each.rank != rank for each in found):
            raise DataError(f"{config.path} is not of the adapter that the model has already; load it into the base")
        for adapter in found:
            factors.scale = adapter.alpha / adapter.rank
            place_A, place_B = adapter.placements()
            fill(place_A, factors)
            fill(place_B, factors, {adapter_name(n, "B") for n in adapter.base.names if n not in adapter.active})
            if not (adapter.A_RI.isfinite().all() and adapter.B_OR.isfinite().all()):
                raise DataError(f"{ADAPTER_WEIGHTS} holds NaN or infinity in the pair of {adapter.active[0]}")


class _Factors(Checkpoint):
    """The factors of an adapter file as a model holds them: all of one rank and of one scale."""

    def __init__(self, folder: Path, config: PeftConfig) -> None:
        super().__init__(folder / ADAPTER_WEIGHTS)
        self.config = config
        self.scale = config.scale_of(None)  # by which the model multiplies every B A
        # Published name of each adapted weight -> its module's name in the file, which the patterns speak of.
        self.modules = {published_name(f"{module}.weight"): module for module in config.modules_in(self.stored_names)}

    def read(self, name: str, shape: tuple[int, ...], rows: slice, columns: slice = slice(None)) -> Tensor:
        """Returns a part of a factor, padded to the rank in `shape`; B is multiplied by what `scale` lacks."""
        module = self.modules[name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] + ".weight"]
        rank = self.config.rank_of(module)
        if name.endswith("lora_A.weight"):
            part = self._float(name, super().read(name, (rank, shape[1]), slice(0, rank), columns))
            return torch.nn.functional.pad(part, (0, 0, 0, shape[0] - rank))[rows]
        part = self._float(name, super().read(name, (shape[0], rank), rows, slice(0, rank)))
        part = torch.nn.functional.pad(part, (0, shape[1] - rank))[:, columns]
        return part * (self.config.scale_of(module) / self.scale)

    def _float(self, name: str, part: Tensor) -> Tensor:
        if part.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise DataError(f"{ADAPTER_WEIGHTS}: {name} is of {part.dtype}; save it as float32, float16 or bfloat16")
        return part.float()


def _check_modules(model: Any, factors: _Factors) -> None:
    """Raises DataError for a module that the model lacks, and for one that the configuration names and the file lacks."""
    config, found = factors.config, factors.modules
    known = adapted_modules(model.architecture, TARGETS)
    if surplus := sorted(set(found) - set(known)):
        raise DataError(f"{ADAPTER_WEIGHTS} holds {surplus[0]}, which the model does not have; check adapter and model")
    kinds = {target_of(module) for module in found.values()}
    # From a name like up_proj experts get no pair where transformers 5 stacks them, because they are no linear modules then.
    may_lack_experts = isinstance(config.targets, str) or not any(".experts." in f".{each}" for each in config.targets)
    is_renamed = any(module.startswith("model.") for module in found.values())
    for name in known:
        module = name.removesuffix(".weight")
        module = module.replace("backbone.", "model.", 1) if is_renamed else module
        is_stacked = may_lack_experts and target_of(module).startswith("experts.") and target_of(module) not in kinds
        if name not in found and config.takes(module) and not is_stacked:
            raise DataError(f"{ADAPTER_WEIGHTS} lacks the pair of {module}, which {config.path} names; save it again")


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Rank 0 writes a temporary file and renames it, so that the file is complete when it exists; the others wait."""
    if torch.distributed.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file({name: tensors[name] for name in sorted(tensors)}, partial)
        as_umask_says(partial)
        partial.replace(path)
    torch.distributed.barrier()


def initial_tensor(name: str, shape: tuple[int, ...], num_layers: int, seed: int) -> Tensor:
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
