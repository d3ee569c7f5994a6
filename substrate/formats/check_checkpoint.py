"""Entry: compare the files of a published checkpoint with the model that a campaign configures. It reads no weights.

    python -m substrate.formats.check_checkpoint FOLDER MODEL

FOLDER    config.json, *.safetensors and, with several of them, model.safetensors.index.json
MODEL     JSON with the keys of hydra_conf/model/*.yaml

It reads the headers of the weight files, which takes seconds for 63 GB: every tensor of the model must be there in its
shape, and none besides. Sizes in config.json must be those of the model.
"""

import sys
from pathlib import Path
from typing import Any

from substrate.interface.command_line import Parser, read_json
from substrate.interface.errors import DataError, exit_code_of
from substrate.model.config import ModelConfig
from substrate.model.published import num_published_parameters, published_tensors
from substrate.model.tensors import Checkpoint

INDEX = "model.safetensors.index.json"
OURS_ALONE = ("architectures", "dtype", "time_step_min", "max_position_embeddings")
"""What `to_transformers` writes for transformers' sake, or what a campaign may choose below the checkpoint's value."""


def check(folder: Path, config: ModelConfig) -> str:
    """Returns a sentence about a checkpoint that fits the model. Raises DataError for the first thing that does not."""
    _check_config(folder, config)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    _check_index(folder, files)
    tensors = published_tensors(config)
    with Checkpoint(folder) as checkpoint:
        checkpoint.check_names(config)
        for name, (shape, _) in tensors.items():
            checkpoint.read(name, shape, slice(0, 0))  # compares the shape and reads no row
    billions = num_published_parameters(config) / 1e9
    return f"{len(tensors)} tensors of {billions:.3g} billion parameters in {len(files)} files, as model {config.name} has them"


def _check_config(folder: Path, config: ModelConfig) -> None:
    """Raises DataError for the first value of config.json that is not the configured model's. A missing key says nothing."""
    path = folder / "config.json"
    found = read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} is no JSON object; copy the published file again")
    for key, ours in config.to_transformers().items():
        if key not in OURS_ALONE and key in found and found[key] != ours:
            raise DataError(
                f"{path} has {key} {found[key]!r}, but model {config.name} has {ours!r}; choose the model=... that "
                "describes this checkpoint, or give the folder of the one that you configured"
            )


def _check_index(folder: Path, files: list[str]) -> None:
    """Raises DataError if the index names a file that is not there: a copy that was cut short."""
    path = folder / INDEX
    if not path.exists():
        return
    index: Any = read_json(path)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict):
        raise DataError(f"{path} has no weight_map; copy the published file again")
    if missing := sorted(set(map(str, named.values())) - set(files)):
        raise DataError(f"{folder} lacks {missing[0]}, which {INDEX} names; copy the published file again")


def main() -> None:
    """Reads the command line and prints what was found."""
    parser = Parser(prog="substrate.formats.check_checkpoint", description="Compare a checkpoint's files with a model.")
    parser.add_argument("folder", type=Path, help="folder of the published checkpoint")
    parser.add_argument("model", type=Path, help="JSON with the model's configuration")
    given = parser.parse_args()
    print(check(given.folder, ModelConfig.from_dict(read_json(given.model))))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
