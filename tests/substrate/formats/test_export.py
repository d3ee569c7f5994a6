"""Test the competition's archive and the merged model, and what is refused instead of written."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from substrate.formats import export
from substrate.interface.errors import DataError
from tests.support.paths import ROOT
from tests.support.reference import CONFIGS, load_reference, random_reference, small_config, with_deltas

RANK, ALPHA = 4, 8
TARGETS = {
    "backbone.layers.0.mixer.in_proj": (520, 48), "backbone.layers.1.mixer.experts.2.up_proj": (96, 48),
    "backbone.layers.2.mixer.v_proj": (48, 48), "backbone.layers.3.mixer.out_proj": (48, 192), "lm_head": (64, 48),
}  # fmt: skip


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder as a worker publishes it, with targets of every kind."""
    torch.manual_seed(2)
    folder = tmp_path / "adapter"
    folder.mkdir()
    pairs = {}
    for name, (rows, columns) in TARGETS.items():
        pairs[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns) / 10
        pairs[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK) / 10
    save_file(pairs, folder / "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_archive_holds_the_adapter_and_nothing_else(adapter, tmp_path):
    size = export.submission(adapter, tmp_path / "submission.zip")
    assert size == (tmp_path / "submission.zip").stat().st_size
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.namelist() == ["adapter_config.json", "adapter_model.safetensors"]
        assert all(archive.read(name) == (adapter / name).read_bytes() for name in archive.namelist())
    export.submission(adapter, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "submission.zip").read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"r": 33}, "rank 33; the competition takes at most 32"),
        ({"r": "4"}, "r must be an integer"),
        ({"target_modules": ".*_proj"}, "target_modules a list"),
        ({"lora_alpha": None}, "r, lora_alpha and target_modules are needed"),
    ],
)
def test_what_the_competition_refuses_is_not_written(adapter, tmp_path, change, named):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=named):
        export.submission(adapter, tmp_path / "submission.zip")
    assert not list(tmp_path.glob("*.zip*"))


def test_too_large_an_archive_is_refused_before_it_is_written(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_ARCHIVE_BYTES", 1000)
    with pytest.raises(DataError, match="at most 1000: leave out routed experts"):
        export.submission(adapter, tmp_path / "submission.zip")
    assert not list(tmp_path.glob("*.zip*"))


def test_a_merged_model_is_read_by_transformers(adapter, tmp_path, monkeypatch):
    """As a user types it; logits are those of base plus deltas, computed by transformers alone."""
    reference = random_reference(small_config())
    reference.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (tmp_path / "base" / name).write_text(name)
    values = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    chosen = small_config()
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({key: getattr(chosen, key) for key in values}))
    command = [sys.executable, "-W", "ignore", "-m", "substrate.formats.export", "merge", "adapter", "merged"]
    command += ["--base", "base", "--model", "model.yaml"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, umask=0o027)
    assert done.returncode == 0, done.stderr
    written = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert {
        "model-00000.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= set(written)
    assert set(written.values()) == {0o640} and "README.md" not in written and "warning" not in done.stderr
    tokens = torch.randint(3, 64, (2, 50))
    merged = load_reference(tmp_path / "merged")
    pairs = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        weights = with_deltas(reference, pairs, ALPHA / RANK)
        expected = torch.func.functional_call(reference, weights, (tokens,)).logits
        assert (merged(tokens).logits - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (reference(tokens).logits - expected).abs().max() > 0.01 * expected.abs().max()


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path):
    model = small_config(pattern="ME*")
    random_reference(model).save_pretrained(tmp_path / "base")
    values = {key: getattr(model, key) for key in yaml.safe_load((CONFIGS / "tiny.yaml").read_text())}
    with pytest.raises(DataError, match="layers.3.mixer.out_proj"):
        export.merge(adapter, tmp_path / "base", values, tmp_path / "merged")
    assert not (tmp_path / "merged" / "config.json").exists()


def test_modules_that_change_nothing_are_told_by_target(adapter, tmp_path, capsys, monkeypatch):
    """Routed experts that no token reached are so in a sound adapter; one of which nothing is changed is refused (above)."""
    path = adapter / "adapter_model.safetensors"
    pairs = load_file(path)
    for name in ("backbone.layers.2.mixer.v_proj", "backbone.layers.1.mixer.experts.2.up_proj"):
        pairs[f"base_model.model.{name}.lora_B.weight"].zero_()
    save_file(pairs, path)
    monkeypatch.setattr(sys, "argv", ["export", "submission", str(adapter), str(tmp_path / "submission.zip")])
    export.main()
    said = capsys.readouterr().err
    assert (
        "warning: 2 of 5 modules change nothing" in said
        and "v_proj 1 of 1" in said
        and "experts.up_proj 1 of 1" in said
    )
