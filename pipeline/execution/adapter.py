"""Check a trial's LoRA adapter tensor by tensor, and keep a canonical copy of it: the only thing that leaves a trial and is judged.

This module parses the safetensors format itself (8 bytes of length, a JSON header, raw little-endian data). It uses no pickle and no
code from the image. It never copies the trial's bytes: it writes a new file from the checked tensors, with sorted names and without
metadata. The digest of an adapter is

    sha256( canonical safetensors bytes || canonical JSON of the configuration )
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.campaign import canonical, strict_json
from pipeline.campaign.errors import NotFound, TrialFailed
from pipeline.campaign.files import write_file
from pipeline.sandbox.bubblewrap import open_output

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONFIG_KEYS = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "bias",
    "task_type",
    "base_model_name_or_path",
}
MAX_HEADER_BYTES = 16 * 2**20
MAX_CONFIG_BYTES = 64 * 2**10
FLOAT32 = np.dtype("<f4")
Tensors = Mapping[str, np.ndarray]


def check_and_keep(
    out_dir: Path, shapes: Mapping[str, tuple[int, ...]], lora: Mapping[str, Any], keep_dir: Path
) -> str:
    """Check `out_dir`/adapter against the recipe, write a canonical copy into `keep_dir`, and return its digest.

    shapes: every tensor's name and shape (model_size.adapter_shapes). lora: the recipe's rank, alpha and dropout, and as targets what
    model_size.peft_modules returns. Raises TrialFailed (bad_output), which names the first thing that is wrong.
    """
    tensors = read_tensors(out_dir, shapes)
    config = read_config(out_dir, lora)
    weights, text = canonical_tensors(tensors), canonical_config(config)
    write_file(keep_dir / WEIGHTS, weights)
    write_file(keep_dir / CONFIG, text)
    return digest_of(weights, text)


def kept_digest(keep_dir: Path) -> str:
    """Return the digest of an adapter that `check_and_keep` wrote; its files are canonical already."""
    return digest_of((keep_dir / WEIGHTS).read_bytes(), (keep_dir / CONFIG).read_bytes())


def digest_of(weights: bytes, config: bytes) -> str:
    """Return the digest of an adapter from the canonical bytes of its two files."""
    return hashlib.sha256(weights + config).hexdigest()


def read_tensors(out_dir: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read a trial's tensors. Raises TrialFailed (bad_output) unless names and shapes are the expected ones and all values finite float32."""
    with _open(out_dir, WEIGHTS) as file:
        header = _read_header(file)
        missing, surplus = sorted(set(shapes) - set(header)), sorted(set(header) - set(shapes))
        if missing or surplus:
            raise _bad(
                f"tensor {missing[0]} is missing"
                if missing
                else f"tensor {surplus[0][:200]!r} does not belong to this recipe"
            )
        expected_bytes = sum(int(np.prod(shape)) * FLOAT32.itemsize for shape in shapes.values())
        data = file.read(expected_bytes + 1)
    if len(data) != expected_bytes:
        raise _bad(f"{WEIGHTS} holds {len(data)} bytes of data or more, but its shapes need {expected_bytes}")
    tensors, ranges = {}, []
    for name, shape in shapes.items():
        entry = header[name]
        if not isinstance(entry, dict) or entry.get("dtype") != "F32" or entry.get("shape") != list(shape):
            raise _bad(f"tensor {name} is {str(entry)[:200]}, but must be F32 of shape {list(shape)}")
        begin, end = _offsets(name, entry, int(np.prod(shape)) * FLOAT32.itemsize, expected_bytes)
        ranges.append((begin, end))
        tensors[name] = np.frombuffer(data[begin:end], FLOAT32).reshape(shape)
        if not np.isfinite(tensors[name]).all():
            raise _bad(f"tensor {name} holds NaN or infinity")
    ranges.sort()
    if any(end != begin for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False)):
        raise _bad("the tensors overlap or leave gaps")
    return tensors


def read_config(out_dir: Path, lora: Mapping[str, Any]) -> dict[str, Any]:
    """Read a trial's adapter configuration. Raises TrialFailed (bad_output) unless it is strict JSON and agrees with the recipe."""
    with _open(out_dir, CONFIG) as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    try:
        config = strict_json.read(content, max_bytes=MAX_CONFIG_BYTES)
    except strict_json.BadJson as error:
        raise _bad(f"{CONFIG} is not strict JSON ({error})") from error
    if not isinstance(config, dict) or set(config) != CONFIG_KEYS:
        other = sorted(set(config) ^ CONFIG_KEYS)[0][:100] if isinstance(config, dict) else "the object"
        raise _bad(
            f"{CONFIG} must have exactly the keys {', '.join(sorted(CONFIG_KEYS))}; {other} is missing or not one of them"
        )
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": lora["rank"], "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"], "target_modules": sorted(lora["targets"]),
    }  # fmt: skip
    for key, value in expected.items():
        if config[key] != value or type(config[key]) is not type(value) and key != "lora_dropout":
            raise _bad(f"{CONFIG}: {key} is {repr(config[key])[:200]}, but the recipe has {value!r}")
    if not isinstance(config["base_model_name_or_path"], str):
        raise _bad(f"{CONFIG}: base_model_name_or_path is not a string")
    return {**config, **expected}  # the recipe's spelling, so that a dropout of 0 and of 0.0 give one digest


def canonical_tensors(tensors: Tensors) -> bytes:
    """Return safetensors bytes with sorted names, float32 data, contiguous offsets and no metadata."""
    header, offset = {}, 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = canonical.encoded(header)
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    return struct.pack("<Q", len(text)) + text + b"".join(tensors[name].tobytes() for name in sorted(tensors))


def canonical_config(config: Mapping[str, Any]) -> bytes:
    """Return sorted ASCII JSON. The encoding of records does not fit: it allows no floats and no unpaired surrogates."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _read_header(file: IO[bytes]) -> dict[str, Any]:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
    if length > MAX_HEADER_BYTES:
        raise _bad(f"{WEIGHTS} has no readable header")
    try:
        header = strict_json.read(file.read(length), max_bytes=MAX_HEADER_BYTES)
    except strict_json.BadJson as error:
        raise _bad(f"the header of {WEIGHTS} is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(f"the header of {WEIGHTS} is not an object")
    header.pop("__metadata__", None)
    return header


def _offsets(name: str, entry: Mapping[str, Any], size: int, limit: int) -> tuple[int, int]:
    offsets = entry.get("data_offsets")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(value) is int for value in offsets)
        or not 0 <= offsets[0] <= offsets[1] <= limit
        or offsets[1] - offsets[0] != size
    ):
        raise _bad(f"tensor {name} has data_offsets {str(offsets)[:100]}, which do not fit its shape")
    return offsets[0], offsets[1]


def _open(out_dir: Path, name: str) -> IO[bytes]:
    try:
        return open_output(out_dir, f"adapter/{name}")
    except NotFound as error:
        raise _bad(f"the trial did not write adapter/{name}") from error


def _bad(what: str) -> TrialFailed:
    return TrialFailed("bad_output", what)
