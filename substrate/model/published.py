"""The tensors of a published Nemotron-H checkpoint, from its configuration alone, and reading them piece by piece.

    backbone.embeddings.weight                          model.embeddings.weight                     (transformers)
    backbone.layers.1.mixer.experts.7.up_proj.weight    model.layers.1.mixer.experts.up_proj [7]    (transformers 5)

The left column is what nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B holds, and the name by which the rest of this package
knows a tensor. A file in the form of the right column is read as if it had the left one's names.

Reading is by slices: a rank copies from the memory-mapped file the rows and columns that it keeps, so that the host
never holds more than one of its own shards beside the model.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from substrate.errors import DataError
from substrate.model.config import ModelConfig

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def published_tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, safetensors dtype) of every tensor of the whole model, in the order of the layers.

    The recurrence's own parameters and the router's are float32 whatever the model's type (see `mamba.py`, `hybrid.py`).
    """
    hidden, dtype = config.hidden_size, SAFETENSORS_DTYPES[config.torch_dtype]
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    tensors["backbone.embeddings.weight"] = ((config.vocab_size, hidden), dtype)
    mixers = {"M": _mamba, "*": _attention, "E": _moe}
    for number, letter in enumerate(config.pattern):
        prefix = f"backbone.layers.{number}."
        tensors[f"{prefix}norm.weight"] = ((hidden,), dtype)
        for name, shape, kept in mixers[letter](config):
            tensors[f"{prefix}mixer.{name}"] = (shape, kept or dtype)
    tensors["backbone.norm_f.weight"] = ((hidden,), dtype)
    tensors["lm_head.weight"] = ((config.vocab_size, hidden), dtype)
    return tensors


class Checkpoint:
    """A base checkpoint on disk: one .safetensors file, or a folder with one or with the published shards."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where there is none, or for a file that is not safetensors."""
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise DataError(f"{path}: no such .safetensors file, nor a folder with one")
        self._path = path
        try:
            self._open = [safe_open(file, framework="pt") for file in files]
        except SafetensorError as error:
            raise DataError(f"{path}: not a safetensors file ({error})") from None
        self._file_of = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118  not a dict
        self._name_of = {_backbone(name): name for name in self._file_of}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open:
            file.__exit__(None, None, None)

    @property
    def names(self) -> set[str]:
        """Names in the file, with the prefix `backbone.`; stacked experts once."""
        return set(self._name_of)

    def read(self, name: str, shape: tuple[int, ...], rows: slice, columns: slice = slice(None)) -> Tensor:
        """A part of the whole tensor `name`. Raises DataError where it is missing or has another shape than `shape`."""
        expert, stacked = "", name
        if name not in self._name_of:
            expert, stacked = _stacked(name)
        if stacked not in self._name_of:
            raise DataError(f"{self._path.name} lacks {name}; shape {list(shape)} is needed")
        stored = self._name_of[stacked]
        part = self._file_of[stored].get_slice(stored)
        found = list(part.get_shape())
        if (found[1:] if expert else found) != list(shape) or (expert and int(expert) >= found[0]):
            raise DataError(f"{self._path.name}: {stored} has shape {found}; {list(shape)} is needed")
        index: list[Any] = [int(expert)] if expert else []
        index += [rows, columns] if len(shape) > 1 else [rows]
        return part[tuple(index)] if len(index) > 1 else part[index[0]]

    def check_names(self, config: ModelConfig) -> None:
        """Raises DataError naming the first tensor that the model has no place for."""
        expected = published_tensors(config)
        stacked = {_stacked(name)[1] for name in expected}
        if surplus := sorted(self.names - set(expected) - stacked):
            raise DataError(f"{self._path.name} holds {surplus[0]}, which model {config.name} has no place for")


def _backbone(name: str) -> str:
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


def _stacked(name: str) -> tuple[str, str]:
    """...experts.7.up_proj.weight -> ("7", "...experts.up_proj"); ("", name) for what is no routed expert."""
    before, found, rest = name.partition(".mixer.experts.")
    expert, _, part = rest.partition(".")
    return (expert, f"{before}{found}{part.removesuffix('.weight')}") if found else ("", name)


def _mamba(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    inner, bc, heads = config.mamba_inner_size, config.mamba_bc_size, config.mamba_num_heads
    channels = inner + 2 * bc
    yield "in_proj.weight", (inner + channels + heads, config.hidden_size), None
    yield "conv1d.weight", (channels, 1, config.mamba_conv_kernel), None
    yield "conv1d.bias", (channels,), None
    for name in ("A_log", "D", "dt_bias"):
        yield name, (heads,), "F32"
    yield "norm.weight", (inner,), None
    yield "out_proj.weight", (config.hidden_size, inner), None


def _attention(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    queries = config.num_attention_heads * config.attention_head_dim
    keys = config.num_query_groups * config.attention_head_dim
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{name}_proj.weight", (rows, config.hidden_size), None
    yield "o_proj.weight", (config.hidden_size, queries), None


def _moe(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    yield "gate.weight", (config.num_experts, config.hidden_size), None
    yield "gate.e_score_correction_bias", (config.num_experts,), "F32"
    sizes = {f"experts.{number}": config.moe_ffn_size for number in range(config.num_experts)}
    for name, size in {**sizes, "shared_experts": config.moe_shared_expert_ffn_size}.items():
        yield f"{name}.up_proj.weight", (size, config.hidden_size), None
        yield f"{name}.down_proj.weight", (config.hidden_size, size), None


def num_published_parameters(config: ModelConfig) -> int:
    """Elements of all tensors: 31.578 billion for Nemotron-3-Nano-30B-A3B."""
    return sum(math.prod(shape) for shape, _ in published_tensors(config).values())
