"""Test adapters that somebody made to trouble us: patterns, scales, names, files that never end, and outputs that are inputs."""

import json
import os
import struct
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from substrate.formats import export
from substrate.formats.adapter_file import MAX_HEADER_BYTES
from substrate.formats.published_files import read_model
from substrate.interface.errors import DataError, UsageError
from substrate.interface.peft_config import MAX_CONFIG_BYTES, TARGETS, PeftConfig
from substrate.model import ModelConfig
from substrate.model.published import published_tensors
from tests.support import adapters
from tests.support.adapters import CONFIG, ENDS, MODULES, WEIGHTS
from tests.support.paths import ROOT
from tests.support.reference import CONFIGS, random_reference, small_config


@pytest.fixture
def adapter(tmp_path) -> Path:
    return adapters.write(tmp_path / "adapter")


def refused(folder: Path, words: str) -> None:
    """Refused in one short sentence, at once, with nothing written."""
    before, start = sorted(folder.parent.rglob("*")), time.monotonic()
    with pytest.raises(DataError, match=words) as found:
        export.submission(folder, folder.parent / "submission.zip")
    assert "\n" not in str(found.value) and len(str(found.value)) < 600 and time.monotonic() - start < 5
    assert sorted(folder.parent.rglob("*")) == before


PATTERNS: list[dict[str, Any]] = [
    {"rank_pattern": {"(?i)q_proj": 4}}, {"alpha_pattern": {"(?i)q_proj": 4}}, {"alpha_pattern": {"v_proj)": 4}},
    {"alpha_pattern": {"(?P<a>v)(?P<a>p)": 4}}, {"rank_pattern": {"v_proj(?#": 4}}, {"rank_pattern": {"v_proj\\": 4}},
    {"layers_pattern": ["("]}, {"layers_pattern": "layers["}, {"layers_pattern": ["layers", "(?i)h"]},
    {"layers_pattern": ["(?P<idx>layers)"]}, {"layers_pattern": ["**"]},
]  # fmt: skip


@pytest.mark.parametrize("fields", PATTERNS, ids=str)
@pytest.mark.parametrize("layers", [None, [0]])
def test_case_09_a_pattern_that_peft_cannot_read_is_refused_by_name(adapter, fields, layers):
    adapters.configure(adapter, layers_to_transform=layers, **fields)
    refused(adapter, f"{next(iter(fields))} is .* must be a name, or a regular expression that Python can read")


@pytest.mark.parametrize(
    "pattern", ["(layers)", "(?P<name>layers)", "h|layers", "layers|h", "(h|layers)", "layers(?#", ".*"]
)
def test_case_09_groups_and_halves_in_layers_pattern_mean_what_they_mean_in_peft(tmp_path, pattern):
    tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
    fields = {"target_modules": ["in_proj", "v_proj"], "layers_to_transform": [0, 1], "layers_pattern": [pattern]}
    (tmp_path / CONFIG).write_text(json.dumps({"r": 4, "lora_alpha": 8, **fields}))
    config = PeftConfig.read(tmp_path)
    for module in [*MODULES, "backbone.h.1.mixer.v_proj", "layers.0.mixer.v_proj"]:
        expected = tuners_utils.check_target_module_exists(types.SimpleNamespace(**fields), module)
        assert config.takes(module) == bool(expected), module


def test_case_09_a_key_that_is_whole_only_inside_of_pefts_expression_is_computed_as_peft_does(tmp_path):
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    ranks = {"v_proj)|(in_proj": 2, "{}": 3}
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ENDS, "rank_pattern": ranks}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    config = PeftConfig.read(tmp_path)
    for module in MODULES:
        assert config.rank_of(module) == ranks.get(get_pattern_key(list(ranks), module), 4)


SCALES = [
    {"lora_alpha": 1e308}, {"lora_alpha": 5e-324}, {"lora_alpha": 1e-45}, {"lora_alpha": 10**300}, {"lora_alpha": 2e39},
    {"alpha_pattern": {"lm_head": 1e308}}, {"alpha_pattern": {"lm_head": 5e-324}}, {"lora_alpha": 1e308, "use_rslora": True},
]  # fmt: skip


@pytest.mark.parametrize("fields", SCALES, ids=str)
def test_case_09_a_scale_that_float32_cannot_hold_is_refused(adapter, fields):
    adapters.configure(adapter, **fields)
    refused(adapter, "alpha.* is .* must be such that its scale with rank 4 is a normal number of float32")


@pytest.mark.parametrize(("alpha", "r"), [(0.5, 10**400), (8, 2**31), (8, 10**30)])
def test_case_09_a_rank_that_no_tensor_has_is_refused(adapter, alpha, r):
    adapters.configure(adapter, lora_alpha=alpha, r=r, use_rslora=True)
    refused(adapter, r"r is .*; r must be an integer of at least 1 and below 2\*\*31")


def test_case_09_factors_that_overflow_by_their_scale_are_refused(adapter):
    adapters.configure(adapter, lora_alpha=8e37)
    adapters.change(adapter, lambda found: found["base_model.model.lm_head.lora_B.weight"].fill(1e4))
    refused(adapter, "lm_head.lora_B.weight times its scale 2e.37 is infinite in float32")


def test_case_09_factors_that_vanish_by_their_scale_change_nothing(adapter):
    adapters.configure(adapter, lora_alpha=8e-37)
    adapters.change(adapter, lambda found: [each.fill(1e-20) for name, each in found.items() if "lora_B" in name])
    refused(adapter, "changes nothing")


def values() -> dict[str, Any]:
    return {key: getattr(small_config(), key) for key in yaml.safe_load((CONFIGS / "tiny.yaml").read_text())}


def test_case_09_a_merge_that_is_infinite_is_refused(adapter, tmp_path):
    random_reference(small_config()).save_pretrained(tmp_path / "base")
    adapters.configure(adapter, lora_alpha=4e37)
    adapters.change(adapter, lambda found: [each.fill(10) for each in found.values()])
    with pytest.raises(DataError, match="add up to infinite values in .*; check lora_alpha"):
        export.merge(adapter, tmp_path / "base", values(), tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*.json"))


@pytest.mark.parametrize("number", ["٣", "²", "00", "02", "１", "9" * 5000, "+2"])  # noqa: RUF001
@pytest.mark.parametrize("place", ["layers.2.", "experts.2."])
def test_case_08_a_number_that_is_not_written_plainly_is_refused(adapter, number, place):
    kind = place.split(".")[0]

    def act(found: dict[str, np.ndarray]) -> None:
        for name in [name for name in found if place in name]:
            found[name.replace(place, f"{kind}.{number}.")] = found.pop(name)

    adapters.change(adapter, act)
    adapters.configure(adapter, target_modules=[*ENDS, "up_proj"])
    refused(adapter, "without leading zeros|is no factor of a LoRA pair|which the model lacks|does not name")


def test_case_08_one_layer_under_two_numbers_is_refused(adapter):
    pairs = load_file(adapter / WEIGHTS)
    save_file(pairs | {name.replace("layers.0", "layers.00"): each for name, each in pairs.items()}, adapter / WEIGHTS)
    refused(adapter, "layers.00.mixer.in_proj; count layers and experts as 0, 1, 2")


@pytest.mark.parametrize("odd", ["a\nb", "\ud800", "a\x1b[2J"])
def test_case_09_names_that_would_break_a_line_are_refused_in_one(adapter, odd):
    fields = json.loads((adapter / CONFIG).read_text())
    for extra in ({odd: 1}, {"rank_pattern": {odd: 1}}, {"target_modules": [*ENDS, odd]}):
        (adapter / CONFIG).write_text(json.dumps(fields | extra))
        refused(adapter, "cannot be printed|target_modules must be a list of names")


def test_case_08_a_tensor_whose_name_breaks_a_line_is_refused_in_one(adapter):
    adapters.change_header(adapter, lambda text: text.replace("lm_head.lora_A", "lm\\nhead.lora_A"))
    refused(adapter, "the header of .* is damaged .*cannot be printed")


def as_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_sparse(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(2**40)


ODD_FILES = {
    "a fifo": as_fifo, "a folder": as_folder, "endless": lambda path: as_link(path, "/dev/zero"),
    "a terminal": lambda path: as_link(path, "/dev/tty"), "its own link": lambda path: as_link(path, path.name),
    "a terabyte": as_sparse,
}  # fmt: skip


@pytest.mark.parametrize("what", ODD_FILES)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_case_08_a_file_that_never_ends_is_refused_at_once(adapter, name, what):
    ODD_FILES[what](adapter / name)
    refused(adapter, name if what != "a terabyte" else "has more than|takes at most")


@pytest.mark.parametrize("what", ODD_FILES)
def test_case_08_a_model_file_that_never_ends_is_refused_at_once(tmp_path, what):
    (tmp_path / "model.yaml").write_text("name: x\n")
    ODD_FILES[what](tmp_path / "model.yaml")
    with pytest.raises(DataError, match="cannot read .*model.yaml"):
        read_model(tmp_path / "model.yaml")


@pytest.mark.parametrize("text", ["[" * 5000, "a: 2020-99-99", "a: b: c", "? [1]\n: 2"])
def test_case_08_a_model_file_that_is_no_yaml_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(DataError, match="is neither JSON nor YAML") as found:
        read_model(tmp_path / "model.yaml")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("text", ["", "3", "[]", "model: 3", "model: [pattern]", "1: 2"])
def test_case_08_a_model_file_without_a_mapping_is_refused(tmp_path, text):
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(UsageError, match="is not a mapping of names; a file of hydra_conf/model is needed"):
        read_model(tmp_path / "model.yaml")


@pytest.mark.parametrize("text", ["[]," * 13_000_000 + "[]", '"x":{},' * 700_000])
def test_case_08_a_header_that_costs_minutes_is_not_parsed(adapter, text):
    content = f'{{"a":[{text}]}}'.encode()
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", len(content)) + content)
    refused(adapter, f"has a header of {len(content)} bytes; at most {MAX_HEADER_BYTES} are read")


def test_case_08_the_bounds_leave_twice_the_room_that_all_modules_of_the_published_model_need():
    model = ModelConfig.from_dict(yaml.safe_load((ROOT / "hydra_conf/model/nemotron3_nano_30b.yaml").read_text()))
    ends = tuple(f"{target.rpartition('.')[2]}.weight" for target in TARGETS)
    modules = [name.removesuffix(".weight") for name in published_tensors(model) if name.endswith(ends)]
    entry = {"dtype": "BF16", "shape": [3712, 32], "data_offsets": [10**10, 10**10]}
    header = {f"base_model.model.{module}.lora_{factor}.weight": entry for module in modules for factor in "AB"}
    assert len(modules) > 5888 and 2 * len(json.dumps(header, separators=(",", ":"))) < MAX_HEADER_BYTES
    config = {"target_modules": modules, "rank_pattern": dict.fromkeys(modules, 32)}
    assert 2 * len(json.dumps(config, indent=4)) < MAX_CONFIG_BYTES


def test_case_08_a_configuration_with_a_byte_order_mark_is_read(adapter, tmp_path):
    content = (adapter / CONFIG).read_bytes()
    (adapter / CONFIG).write_bytes(b"\xef\xbb\xbf" + content)
    assert PeftConfig.read(adapter).rank == 4
    assert export.submission(adapter, tmp_path / "submission.zip") > 0


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


OUTS = [
    f"adapter/{WEIGHTS}", f"adapter/{CONFIG}", f"adapter/../adapter/{WEIGHTS}", f"link/{WEIGHTS}", "link.zip", "hard.zip",
    "adapter/README.md", f"adapter/{WEIGHTS}/x.zip", "link/README.md",
]  # fmt: skip


@pytest.mark.parametrize("out", OUTS)
def test_case_08_an_archive_never_takes_the_place_of_an_input(adapter, tmp_path, out):
    (adapter / "README.md").write_text("how it was trained")
    (tmp_path / "link").symlink_to(adapter)
    (tmp_path / "link.zip").symlink_to(adapter / WEIGHTS)
    os.link(adapter / WEIGHTS, tmp_path / "hard.zip")
    before = tree(tmp_path)
    with pytest.raises(DataError, match="is an input|is a file of the adapter's folder|cannot write"):
        export.submission(adapter, tmp_path / out)
    assert tree(tmp_path) == before


def test_case_08_an_archive_never_takes_the_place_of_the_model_file_or_a_pipe(adapter, tmp_path):
    model = tmp_path / "model.zip"
    model.write_text("name: x\n")
    with pytest.raises(DataError, match="is an input"):
        export._pack(adapter, model, model)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a pipe or device"):
        export.submission(adapter, tmp_path / "pipe")
    assert model.read_text() == "name: x\n" and (tmp_path / "pipe").is_fifo()


def test_case_08_an_earlier_archive_in_the_adapters_folder_is_replaced(adapter):
    first = export.submission(adapter, adapter / "submission.zip")
    assert export.submission(adapter, adapter / "submission.zip") == first


@pytest.mark.parametrize("out", ["base", "adapter", "link", "holds_a_link", "base/model.safetensors"])
def test_case_08_a_merged_model_never_takes_the_place_of_an_input(adapter, tmp_path, out):
    random_reference(small_config()).save_pretrained(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "holds_a_link").mkdir()
    (tmp_path / "holds_a_link" / "model-00000.safetensors").symlink_to(tmp_path / "base" / "model.safetensors")
    before = tree(tmp_path)
    with pytest.raises(DataError, match="is an input"):
        export.merge(adapter, tmp_path / "base", values(), tmp_path / out)
    assert tree(tmp_path) == before


def test_case_08_a_base_with_a_pipe_among_its_shards_is_refused_at_once(adapter, tmp_path):
    random_reference(small_config()).save_pretrained(tmp_path / "base")
    os.mkfifo(tmp_path / "base" / "z.safetensors")
    with pytest.raises(DataError, match="is neither a .safetensors file nor a folder with one"):
        export.merge(adapter, tmp_path / "base", values(), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
