"""Run the commands of docs/engines.md on a real adapter: native in its sandbox, and the stand-in for vLLM in one of its own."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.campaign.layout import Campaign
from pipeline.config import model_size, settings
from tests.support import adapters
from tests.support.campaigns import fresh_campaign
from tests.support.paths import ROOT

COMMANDS = [
    shlex.split(line)
    for line in (ROOT / "docs" / "engines.md").read_text().splitlines()
    if line.startswith("    python -m ")
]


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """A smoke campaign whose reference has an adapter."""
    made = fresh_campaign(tmp_path)
    model = settings.load(made.round("r0000").config).to_dict()["model"]
    _, wide_in, wide_out = model_size.lora_shapes(model)["q_proj"]
    layers = [number for number, kind in enumerate(model["pattern"]) if kind == "*"]
    shapes = {f"backbone.layers.{number}.mixer.q_proj": (wide_out, wide_in) for number in layers}
    attempt = made.round("r0000").claim_attempt("a0")
    adapters.write(attempt.adapter_dir, modules=shapes, target_modules=["q_proj"])
    return made


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A virtual environment as pip leaves it, whose Python finds the stand-in."""
    folder = tmp_path / "vllm"
    (folder / "lib" / "python3.11" / "site-packages" / "vllm-0.12.0.dist-info").mkdir(parents=True)
    shutil.copytree(
        ROOT / "tests" / "standins" / "vllm", folder / "site" / "vllm", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{folder}/site" exec python "$@"\n')
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path == python else 0o644)
    return folder


def test_the_page_s_commands_compare_the_engines(campaign: Campaign, runtime: Path, tmp_path: Path) -> None:
    places = {"runs/nano": str(campaign.folder), "/opt/vllm": str(runtime), "100": "2"}
    said = []
    for words in COMMANDS:
        here = [places.get(word, word.replace("build/engines", str(tmp_path / "kept"))) for word in words[1:]]
        done = subprocess.run([sys.executable, *here], cwd=ROOT, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert len(said) == 2
    assert re.search(r"^native: native \S+, \d+ s$", said[0], re.M) and re.search(
        r"^vllm: vllm 0.12.0, \d+ s$", said[0], re.M
    )
    itself, other = said[0].split("A native, B vllm\n")
    assert "items 6, same text 6 (100.0 %), same answer 6 (100.0 %)" in itself
    assert "items 6, same text 0 (0.0 %)" in other and said[1] == other
    log = (tmp_path / "kept" / "judge.log").read_text()
    assert '"call": "add_lora"' in log and '"modules": 2' in log
