"""Export weights: the competition's archive, or a merged model for transformers, vLLM and the like.

    python -m substrate.formats.export submission ADAPTER submission.zip [--model model.yaml]
    python -m substrate.formats.export merge ADAPTER --base BASE --model model.yaml OUT

`submission` packs an adapter as a worker publishes it (published names, PEFT's configuration). It reads every value
first (`adapter_file.py`) and refuses what would waste a submission: a rank above 32, an archive above 1.5 GB, targets
that are not a list, a target without a tensor, an adapter that changes nothing, and scales that vLLM would not apply.
`merge` adds the adapter to its base, W + scale B A in float32 with PEFT's scales, and writes the model in the published
form: shards of at most 5 GB, their index and config.json, and the tokenizer and generation files that lie beside the
base. It handles one tensor at a time on a CPU, so memory does not grow with the model.

Limits: NVIDIA Nemotron Model Reasoning Challenge, rules of submission (2026).
"""

import json
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from substrate.formats.adapter_file import Proved, prove
from substrate.formats.published_files import read_model, settings_of
from substrate.interface.command_line import Parser, as_umask_says, open_plain, write_text
from substrate.interface.errors import DataError, exit_code_of
from substrate.interface.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PeftConfig, published_name

if TYPE_CHECKING:
    from torch import Tensor

    from substrate.model import ModelConfig
    from substrate.model.tensors import Checkpoint


BESIDE = frozenset(
    ("added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt", "special_tokens_map.json",
     "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
)  # fmt: skip
"""Files beside a model's weights that its users read too, and that an adapter does not change."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json, by which others' engines stop
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
MAX_RANK = 32
MAX_ARCHIVE_BYTES = 1_500_000_000


def submission(adapter: Path, archive: Path, model: dict[str, Any] | None = None) -> int:
    """Writes the archive and returns its size in bytes. Equal files give equal bytes.

    model: as in `proved_for_submission`. The archive is not compressed, because weights do not shrink. Raises DataError,
    and writes nothing, for an adapter that the competition would refuse or that would waste a submission.
    """
    proved_for_submission(adapter, model)
    return _pack(adapter, archive)


def proved_for_submission(adapter: Path, model: dict[str, Any] | None = None) -> Proved:
    """Returns what is in an adapter that may be submitted. Raises DataError for any other.

    model: the values of hydra_conf/model/*.yaml, if shapes and layers are to be compared with a model.
    """
    config = PeftConfig.read(adapter)
    _check_limits(adapter, config)
    proved = prove(adapter, config)
    _check_served(config, proved)
    if model is not None:
        from substrate.model import ModelConfig

        proved.check_model(ModelConfig.from_dict(model))
    return proved


def _pack(adapter: Path, archive: Path, model: Path | None = None) -> int:
    partial = archive.with_name(f".{archive.name}.{os.getpid()}.part")
    _refuse_input(archive, [*(adapter / name for name in ADAPTER_FILES), *([model] if model else [])])
    try:
        if archive.exists() and not archive.is_dir():
            if not archive.is_file():
                raise DataError(f"{archive} is a pipe or device, and no file; give a new file in a writable folder")
            if archive.suffix != ".zip" and archive.absolute().parent.resolve().is_relative_to(adapter.resolve()):
                raise DataError(f"{archive} is a file of the adapter's folder; give a new file, such as submission.zip")
        with zipfile.ZipFile(partial, "w") as file:
            for name in ADAPTER_FILES:
                entry = zipfile.ZipInfo(name)  # its default date is 1980, so equal adapters give equal archives
                entry.external_attr = 0o644 << 16
                with file.open(entry, "w") as target, (adapter / name).open("rb") as source:
                    while block := source.read(1 << 20):
                        target.write(block)
        partial.replace(archive)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise DataError(f"cannot write {archive}: {error.strerror}; give a new file in a writable folder") from None
    return archive.stat().st_size


def _refuse_input(out: Path, inputs: Iterable[Path]) -> None:
    """Raises DataError if writing to `out`, a file or the files of a folder, could overwrite an input, by whatever link."""
    try:
        read = {(each.stat().st_dev, each.stat().st_ino) for each in inputs if each.exists()}
        held = [each for each in out.iterdir() if each.is_file()] if out.is_dir() else []
        for each in [out, *held]:
            if each.exists() and (each.stat().st_dev, each.stat().st_ino) in read:
                raise DataError(f"{each} is an input, which {out} would overwrite; give another place to write to")
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; give a place in a writable folder") from None


def _check_limits(adapter: Path, config: PeftConfig) -> None:
    """Raises DataError for what the competition's rules exclude."""
    rank = max([config.rank, *config.rank_pattern.values()])
    if rank > MAX_RANK:
        raise DataError(
            f"{adapter} has rank {rank}; the competition takes at most {MAX_RANK}: train with a lower recipe.lora.rank"
        )
    if isinstance(config.targets, str):
        raise DataError(
            f"{config.path}: target_modules is {config.targets!r}; the competition wants as target_modules a list of "
            "the names that its weights file has"
        )
    size = sum(path.stat().st_size for name in ADAPTER_FILES if (path := adapter / name).is_file())
    if size > MAX_ARCHIVE_BYTES:
        raise DataError(
            f"{adapter} has {size} bytes; the competition takes at most {MAX_ARCHIVE_BYTES}: leave out routed experts"
        )


def _check_served(config: PeftConfig, proved: Proved) -> None:
    """Raises DataError where the competition's engine would not compute what was trained, or would compute the base."""
    if unmatched := config.unmatched(proved.shapes):
        raise DataError(
            f"{config.path} names the target {unmatched[0]}, for which {ADAPTER_WEIGHTS} has no tensor, as for a target that "
            "the model lacks; take it out of target_modules, or save the adapter again if it was trained"
        )
    if len(proved.zero) == len(proved.shapes):
        raise DataError(
            f"{ADAPTER_WEIGHTS} changes nothing, because A or B (B before the first step) is zero in all its "
            f"{len(proved.shapes)} pairs; pack a trained adapter"
        )
    for module in proved.shapes:
        # vLLM reads r, lora_alpha and use_rslora, and applies that one scale to every module (vllm/lora/peft_helper.py).
        if not math.isclose(config.scale_of(module), config.scale_of(None)):
            raise DataError(
                f"{config.path}: alpha_pattern or rank_pattern gives {module} the scale {config.scale_of(module):g}, but the "
                f"competition's vLLM applies {config.scale_of(None):g} to all; multiply B by the ratio and remove the pattern"
            )


def merge(adapter: Path, base: Path, model: dict[str, Any], out: Path) -> Proved:
    """Writes base + adapter into the folder `out`, and returns what was found in the adapter.

    Raises DataError that names a missing, surplus or misshapen tensor, a field that `PeftConfig` refuses, an input in
    `out`, or a weight that the adapter makes infinite.
    """
    from safetensors.torch import save_file

    from substrate.model import ModelConfig
    from substrate.model.tensors import Checkpoint, shards

    architecture, config = ModelConfig.from_dict(model), PeftConfig.read(adapter)
    shards_of_base = base.glob("*.safetensors*") if base.is_dir() else [base]
    _refuse_input(out, [base, adapter, *(adapter / name for name in ADAPTER_FILES), *shards_of_base])
    proved = prove(adapter, config)
    proved.check_model(architecture)
    weight_map: dict[str, str] = {}
    with Checkpoint(base) as weights, Checkpoint(adapter / ADAPTER_WEIGHTS) as factors:
        weights.check_names(architecture)
        if weights.left_out:
            print(f"warning: {len(weights.left_out)} tensors mtp.* of {base} are left out", file=sys.stderr)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write {out}: {error.strerror}; give a new folder in a writable one") from None
        merged = _merged(architecture, weights, factors, config, proved)
        for number, shard in enumerate(shards(merged)):
            file = f"model-{number:05d}.safetensors"
            save_file(shard, out / file, {"format": "pt"})
            as_umask_says(out / file)
            weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(out / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    of_base = settings_of(base if base.is_dir() else base.parent, "config.json")
    ids = {name: of_base[name] for name in TOKEN_IDS if name in of_base}
    write_text(out / "config.json", json.dumps(architecture.to_transformers() | ids, indent=2) + "\n")
    _copy_beside(base, out)
    return proved


def _copy_beside(base: Path, out: Path) -> None:
    """Copies the tokenizer and the generation settings that lie beside the base's weights."""
    folder = base if base.is_dir() else base.parent
    beside = [path for path in folder.iterdir() if path.name in BESIDE]
    for path in sorted([*beside, *folder.glob("additional_chat_templates/*.jinja")]):
        target = out / path.relative_to(folder)
        with open_plain(path) as source:
            try:
                target.parent.mkdir(exist_ok=True)
                with target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
            except OSError as error:
                raise DataError(
                    f"cannot copy {path} to {out}: {error.strerror}; free space or get rights there"
                ) from None


def _merged(
    architecture: "ModelConfig", weights: "Checkpoint", factors: "Checkpoint", config: PeftConfig, proved: Proved
) -> Iterator[tuple[str, "Tensor"]]:
    from substrate.model.lora import adapter_name
    from substrate.model.published import published_tensors

    adapted = {f"{published_name(module)}.weight": module for module in proved.shapes}
    for name, (shape, _) in published_tensors(architecture).items():
        tensor = weights.read(name, shape, slice(None))
        if name in adapted:
            rank, scale = config.rank_of(adapted[name]), config.scale_of(adapted[name])
            A = factors.read(adapter_name(name, "A"), (rank, shape[1]), slice(None))
            B = factors.read(adapter_name(name, "B"), (shape[0], rank), slice(None))
            tensor = (tensor.float() + scale * B.float() @ A.float()).to(tensor.dtype)
            if not tensor.isfinite().all():
                raise DataError(
                    f"base and adapter add up to infinite values in {name}; check lora_alpha and both files"
                )
        yield name, tensor


def main() -> None:
    """Reads the command line and writes the archive or the model."""
    parser = Parser(
        prog="substrate.formats.export", description="Pack an adapter for the competition, or merge it into its base."
    )
    acts = parser.add_subparsers(dest="act", required=True, parser_class=Parser)
    pack = acts.add_parser("submission", help="pack an adapter as submission.zip")
    pack.add_argument("adapter", type=Path, help="folder with adapter_config.json and adapter_model.safetensors")
    pack.add_argument("out", type=Path, help="archive to write")
    pack.add_argument("--model", type=Path, help="compare with this model: hydra_conf/model/*.yaml, or a config.yaml")
    whole = acts.add_parser("merge", help="write base + adapter as a model for transformers")
    whole.add_argument("adapter", type=Path, help="folder with adapter_config.json and adapter_model.safetensors")
    whole.add_argument("out", type=Path, help="folder to write")
    whole.add_argument(
        "--base", type=Path, required=True, help="a .safetensors file, or a folder of the published shards"
    )
    whole.add_argument("--model", type=Path, required=True, help="hydra_conf/model/*.yaml, or a campaign's config.yaml")
    arguments = parser.parse_args()
    if arguments.act == "submission":
        model = read_model(arguments.model) if arguments.model else None
        proved = proved_for_submission(arguments.adapter, model)
        print(
            f"{arguments.out}: {_pack(arguments.adapter, arguments.out, arguments.model)} bytes of at most {MAX_ARCHIVE_BYTES}"
        )
    else:
        proved = merge(arguments.adapter, arguments.base, read_model(arguments.model), arguments.out)
        if not any((arguments.out / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            print(
                f"warning: no tokenizer lies beside {arguments.base}; put the model's into {arguments.out}",
                file=sys.stderr,
            )
        print(f"{arguments.out}: transformers.AutoModelForCausalLM.from_pretrained({str(arguments.out)!r}) reads it")
    counts = ", ".join(f"{target} {number}" for target, number in proved.counts().items())
    print(f"adapted modules: {counts}")
    if proved.zero:
        # No fault of the format: a routed expert that no token reached keeps its first B, which is zero.
        print(
            f"warning: {len(proved.zero)} of {len(proved.shapes)} modules change nothing, because A or B is zero there: {proved.in_zeros()}; "
            "right for experts that no token reached, else the adapter was not trained or saved whole",
            file=sys.stderr,
        )
    for target in PeftConfig.read(arguments.adapter).unmatched(proved.shapes):
        print(f"the target {target} matches nothing")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
