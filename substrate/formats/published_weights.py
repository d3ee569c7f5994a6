"""Entry: check that a folder's weights are those of a model, by config.json, names and shapes; no weight is read.

    python -m substrate.formats.published_weights FOLDER --model hydra_conf/model/nemotron3_nano_30b.yaml
    6243 tensors in 13 files; an output layer of its own; 0 of multi-token prediction left out

The 6,243 tensors of the 30B take a tenth of a second of CPU beside the imports, so that `init` knows it before it hashes
63 GB and long before a job reads them.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from substrate.formats.published_files import check_model, read_model
from substrate.interface.command_line import Parser, read_json
from substrate.interface.errors import DataError, SubstrateError, exit_code_of


def check(folder: Path, model: dict[str, object]) -> str:
    """Returns what was found in one line. model: the values of hydra_conf/model.

    Raises DataError that names the first key of config.json that differs, the first missing, surplus or misshapen tensor, or says what is
    wrong with a file.
    """
    from substrate.model import ModelConfig
    from substrate.model.published import published_tensors
    from substrate.model.tensors import OUTPUT, Checkpoint

    config = ModelConfig.from_dict(model)
    check_model(folder, config.to_transformers())
    with Checkpoint(folder) as checkpoint:
        checkpoint.check_names(config)
        for name, (shape, _) in published_tensors(config).items():
            checkpoint.read(name, shape, slice(0, 0))
        layer = "an output layer of its own" if OUTPUT in checkpoint.names else "an output layer tied to the embedding"
        return (
            f"{len(checkpoint.stored_names)} tensors in {checkpoint.num_files} files; {layer}; "
            f"{len(checkpoint.left_out)} of multi-token prediction left out"
        )


def check_or_name(folder: Path, model: dict[str, object], known: Mapping[str, dict[str, object]]) -> str:
    """Returns as `check`. known: what chooses a model, such as `experiment=nano_mini` -> its values; a refusal names those that fit."""
    try:
        return check(folder, model)
    except DataError as error:
        fitting = [words for words, other in known.items() if other != model and _fits(folder, other)]
        if not fitting:
            raise
        what = str(error).rpartition("; ")[0] or str(error)
        cure = f"it is a checkpoint for {' or '.join(fitting)}: choose that, or name another folder"
        raise DataError(f"{what}; {cure}") from None


def _fits(folder: Path, model: dict[str, object]) -> bool:
    try:
        return bool(check(folder, model))
    except SubstrateError:
        return False


def main() -> None:
    """Reads the command line and prints what was found."""
    parser = Parser(
        prog="substrate.formats.published_weights", description="Check names and shapes of published weights."
    )
    parser.add_argument("folder", type=Path, help="folder of the published checkpoint")
    parser.add_argument("--model", type=Path, required=True, help="a file of hydra_conf/model, or its values as JSON")
    parser.add_argument(
        "--known", type=Path, help="JSON of other models, by what chooses them; a refusal names those that fit"
    )
    arguments = parser.parse_args()
    known = read_json(arguments.known) if arguments.known else {}
    print(check_or_name(arguments.folder, read_model(arguments.model), known))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
