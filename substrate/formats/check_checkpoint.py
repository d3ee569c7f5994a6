"""Entry: compare the files of a published checkpoint with the model that a campaign configures. It reads no weights.

    python -m substrate.formats.check_checkpoint FOLDER MODEL

FOLDER    config.json, *.safetensors and, with several of them, model.safetensors.index.json
MODEL     JSON with the keys of hydra_conf/model/*.yaml

It reads the headers of the weight files, which takes seconds for 63 GB: every tensor of the model must be there in its
shape, and none besides. Sizes in config.json must be those of the model.
"""

import sys
from pathlib import Path

from substrate.formats.published_files import check_model
from substrate.interface.command_line import Parser, read_json
from substrate.interface.errors import exit_code_of
from substrate.model.config import ModelConfig
from substrate.model.published import num_published_parameters, published_tensors
from substrate.model.tensors import Checkpoint


def check(folder: Path, config: ModelConfig) -> str:
    """Returns a sentence about a checkpoint that fits the model. Raises DataError for the first thing that does not."""
    check_model(folder, config.to_transformers())
    files = list(folder.glob("*.safetensors"))
    tensors = published_tensors(config)
    with Checkpoint(folder) as checkpoint:
        checkpoint.check_names(config)
        for name, (shape, _) in tensors.items():
            checkpoint.read(name, shape, slice(0, 0))  # compares the shape and reads no row
    billions = num_published_parameters(config) / 1e9
    return f"{len(tensors)} tensors of {billions:.3g} billion parameters in {len(files)} files, as model {config.name} has them"


def main() -> None:
    """Reads the command line and prints what was found."""
    parser = Parser(prog="substrate.formats.check_checkpoint", description="Compare a checkpoint's files with a model.")
    parser.add_argument("folder", type=Path, help="folder of the published checkpoint")
    parser.add_argument("model", type=Path, help="JSON with the model's configuration")
    given = parser.parse_args()
    print(check(given.folder, ModelConfig.from_dict(read_json(given.model))))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
