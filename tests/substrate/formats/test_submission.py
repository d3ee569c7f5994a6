"""Test that `export submission` proves what it packs: every damaged adapter is refused in one sentence, and good ones are packed as ever."""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.execution.adapter import canonical_config, canonical_tensors
from substrate.formats import export
from substrate.interface.errors import DataError
from tests.support import adapters
from tests.support.adapters import CONFIG, ENDS, MODULES, NULLS, WEIGHTS
from tests.support.paths import ROOT

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 1048576\n"


def packed(folder: Path) -> bytes:
    """The archive by the format's own rules: both files stored, with a date of 1980 and mode 0644."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for name in (CONFIG, WEIGHTS):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, (folder / name).read_bytes())
    return made.getvalue()


SMALL = {name: MODULES[name] for name in list(MODULES)[:1]}
RENAMED = {name.replace("backbone.", "model."): shape for name, shape in MODULES.items()}
GOOD: dict[str, dict[str, Any]] = {
    "plain": {},
    "all null fields of peft": NULLS,
    "rank 32": {"rank": 32, "lora_alpha": 64},
    "rank 1": {"rank": 1, "lora_alpha": 1},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "rank-stabilized": {"use_rslora": True, "lora_alpha": 0.5},
    "names of transformers 5": {"modules": RENAMED, "auto_mapping": {"base_model_class": "NemotronHForCausalLM"}},
    "whole names": {"target_modules": sorted(MODULES)},
    "one module, targets in another order": {"modules": SMALL, "target_modules": ["in_proj"], "init_lora_weights": "eva"},
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_case_08_a_good_adapter_is_packed_byte_for_byte_as_ever(tmp_path, name):
    how = dict(GOOD[name])
    if "target_modules" not in how:
        how["target_modules"] = random.Random(name).sample(ENDS, len(ENDS))
    folder, archive = adapters.write(tmp_path / "adapter", **how), tmp_path / "submission.zip"
    assert export.submission(folder, archive) == archive.stat().st_size
    assert archive.read_bytes() == packed(folder)


def test_case_08_the_archive_of_a_sealed_adapter_has_the_digest_that_it_always_had(tmp_path):
    """The digest was made before submissions were proved."""
    name = "base_model.model.backbone.layers.0.mixer.in_proj.lora_"
    tensors = {f"{name}A.weight": np.ones((2, 3), np.float32), f"{name}B.weight": np.full((5, 2), 0.5, np.float32)}
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["in_proj"], "peft_type": "LORA", "bias": "none"}
    (tmp_path / WEIGHTS).write_bytes(canonical_tensors(tensors))
    (tmp_path / CONFIG).write_bytes(canonical_config(config))
    export.submission(tmp_path, tmp_path / "out.zip")
    digest = hashlib.sha256((tmp_path / "out.zip").read_bytes()).hexdigest()
    assert digest == "6b6f8d5e3f6b198e7dd3dfc8e1bed9d34e1413e390e7f3489abf2d3266d6c70b"


def weights(content: bytes):
    return lambda folder: (folder / WEIGHTS).write_bytes(content)


def cut(share: float, more: bytes = b""):
    def act(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(len(content) * share)] + more)

    return act


def tensors(act):
    return lambda folder: adapters.change(folder, act)


def set_all(end: str, value: float):
    def act(found: dict[str, np.ndarray]) -> None:
        for name in found:
            if name.endswith(end):
                found[name] = np.full_like(found[name], value)

    return tensors(act)


def rename(old: str, new: str):
    def act(found: dict[str, np.ndarray]) -> None:
        for name in [name for name in found if old in name]:
            found[name.replace(old, new)] = found.pop(name)

    return tensors(act)


def one(end: str, value: float):
    def act(found: dict[str, np.ndarray]) -> None:
        name = next(name for name in sorted(found) if name.endswith(end))
        found[name][-1, -1] = value

    return tensors(act)


def config(**fields: Any):
    return lambda folder: adapters.configure(folder, **fields)


def text(content: str):
    return lambda folder: (folder / CONFIG).write_text(content)


def replaced(how: str):
    """Something else where the weights file should be."""

    def act(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / how)
        if how == "a folder":
            (folder / WEIGHTS).mkdir()
        elif how == "a link":
            (folder / WEIGHTS).symlink_to(folder / "nowhere")
        elif how == "a fifo":
            os.mkfifo(folder / WEIGHTS)

    return act


LACKING = "base_model.model.lm_head.lora_B.weight"
DAMAGED: dict[str, tuple[Any, str]] = {
    # The cases as they were reported.
    "empty": (weights(b""), f"{WEIGHTS} is empty; it is cut or no safetensors file: save or copy it again"),
    "cut": (cut(0.5), "but its header needs 2.*copy it again"),
    "cut in the header": (cut(0.01), "which hold no header; it is cut"),
    "a pointer of Git LFS": (weights(POINTER), f"{WEIGHTS} is a pointer of Git LFS; run `git lfs pull`"),
    "all NaN": (set_all("weight", np.nan), "values of .*lora_A.weight are NaN or infinity.*take an earlier checkpoint"),
    "B all zero": (set_all("lora_B.weight", 0), "changes nothing, because A or B .* is zero in all its 6 pairs; pack a trained"),
    "another rank than its configuration": (config(r=8), "so rank 4, but .*adapter_config.json says rank 8"),
    "a rank over 32": (config(r=64), "has rank 64; the competition takes at most 32"),
    "a target that the model lacks": (config(target_modules=[*ENDS, "gate_proj"]), "target gate_proj, .*take it out"),
    # More of the same kind.
    "a tensor of a target that the model lacks": (rename("v_proj", "gate_proj"), "gate_proj"),
    "a module that no target names": (config(target_modules=ENDS[:-1]), "holds lm_head, which .* does not name"),
    "zeros": (weights(bytes(4096)), "hold no header"),
    "one byte too many": (cut(1, b"\0"), "but its header needs"),
    "one byte too few": (cut(0.9999), "but its header needs"),
    "a header longer than the file": (weights(b"\xff" * 7 + b"\x00" + b"{}" * 50), "hold no header"),
    "a pickle": (weights(b"\x80\x02}q\x00." + bytes(100)), "is a pickle; save the adapter with safe_serialization"),
    "a pickle of torch.save": (weights(b"PK\x03\x04\x14\x00\x08\x08" + bytes(500)), "is a pickle of torch.save"),
    "a web page": (weights(b"<!DOCTYPE html><html>401</html>" * 9), "is a web page; download the file itself"),
    "a pickle only": (replaced("adapter_model.bin"), "has adapter_model.bin, a pickle; save it with safe_serialization"),
    "shards": (replaced("model-00001-of-00002.safetensors"), "has model-00001-of-00002.safetensors; the weights must be one file"),
    "a folder": (replaced("a folder"), "is a folder, and no file"),
    "a link to nothing": (replaced("a link"), "is a link to nothing; put"),
    "a fifo": (replaced("a fifo"), "is no plain file; put"),
    "a header that is no JSON": (lambda f: adapters.change_header(f, lambda t: t[:-9]), "the header of .* is damaged"),
    "a header with a name twice": (
        lambda f: adapters.change_header(f, lambda t: t[0] + t[1 : t.index("}") + 1] + "," + t[1:]), "comes twice"
    ),
    "a tensor outside of the file": (
        lambda f: adapters.change_header(f, lambda t: t.replace('"data_offsets":[0,', '"data_offsets":[4,')), "no sound"
    ),
    "one infinity": (one("lora_B.weight", np.inf), "1 of .* values of .*lora_B.weight are NaN or infinity"),
    "A all zero": (set_all("lora_A.weight", 0), "changes nothing"),
    "integers": (tensors(lambda t: t.update({n: v.astype(np.int32) for n, v in t.items()})), "has the type I32; save it"),
    "a B that is missing": (tensors(lambda t: t.pop(LACKING)), f"lacks its partner {LACKING}"),
    "no tensor": (tensors(lambda t: t.clear()), "holds no tensor"),
    "a vector": (tensors(lambda t: t.update({LACKING: np.ones(4, np.float32)})), "a factor has two dimensions"),
    "names of a state dict": (rename(".weight", ".default.weight"), "is no factor of a LoRA pair"),
    "a DoRA magnitude": (tensors(lambda t: t.update({"base_model.model.lm_head.lora_magnitude_vector": np.ones(64)})), "magnitude"),
    "pairs of two models": (tensors(lambda t: t.update({LACKING.replace("B", "A"): np.ones((4, 99), np.float32)})), "no adapter of one model"),
    "a layer of two kinds": (rename("layers.2", "layers.0"), "make layer 0 one of kind mamba"),
    "a rank over 32 of one module": (config(rank_pattern={"lm_head": 33}), "has rank 33; the competition"),
    "a scale that vLLM ignores": (config(alpha_pattern={"lm_head": 64}), "gives lm_head the scale 16, but .* vLLM applies 2"),
    "a regular expression": (config(target_modules=".*_proj"), "wants as target_modules a list"),
    "all-linear": (config(target_modules="all-linear"), "wants as target_modules a list"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "cannot read .*adapter_config.json"),
    "a configuration that is a pointer": (lambda folder: (folder / CONFIG).write_bytes(POINTER), "pointer of Git LFS"),
    "a configuration that is cut": (text('{"r": 4, "lora_al'), "is not the JSON of a LoRA adapter"),
    "a configuration with a key twice": (text('{"r": 4, "r": 8}'), "the key r comes twice"),
    "a list as configuration": (text("[]"), "it holds no object"),
    "a deep configuration": (text('{"r":' * 100_000), "nested too deeply"),
    "bytes as configuration": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe{"), "give a readable file in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_case_08_a_damaged_adapter_is_refused_in_one_sentence_and_nothing_is_written(tmp_path, name):
    act, words = DAMAGED[name]
    folder = adapters.write(tmp_path / "adapter")
    act(folder)
    with pytest.raises(DataError, match=words) as refused:
        export.submission(folder, tmp_path / "submission.zip")
    assert "\n" not in str(refused.value) and refused.value.exit_code == 65
    assert os.listdir(tmp_path) == ["adapter"]


def test_case_08_every_cut_is_refused(tmp_path):
    folder = adapters.write(tmp_path / "adapter", modules=SMALL, target_modules=["in_proj"])
    content = (folder / WEIGHTS).read_bytes()
    for length in [*range(0, 300, 7), *range(300, len(content), 501), len(content) - 1]:
        (folder / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(DataError):
            export.submission(folder, tmp_path / "submission.zip")
    assert os.listdir(tmp_path) == ["adapter"]


def test_case_08_the_command_says_why_with_the_exit_code_of_bad_data(tmp_path):
    folder = adapters.write(tmp_path / "adapter")
    (folder / WEIGHTS).write_bytes(POINTER)
    done = submit(tmp_path, "adapter", "submission.zip")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (65, "", 1)
    assert done.stderr == f"error: adapter/{WEIGHTS} is a pointer of Git LFS; run `git lfs pull` in its repository\n"


def test_case_08_an_adapter_of_another_model_is_refused_where_the_model_is_given(tmp_path):
    adapters.write(tmp_path / "adapter")
    model = ROOT / "hydra_conf" / "model" / "tiny.yaml"
    assert submit(tmp_path, "adapter", "out.zip").returncode == 0
    done = submit(tmp_path, "adapter", "again.zip", "--model", str(model))
    assert done.returncode == 65 and "but model tiny has" in done.stderr and not (tmp_path / "again.zip").exists()


@pytest.mark.parametrize("out", ["", "no/such/folder.zip"])
def test_case_08_an_archive_that_cannot_be_written_is_said(tmp_path, out):
    folder = adapters.write(tmp_path / "adapter")
    with pytest.raises(DataError, match="cannot write .*; give a new file in a writable folder"):
        export.submission(folder, tmp_path / out)
    assert os.listdir(tmp_path) == ["adapter"]


def submit(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "substrate.formats.export", "submission", *words]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def test_case_10_the_command_counts_the_modules_of_each_target(tmp_path):
    adapters.write(tmp_path / "adapter")
    done = submit(tmp_path, "adapter", "out.zip")
    assert done.stdout.splitlines()[1] == (
        "adapted modules: in_proj 1, experts.up_proj 1, shared_experts.down_proj 1, v_proj 1, out_proj 1, lm_head 1"
    )
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["r"] == 4
