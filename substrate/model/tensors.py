"""Moves tensors between files and ranks, in any layout: safetensors are read by slices and written in shards.

    backbone.layers.1.mixer.experts.7.up_proj.weight    model.layers.1.mixer.experts.up_proj [7]

These are the same tensor, as the published checkpoint and as transformers 5 names it; files of either form are read by
the first name. Relatives whose config.json ties the output layer to the embedding need no lm_head.weight, and tensors of
multi-token prediction (`mtp.*`), which this model does not have, are left out. A rank copies the rows and columns that
it keeps from the memory-mapped file, so beside the model the host never holds more than one of its shards. In writing,
one of the ranks that share a tensor gathers and writes it. No file is a pickle, because some come out of a sandbox.
"""

import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from substrate.interface.command_line import parse_object, read_small
from substrate.interface.errors import DataError
from substrate.interface.peft_config import published_name
from substrate.model.config import ModelConfig
from substrate.model.layout import Placement
from substrate.model.published import published_tensors

INDEX = "model.safetensors.index.json"
EMBEDDING, OUTPUT = "backbone.embeddings.weight", "lm_head.weight"
MAX_JSON_BYTES = 2**24  # of an index; that of the published 30B has 0.6 MB
SHARD_BYTES = 5 * 10**9  # most bytes of one file, and of host memory while writing


class Checkpoint:
    """A base checkpoint on disk: one .safetensors file, or a folder with one or with the shards that its index names."""

    def __init__(self, path: Path) -> None:
        """Opens the files. Raises DataError if there are none, if one is damaged, or if a tensor comes twice."""
        self._path = path
        self._open = [_opened(file) for file in _files(path)]
        self._file_of: dict[str, Any] = {}
        self._name_of: dict[str, str] = {}
        for file in self._open:
            for name in file.keys():  # noqa: SIM118  not a dict
                published = published_name(name).replace(
                    "backbone.embedding.", "backbone.embeddings."
                )  # for a while so
                if (first := self._name_of.setdefault(published, name)) != name or name in self._file_of:
                    raise DataError(f"{path} holds {first} and {name}, the same tensor; remove the files of one copy")
                self._file_of[name] = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open:
            file.__exit__(None, None, None)

    @property
    def names(self) -> set[str]:
        """The tensors' names, with the prefix `backbone.`; stacked experts have one name."""
        return set(self._name_of)

    @property
    def stored_names(self) -> set[str]:
        """The tensors' names as the files have them."""
        return set(self._file_of)

    @property
    def num_files(self) -> int:
        return len(self._open)

    @property
    def left_out(self) -> list[str]:
        """The tensors of multi-token prediction, which guess several tokens ahead and change no logit."""
        return sorted(name for name in self._name_of if name.startswith("mtp."))

    def _is_tied(self) -> bool:
        """Whether config.json beside the files says that the output layer is the embedding."""
        path = (self._path if self._path.is_dir() else self._path.parent) / "config.json"
        try:
            is_there = os.path.lexists(path)
            return is_there and parse_object(read_small(path, MAX_JSON_BYTES)).get("tie_word_embeddings") is True
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}; take the published file again") from None

    def read(self, name: str, shape: tuple[int, ...], rows: slice, columns: slice = slice(None)) -> Tensor:
        """Returns a part of the whole tensor `name`. Raises DataError if it is missing or is not of `shape`."""
        expert, stacked = "", name
        if name not in self._name_of:
            expert, stacked = _stacked(EMBEDDING if name == OUTPUT and self._is_tied() else name)
        if stacked not in self._name_of:
            tied = "; or config.json beside it with tie_word_embeddings" if name == OUTPUT else ""
            raise DataError(f"{self._path.name} lacks {name}; a tensor of shape {list(shape)} is needed{tied}")
        stored = self._name_of[stacked]
        part = self._file_of[stored].get_slice(stored)
        found = list(part.get_shape())
        if (found[1:] if expert else found) != list(shape) or (expert and int(expert) >= found[0]):
            raise DataError(f"{self._path.name}: {stored} has shape {found}; {list(shape)} is needed")
        index: list[Any] = [int(expert)] if expert else []
        index += [rows, columns] if len(shape) > 1 else [rows]
        return part[tuple(index)] if len(index) > 1 else part[index[0]]

    def check_names(self, config: ModelConfig) -> None:
        """Raises DataError that names the first tensor that the model does not have."""
        expected = published_tensors(config)
        stacked = {_stacked(name)[1] for name in expected}
        if surplus := sorted(self.names - set(expected) - stacked - set(self.left_out)):
            raise DataError(
                f"{self._path.name} holds {surplus[0]}, which model {config.name} does not have; check file and model"
            )


def _files(path: Path) -> list[Path]:
    """Returns the files of a checkpoint. Raises DataError if there are none, or if one that the index names is missing."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{path} is neither a .safetensors file nor a folder with one; give one of the two")
    index = path / INDEX
    if not path.is_dir() or not os.path.lexists(index):
        return files
    try:
        named = sorted(set(parse_object(read_small(index, MAX_JSON_BYTES))["weight_map"].values()))
        if not named or not all(isinstance(each, str) and Path(each).name == each for each in named):
            raise ValueError("its weight_map must name files of its own folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is no index of shards ({error}); take the published file again") from None
    for each in named:
        if not (path / each).is_file():
            raise DataError(f"{path} lacks {each}, which its index names; copy the published file again")
    return [path / each for each in named]


def _opened(file: Path) -> Any:
    """Opens one file. Raises DataError if it is not of the safetensors format."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as head:
            if head.read(23) == b"version https://git-lfs":
                raise DataError(f"{file} is a pointer of Git LFS; run `git lfs pull` in its repository") from None
        raise DataError(f"{file} is not a safetensors file ({error}); copy or make it again") from None


def fill(place: Placement, checkpoint: Checkpoint, absent: Container[str] = ()) -> None:
    """Copies this rank's part of a placement from a file, slice by slice; `absent` names become zeros."""
    for index, rows, columns, local in place.pieces():
        if place.names[index] in absent:
            place.tensor[local].zero_()
        else:
            place.tensor[local].copy_(checkpoint.read(place.names[index], place.shape(index), rows, columns))


def owned(places: Iterable[Placement], groups: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields whole tensors by name, on the host, each on one of the ranks that hold a part. A collective call."""
    for place in places:
        replicas = groups.expt_dp if place.routed else groups.dp_cp
        whole = place.whole()
        # Of its group, only the first rank yields the tensor, whether it is cut or replicated there.
        if replicas.rank() == 0 and place.group.rank() == 0:
            yield from ((name, tensor.cpu().clone()) for name, tensor in zip(place.names, whole, strict=True))


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, prefix: str) -> dict[str, list[str]]:
    """Writes this rank's tensors as files of at most SHARD_BYTES, flushed to disk. Returns file -> tensor names."""
    files: dict[str, list[str]] = {}
    for number, shard in enumerate(shards(tensors)):
        name = f"{prefix}-{dist.get_rank():05d}-{number:05d}.safetensors"
        save_file(shard, folder / name)
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        files[name] = list(shard)
    return files


def collect(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Gathers all ranks' items on rank 0; the others get an empty dict. A collective call."""
    mine = dict(items)
    is_first = torch.distributed.get_rank() == 0
    parts: list[dict[str, Any]] | None = [{}] * torch.distributed.get_world_size() if is_first else None
    torch.distributed.gather_object(mine, parts)
    return {name: item for part in parts or [] for name, item in part.items()}


def shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Groups the tensors in order into shards of at most SHARD_BYTES."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _stacked(name: str) -> tuple[str, str]:
    """...experts.7.up_proj.weight -> ("7", "...experts.up_proj"); ("", name) for anything but a routed expert."""
    before, found, rest = name.partition(".mixer.experts.")
    expert, _, part = rest.partition(".")
    return (expert, f"{before}{found}{part.removesuffix('.weight')}") if found else ("", name)
