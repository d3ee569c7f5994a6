"""Test that a well-formed adapter is kept under one digest, and that every other is refused by name."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as safetensors

from pipeline.campaign.errors import TrialFailed
from pipeline.config import model_size, settings
from pipeline.execution import adapter

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "in_proj"]}
SHAPES = model_size.adapter_shapes(settings.compose().to_dict()["model"], LORA["rank"], LORA["targets"])
NAMES = sorted(SHAPES)
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
    "target_modules": ["in_proj", "q_proj"], "base_model_name_or_path": "tiny",
}  # fmt: skip


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=SHAPES[name]).astype(np.float32) for name in NAMES}


def write(out: Path, weights: bytes, config: bytes | None = None) -> Path:
    """What a trial leaves in /out."""
    (out / "adapter").mkdir(parents=True, exist_ok=True)
    (out / "adapter" / adapter.WEIGHTS).write_bytes(weights)
    (out / "adapter" / adapter.CONFIG).write_bytes(json.dumps(CONFIG).encode() if config is None else config)
    return out


def raw(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts() -> tuple[dict[str, Any], bytes]:
    """Header and data of a well-made file, to be spoiled."""
    content = adapter.canonical_tensors(tensors())
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def refusal(out: Path, keep: Path) -> str:
    with pytest.raises(TrialFailed) as error:
        adapter.check_and_keep(out, SHAPES, LORA, keep)
    assert error.value.kind == "bad_output"
    assert not keep.exists()
    return error.value.what


def test_a_well_made_adapter_is_kept_as_it_is(tmp_path):
    write(tmp_path / "out", safetensors.save(tensors(), metadata={"format": "pt"}))
    digest = adapter.check_and_keep(tmp_path / "out", SHAPES, LORA, tmp_path / "keep")
    kept = safetensors.load_file(tmp_path / "keep" / adapter.WEIGHTS)
    assert kept.keys() == SHAPES.keys()
    for name, tensor in tensors().items():
        np.testing.assert_array_equal(kept[name], tensor)
    assert json.loads((tmp_path / "keep" / adapter.CONFIG).read_text()) == CONFIG
    files = [(tmp_path / "keep" / name).read_bytes() for name in (adapter.WEIGHTS, adapter.CONFIG)]
    assert digest == hashlib.sha256(b"".join(files)).hexdigest() == adapter.kept_digest(tmp_path / "keep")


def test_one_adapter_has_one_digest_however_it_was_written(tmp_path):
    header, data = parts()
    sizes = [header[name]["data_offsets"] for name in NAMES]
    backwards, body = {"__metadata__": {"who": "knows"}}, b""
    for name, (begin, end) in reversed(list(zip(NAMES, sizes, strict=True))):
        backwards[name] = {**header[name], "data_offsets": [len(body), len(body) + end - begin]}
        body += data[begin:end]
    integer_dropout = json.dumps(CONFIG | {"lora_dropout": 0}, indent=3).encode()
    files = [(safetensors.save(tensors()), None), (raw(backwards, body), None), (raw(header, data), integer_dropout)]
    digests = {
        adapter.check_and_keep(write(tmp_path / f"out{number}", *file), SHAPES, LORA, tmp_path / f"keep{number}")
        for number, file in enumerate(files)
    }
    assert len(digests) == 1


def test_another_weight_or_configuration_has_another_digest(tmp_path):
    changed = tensors()
    changed[NAMES[0]][0, 0] = np.nextafter(changed[NAMES[0]][0, 0], np.float32(1))
    renamed = json.dumps(CONFIG | {"base_model_name_or_path": "small"}).encode()
    files = [(tensors(), None), (changed, None), (tensors(), renamed)]
    digests = {
        adapter.check_and_keep(write(tmp_path / f"out{n}", safetensors.save(t), c), SHAPES, LORA, tmp_path / f"keep{n}")
        for n, (t, c) in enumerate(files)
    }
    assert len(digests) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(tmp_path, value):
    spoiled = tensors()
    spoiled[NAMES[3]][-1, -1] = value
    out = write(tmp_path / "out", safetensors.save(spoiled))
    assert refusal(out, tmp_path / "keep") == f"tensor {NAMES[3]} holds NaN or infinity"


def test_names_shapes_and_types_are_those_of_the_recipe(tmp_path):
    whole = tensors()
    missing = {name: whole[name] for name in NAMES[1:]}
    transposed = {**whole, NAMES[0]: np.ascontiguousarray(whole[NAMES[0]].T)}
    halves = {name: tensor.astype(np.float16) for name, tensor in whole.items()}
    bits = {**whole, NAMES[0]: whole[NAMES[0]].view(np.int32)}
    cases = [
        (missing, "is missing"),
        ({**whole, "extra": np.zeros(3, np.float32)}, "'extra' does not belong to this recipe"),
        (transposed, "but must be F32 of shape"),
        (halves, "bytes of data"),
        (bits, "but must be F32 of shape"),
    ]
    for number, (spoiled, words) in enumerate(cases):
        out = write(tmp_path / f"out{number}", safetensors.save(spoiled))
        assert words in refusal(out, tmp_path / "keep")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    content = safetensors.save(tensors())
    for cut in [*range(20), *range(20, len(content), 977), len(content) - 1]:
        refusal(write(tmp_path / "out", content[:cut]), tmp_path / "keep")
    refusal(write(tmp_path / "out", content + b"\0"), tmp_path / "keep")


@pytest.mark.parametrize(
    "offsets", [[0, 0], [4, 2], [-4, 4], [0, 2**62], ["0", "4"], [0.0, 4.0], [True, 4], [0], None, "04"]
)
def test_offsets_that_do_not_fit_are_refused(tmp_path, offsets):
    header, data = parts()
    header[NAMES[0]]["data_offsets"] = offsets
    assert NAMES[0] in refusal(write(tmp_path / "out", raw(header, data)), tmp_path / "keep")


def test_tensors_that_overlap_are_refused(tmp_path):
    header, data = parts()
    same_shape = [name for name in NAMES if SHAPES[name] == SHAPES[NAMES[0]]]
    header[same_shape[1]]["data_offsets"] = header[same_shape[0]]["data_offsets"]
    assert refusal(write(tmp_path / "out", raw(header, data)), tmp_path / "keep") == "the tensors overlap or leave gaps"


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"a": 1, "a": 1}', b"\xff\xfe", b'{"a": ' + b"1" * 5000 + b"}"],
    ids=["empty", "list", "null", "cut", "deep", "double", "bytes", "digits"],
)
def test_a_header_that_is_no_object_is_refused(tmp_path, header):
    assert "header" in refusal(write(tmp_path / "out", raw(header, b"")), tmp_path / "keep")


def test_a_header_longer_than_the_limit_is_not_read(tmp_path):
    out = write(tmp_path / "out", struct.pack("<Q", 2**63))
    assert "has no readable header" in refusal(out, tmp_path / "keep")


@given(st.binary(max_size=200), st.integers(0, 3000))
def test_bytes_written_over_the_file_never_do_more_than_fail(tmp_path_factory, noise, position):
    base = tmp_path_factory.mktemp("noise")
    content = safetensors.save(tensors())
    out = write(base / "out", content[:position] + noise + content[position + len(noise) :])
    try:
        adapter.check_and_keep(out, SHAPES, LORA, base / "keep")
    except TrialFailed as error:
        assert error.kind == "bad_output"
    else:
        assert all(
            np.isfinite(tensor).all() for tensor in safetensors.load_file(base / "keep" / adapter.WEIGHTS).values()
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 8}, "r is 8, but the recipe has 4"),
        ({"r": 4.0}, "r is 4.0"),
        ({"lora_alpha": 16}, "lora_alpha is 16"),
        ({"lora_dropout": 0.5}, "lora_dropout is 0.5"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "DORA"}, "peft_type is 'DORA'"),
        ({"target_modules": ["q_proj", "in_proj"]}, "target_modules is"),
        ({"target_modules": ".*"}, "target_modules is '.*'"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is not a string"),
        ({"auto_mapping": {}}, "must have exactly the keys"),
        ({"use_rslora": True}, "use_rslora is missing or not one of them"),  # case 9: no field of another arithmetic
        ({"lora_alpha": True}, "lora_alpha is True"),
    ],
)
def test_a_configuration_of_another_recipe_is_refused(tmp_path, change, words):
    out = write(tmp_path / "out", safetensors.save(tensors()), json.dumps(CONFIG | change).encode())
    assert words in refusal(out, tmp_path / "keep")


@pytest.mark.parametrize(
    "config",
    [b"", b"{}", b"[]", b'{"r": NaN}', b'{"r": 4, "r": 4}', b"[" * 30_000, b" " * 70_000, b"\xff"],
    ids=["empty", "no keys", "list", "NaN", "double", "deep", "long", "bytes"],
)
def test_a_configuration_that_is_not_strict_json_is_refused(tmp_path, config):
    out = write(tmp_path / "out", safetensors.save(tensors()), config)
    assert "adapter_config.json" in refusal(out, tmp_path / "keep")


@pytest.mark.parametrize("name", [adapter.WEIGHTS, adapter.CONFIG])
@pytest.mark.parametrize("kind", ["absent", "link", "fifo", "folder"])
def test_only_plain_files_are_opened(tmp_path, name, kind):
    out = write(tmp_path / "out", safetensors.save(tensors()))
    path = out / "adapter" / name
    path.rename(tmp_path / "elsewhere")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    assert name in refusal(out, tmp_path / "keep")


def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path):
    out = write(tmp_path / "out", safetensors.save(tensors()))
    (out / "adapter").rename(tmp_path / "elsewhere")
    (out / "adapter").symlink_to(tmp_path / "elsewhere")
    assert "is not a plain file" in refusal(out, tmp_path / "keep")
