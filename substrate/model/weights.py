"""Weights in and out: base checkpoints and adapters as safetensors with the published names, at any number of ranks.

    base      backbone.layers.<N>.mixer.<module>...                                one file, or the published shards
    adapter   base_model.model.backbone.layers.<N>.mixer.<module>.lora_A.weight    PEFT's names, float32, whole tensors

Files hold whole tensors; a rank reads each tensor that it has a part of and keeps its part (`layout.py` says which).
Reading goes through safetensors only, never a pickle: an adapter comes out of a sandbox. Both formats are those of
docs/contract.md.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from substrate.errors import DataError, UsageError
from substrate.model.layout import Placement, layout, named_generator
from substrate.model.lora import adapter_name, adapters, add_lora

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def init_weights(model: Any, seed: int) -> None:
    """Fills a model for pretraining. Whole tensors are drawn by (seed, name), then cut: alike at any number of ranks.

    Matrices: normal with sd 1/sqrt(inputs), and 1/sqrt(layers) of that where they write to the residual stream
    (GPT-2). Mamba-2's own parameters as in its paper: A uniform in 1..16, dt log-uniform in 0.001..0.1, D one.
    """
    num_layers = len(model.architecture.pattern)
    with torch.no_grad():
        for place in layout(model):
            whole = [_initial(name, place.shape(i), num_layers, seed) for i, name in enumerate(place.names)]
            place.tensor.copy_(place.local(torch.cat(whole)))


def load_base(model: Any, path: Path | str) -> None:
    """Reads a base checkpoint: a .safetensors file, or a folder with one or with the published shards.

    Raises DataError naming the first tensor that is missing or has another shape, or what is wrong with the file.
    """
    with torch.no_grad(), _Tensors(Path(path)) as tensors:
        for place in layout(model):
            _fill(place, tensors.get)


def save_base(model: Any, path: Path | str) -> None:
    """Writes the whole model to one .safetensors file; every rank must call, rank 0 writes. ep must be 1."""
    groups = model.pg_collection
    if groups.ep.size() != 1:
        raise UsageError(f"save_base with ep={groups.ep.size()}; it gathers over tp only, ep must be 1")
    _write(_gather(layout(model)), Path(path))


def save_adapter(model: Any, folder: Path | str) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`; every rank must call, rank 0 writes."""
    found = adapters(model)
    tensors = _gather(place for adapter in found for place in adapter.placements())
    kept = {adapter_name(name, factor) for adapter in found for name in adapter.active for factor in "AB"}
    first = found[0]
    config = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": sorted({target for adapter in found for target in adapter.targets()}),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.architecture.name,
    }
    folder = Path(folder)
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write({name: tensor.float() for name, tensor in tensors.items() if name in kept}, folder / ADAPTER_FILE)


def load_adapter(model: Any, folder: Path | str) -> None:
    """Puts an adapter from `save_adapter` on a model: adds the layers its configuration names, then reads them.

    A model that has adapters keeps them and must match. Raises DataError naming the tensor that is missing, surplus or
    misshapen.
    """
    config = _read_adapter_config(Path(folder) / ADAPTER_CONFIG)
    if not adapters(model):
        try:
            add_lora(model, config["r"], config["lora_alpha"], config["lora_dropout"], config["target_modules"], seed=0)
        except UsageError as error:
            raise DataError(f"{ADAPTER_CONFIG}: {error}") from None
    with torch.no_grad(), _Tensors(Path(folder) / ADAPTER_FILE) as tensors:
        expected: set[str] = set()
        for adapter in adapters(model):
            place_A, place_B = adapter.placements()
            expected.update(adapter_name(name, factor) for name in adapter.active for factor in "AB")
            _fill(place_A, tensors.get)
            _fill(
                place_B,
                tensors.get,
                absent={adapter_name(n, "B") for n in adapter.base.names if n not in adapter.active},
            )
        if surplus := sorted(tensors.names - expected):
            raise DataError(f"{ADAPTER_FILE} holds {surplus[0]}, which the model has no place for")


class _Tensors:
    """The tensors of one or several safetensors files by name."""

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise DataError(f"{path}: no such .safetensors file, nor a folder with one")
        self._path = path
        try:
            self._open = [safe_open(file, framework="pt") for file in files]
        except SafetensorError as error:
            raise DataError(f"{path}: not a safetensors file ({error})") from None
        self._of_name = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118  not a dict
        self.names = set(self._of_name)

    def __enter__(self) -> "_Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open:
            file.__exit__(None, None, None)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._of_name:
            raise DataError(f"{self._path.name} lacks {name}; shape {list(shape)} is needed")
        tensor = self._of_name[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise DataError(f"{self._path.name}: {name} has shape {list(tensor.shape)}; {list(shape)} is needed")
        return tensor


def _fill(place: Placement, get: Callable[[str, tuple[int, ...]], Tensor], absent: Iterable[str] = ()) -> None:
    """Reads the whole tensors of a placement and keeps this rank's part; `absent` names are zeros."""
    shapes = [place.shape(index) for index in range(len(place.names))]
    whole = [
        torch.zeros(shape, dtype=place.tensor.dtype) if name in absent else get(name, shape)
        for name, shape in zip(place.names, shapes, strict=True)
    ]
    place.tensor.copy_(place.local(torch.cat(whole)))


def _gather(places: Iterable[Placement]) -> dict[str, Tensor]:
    """Whole tensors by name, on the host; a collective call."""
    return {
        name: tensor.cpu().contiguous()
        for place in places
        for name, tensor in zip(place.names, place.whole(), strict=True)
    }


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Rank 0 writes aside and replaces, so the file is complete when it exists; the others wait for it."""
    if torch.distributed.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file({name: tensors[name].clone() for name in sorted(tensors)}, partial)
        partial.replace(path)
    torch.distributed.barrier()


def _read_adapter_config(path: Path) -> dict[str, Any]:
    """The keys that `load_adapter` uses, with their types checked."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    kinds = {"r": int, "lora_alpha": int | float, "lora_dropout": int | float, "target_modules": list}
    for key, kind in kinds.items():
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise DataError(f"{path.name}: {key} is missing or not of type {kind}")
    return config


def _initial(name: str, shape: tuple[int, ...], num_layers: int, seed: int) -> Tensor:
    """One whole tensor as `init_weights` describes it."""
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
