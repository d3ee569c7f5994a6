"""Prove an adapter's weights file before it is packed or merged: whole, finite, of the shapes that its configuration and a model need.

Safetensors is 8 bytes with the length of a JSON header, the header (name -> dtype, shape, place), and the data. What is
found instead in practice: nothing, half a download, a pointer of Git LFS, a web page with an error, a pickle.
"""

import os
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from substrate.interface.command_line import open_plain, parse_object
from substrate.interface.errors import DataError
from substrate.interface.peft_config import ADAPTER_WEIGHTS, TARGETS, PeftConfig, published_name, target_of

if TYPE_CHECKING:
    from substrate.model import ModelConfig

# All modules of the published 30B, its 5,888 experts' matrices included, need 1.9 MB; JSON of this length takes a second to parse.
MAX_HEADER_BYTES = 4 * 2**20
DTYPES = ("F32", "F16", "BF16")
FORMS = {
    b"version https://git-lfs": "a pointer of Git LFS; run `git lfs pull` in its repository",
    b"PK\x03\x04": "a pickle of torch.save; save the adapter with safe_serialization=True",
    b"\x80": "a pickle; save the adapter with safe_serialization=True",
    b"<": "a web page; download the file itself",
}
MODULE = re.compile(r"(?:(?:backbone|model)\.layers\.([0-9]+)\.mixer\.(?P<target>.+)|lm_head)")
# Targets that write to the residual stream, so that their rows are as many as the hidden size; of the others it is the columns.
WRITES = ("o_proj", "out_proj", "shared_experts.down_proj", "experts.down_proj")


@dataclass(frozen=True)
class Proved:
    """What a proved weights file holds."""

    shapes: Mapping[str, tuple[int, int]]  # module, as the file names it -> shape of the weight that it changes
    zero: tuple[str, ...] = ()  # the modules whose A or B is zero everywhere, so that nothing is added there

    def counts(self) -> dict[str, int]:
        """Returns the number of modules of each target."""
        return dict(Counter(target_of(module) for module in self.shapes))

    def in_zeros(self) -> str:
        """Returns of which targets how many modules change nothing, such as "v_proj 6 of 6, up_proj 2 of 48"; empty if all do."""
        zero, all_of = Counter(map(target_of, self.zero)), self.counts()
        return ", ".join(f"{target} {number} of {all_of[target]}" for target, number in zero.items())

    def check_model(self, model: "ModelConfig") -> None:
        """Raises DataError for a module that the model lacks or that has another shape there."""
        from substrate.model.published import published_tensors

        published = published_tensors(model)
        for module, found in self.shapes.items():
            name = f"{published_name(module)}.weight"
            if name not in published:
                raise DataError(
                    f"{ADAPTER_WEIGHTS} holds {module}, which model {model.name} does not have; check adapter and --model"
                )
            if found != published[name][0]:
                raise DataError(
                    f"{ADAPTER_WEIGHTS}: the pair of {module} fits a weight of shape {list(found)}, but model {model.name} "
                    f"has {list(published[name][0])}; it is another model's adapter: check adapter and --model"
                )


def prove(folder: Path, config: PeftConfig) -> Proved:
    """Opens the weights file beside a configuration and reads every tensor. Raises DataError for the first fault."""
    path = folder / ADAPTER_WEIGHTS
    entries = _entries(path)
    shapes, zero = {}, []
    with _opened(path) as file:
        for module in config.modules_in(entries):
            names = [f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB"]
            for name in names:
                _check_entry(path, name, entries[name], config.rank_of(module), config.path)
            shapes[module] = (entries[names[1]]["shape"][0], entries[names[0]]["shape"][1])
            scales = (1.0, config.scale_of(module))  # engines multiply B
            pairs = list(zip(names, scales, strict=True))
            if not all([_is_used(path, name, file.get_tensor(name), scale) for name, scale in pairs]):
                zero.append(module)
    _check_family(path, shapes)
    return Proved(shapes, tuple(zero))


def _entries(path: Path) -> dict[str, Any]:
    """Returns the header: tensor name -> dtype, shape, data_offsets. Raises DataError unless the file is as long as it says."""
    if not path.is_file():
        raise DataError(_what_instead(path))
    try:
        with open_plain(path) as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(64)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
            if not 0 < length <= size - 8:
                raise DataError(f"{path} {_form_of(start, size)}")
            if length > MAX_HEADER_BYTES:
                raise DataError(
                    f"{path} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read, twice what an adapter of all "
                    "modules needs: save the adapter alone"
                )
            file.seek(8)
            header = parse_object(file.read(length).decode())
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        promised = 8 + length + max(ends, default=0)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give a readable file") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"the header of {path} is damaged ({error!r}); save or copy the file again") from None
    if size != promised:
        raise DataError(
            f"{path} has {size} bytes, but its header needs {promised}; it is cut or damaged: copy it again"
        )
    return header


def _form_of(start: bytes, size: int) -> str:
    """Says what a file is that does not begin with the length of a header, and what to do."""
    if known := [what for form, what in FORMS.items() if start.startswith(form)]:
        return f"is {known[0]}"
    what = f"has {size} bytes, which hold no header" if size else "is empty"
    return f"{what}; it is cut or no safetensors file: save or copy it again"


def _what_instead(path: Path) -> str:
    """Says why there is no weights file, in the folder or beside it."""
    if path.is_dir():
        return f"{path} is a folder, and no file; give the adapter's own folder, saved again"
    if path.exists() or path.is_symlink():
        return f"{path} is {'no plain file' if path.exists() else 'a link to nothing'}; put the adapter's weights there"
    others = sorted(other.name for other in path.parent.glob("*") if other.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if others:
        return f"{path.parent} lacks {path.name} and has {others[0]}, a pickle; save it with safe_serialization=True"
    if shards := sorted(other.name for other in path.parent.glob("*.safetensors")):
        return f"{path.parent} lacks {path.name} and has {shards[0]}; the weights must be one file of that name"
    return f"{path} is not there; give a folder with adapter_config.json and {path.name}"


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{path} is no sound safetensors file ({error}); save or copy it again") from None


def _check_entry(path: Path, name: str, entry: Mapping[str, Any], rank: int, config: Path) -> None:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if dtype not in DTYPES:
        raise DataError(f"{path}: {name} has the type {dtype}; save it as one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) != 2 or min(shape) < 1:
        raise DataError(f"{path}: {name} has shape {shape}; a factor has two dimensions: save the adapter again")
    found = shape[0] if ".lora_A." in name else shape[1]
    if found != rank:
        raise DataError(
            f"{path}: {name} has shape {shape}, so rank {found}, but {config} says rank {rank}; one of the two files is "
            "another adapter's: copy both from one place"
        )


def _is_used(path: Path, name: str, tensor: Any, scale: float) -> bool:
    """Whether a tensor has a value that is not zero. Raises DataError for NaN and infinity, also where the scale makes them."""
    if num_bad := int((~tensor.isfinite()).sum()):
        raise DataError(
            f"{path}: {num_bad} of {tensor.numel()} values of {name} are NaN or infinity; the training diverged or the "
            "file is damaged: take an earlier checkpoint"
        )
    scaled = tensor.float() * scale
    if not scaled.isfinite().all():
        raise DataError(f"{path}: {name} times its scale {scale:g} is infinite in float32; lower lora_alpha")
    return bool(scaled.any())


def _check_family(path: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises DataError for a module that no model of this family has, and for modules that are not of one model."""
    kinds: dict[str, str] = {}
    first: dict[str, tuple[str, tuple[int, int]]] = {}
    hidden: dict[int, str] = {}
    if len({published_name(module) for module in shapes}) < len(shapes):
        raise DataError(f"{path} names modules both as backbone. and as model.; save the adapter again")
    for module, shape in shapes.items():
        match, target = MODULE.fullmatch(module), target_of(module)
        if match is None or target not in TARGETS:
            raise DataError(
                f"{path} holds {module}, which the model lacks; its modules are {', '.join(TARGETS)}: leave others out"
            )
        if match[1] and kinds.setdefault(match[1], TARGETS[target]) != TARGETS[target]:
            raise DataError(
                f"{path} holds {module}, but its other pairs make layer {match[1]} one of kind {kinds[match[1]]}; it is "
                "no adapter of one model: save it again"
            )
        before, known = first.setdefault(target, (module, shape))
        hidden.setdefault(shape[0] if target in WRITES else shape[1], module)
        if shape != known or len(hidden) > 1:
            other = before if shape != known else next(iter(hidden.values()))
            raise DataError(
                f"{path}: {module} changes a weight of shape {list(shape)}, which does not fit {other} of shape "
                f"{list(shapes[other])}; it is no adapter of one model: save it again"
            )
