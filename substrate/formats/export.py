"""Export weights: the competition's archive, or a merged model for transformers, vLLM and the like.

    python -m substrate.formats.export submission ADAPTER submission.zip
    python -m substrate.formats.export merge ADAPTER --base BASE --model model.yaml OUT

`submission` packs an adapter as a worker publishes it (published names, PEFT's configuration). It refuses what the
competition would refuse: a rank above 32, an archive above 1.5 GB, targets that are not a list. `merge` adds the adapter
to its base, W + alpha / r B A in float32, and writes the model in the published form: shards of at most 5 GB, their
index and config.json. It handles one tensor at a time on a CPU, so memory does not grow with the model.

Limits: NVIDIA Nemotron Model Reasoning Challenge, rules of submission (2026).
"""

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from substrate.interface.command_line import Parser, read_text, write_text
from substrate.interface.errors import DataError, UsageError, exit_code_of

if TYPE_CHECKING:
    from torch import Tensor

    from substrate.model import ModelConfig
    from substrate.model.tensors import Checkpoint


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MAX_RANK = 32
MAX_ARCHIVE_BYTES = 1_500_000_000


def submission(adapter: Path, archive: Path) -> int:
    """Writes the archive and returns its size in bytes. Equal files give equal bytes.

    The archive is not compressed, because weights do not shrink. Raises DataError, and writes nothing, for an adapter
    that the competition would refuse.
    """
    config = _adapter_config(adapter)
    if config["r"] > MAX_RANK:
        raise DataError(
            f"{adapter} has rank {config['r']}; the competition takes at most {MAX_RANK}: train with a lower recipe.lora.rank"
        )
    size = sum((adapter / name).stat().st_size for name in ADAPTER_FILES)
    if size > MAX_ARCHIVE_BYTES:
        raise DataError(
            f"{adapter} has {size} bytes; the competition takes at most {MAX_ARCHIVE_BYTES}: leave out routed experts"
        )
    partial = archive.with_name(archive.name + ".partial")
    with zipfile.ZipFile(partial, "w") as file:
        for name in ADAPTER_FILES:
            entry = zipfile.ZipInfo(name)  # its default date is 1980, so equal adapters give equal archives
            entry.external_attr = 0o644 << 16
            with file.open(entry, "w") as target, (adapter / name).open("rb") as source:
                while block := source.read(1 << 20):
                    target.write(block)
    partial.replace(archive)
    return archive.stat().st_size


def merge(adapter: Path, base: Path, model: dict[str, Any], out: Path) -> None:
    """Writes base + adapter into the folder `out`. Raises DataError that names a missing, surplus or misshapen tensor."""
    from safetensors.torch import save_file

    from substrate.model import ModelConfig
    from substrate.model.tensors import Checkpoint, shards

    config, pairs = ModelConfig.from_dict(model), _adapter_config(adapter)
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    with Checkpoint(base) as weights, Checkpoint(adapter / ADAPTER_FILES[1]) as factors:
        weights.check_names(config)
        merged = _merged(config, weights, factors, pairs["r"], pairs["lora_alpha"] / pairs["r"])
        for number, shard in enumerate(shards(merged)):
            file = f"model-{number:05d}.safetensors"
            save_file(shard, out / file, {"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(out / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    write_text(out / "config.json", json.dumps(config.to_transformers(), indent=2) + "\n")


def _merged(
    config: "ModelConfig", weights: "Checkpoint", factors: "Checkpoint", rank: int, scale: float
) -> Iterator[tuple[str, "Tensor"]]:
    from substrate.model.lora import adapter_name
    from substrate.model.published import published_tensors

    used: set[str] = set()
    for name, (shape, _) in published_tensors(config).items():
        tensor = weights.read(name, shape, slice(None))
        name_A, name_B = adapter_name(name, "A"), adapter_name(name, "B")
        if name_A in factors.names:
            A = factors.read(name_A, (rank, shape[1]), slice(None))
            B = factors.read(name_B, (shape[0], rank), slice(None))
            tensor = (tensor.float() + scale * B.float() @ A.float()).to(tensor.dtype)
            used |= {name_A, name_B}
        yield name, tensor
    if surplus := sorted(factors.names - used):
        raise DataError(f"the adapter holds {surplus[0]}, which model {config.name} does not have; check --model")


def _adapter_config(adapter: Path) -> dict[str, Any]:
    """Returns the configuration of an adapter. Raises DataError if it is wrong or one of the two files is missing."""
    path = adapter / ADAPTER_FILES[0]
    try:
        config: dict[str, Any] = json.loads(read_text(path))
        sound = type(config["r"]) is int and config["lora_alpha"] > 0 and isinstance(config["target_modules"], list)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: {error!r}; it must be JSON, and r, lora_alpha and target_modules are needed"
        ) from None
    if not sound:
        raise DataError(f"{path} has a wrong value; r must be an integer, lora_alpha above 0, target_modules a list")
    if not (adapter / ADAPTER_FILES[1]).is_file():
        raise DataError(f"{adapter} lacks {ADAPTER_FILES[1]}; give a folder with {' and '.join(ADAPTER_FILES)}")
    return config


def _read_model(path: Path) -> dict[str, Any]:
    import yaml

    try:
        model = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {error}; a file of hydra_conf/model is needed") from None
    if not isinstance(model, dict):
        raise UsageError(f"{path} is not a mapping; a file of hydra_conf/model is needed")
    return model.get("model", model)  # a campaign's frozen config.yaml has the key `model`


def main() -> None:
    """Reads the command line and writes the archive or the model."""
    parser = Parser(
        prog="substrate.formats.export", description="Pack an adapter for the competition, or merge it into its base."
    )
    acts = parser.add_subparsers(dest="act", required=True, parser_class=Parser)
    pack = acts.add_parser("submission", help="pack an adapter as submission.zip")
    pack.add_argument("adapter", type=Path, help="folder with adapter_config.json and adapter_model.safetensors")
    pack.add_argument("out", type=Path, help="archive to write")
    whole = acts.add_parser("merge", help="write base + adapter as a model for transformers")
    whole.add_argument("adapter", type=Path, help="folder with adapter_config.json and adapter_model.safetensors")
    whole.add_argument("out", type=Path, help="folder to write")
    whole.add_argument(
        "--base", type=Path, required=True, help="a .safetensors file, or a folder of the published shards"
    )
    whole.add_argument("--model", type=Path, required=True, help="hydra_conf/model/*.yaml, or a campaign's config.yaml")
    arguments = parser.parse_args()
    if arguments.act == "submission":
        size = submission(arguments.adapter, arguments.out)
        print(f"{arguments.out}: {size} bytes of at most {MAX_ARCHIVE_BYTES}")
    else:
        merge(arguments.adapter, arguments.base, _read_model(arguments.model), arguments.out)
        print(f"{arguments.out}: transformers.AutoModelForCausalLM.from_pretrained({str(arguments.out)!r}) reads it")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
