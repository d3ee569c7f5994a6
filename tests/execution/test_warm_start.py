"""Test the whole way of compiled kernels on a machine without a GPU: the first arm has them made, the second finds them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.campaign.files import read_json_lines, tree_digest
from pipeline.campaign.layout import Campaign
from pipeline.execution.results import read_attributes
from pipeline.sandbox import kernel_cache
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),  # a minute on a quiet machine
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++ on a CPU"),
]


def pipeline(*arguments: object) -> str:
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_first_arm_compiles_for_the_node(tmp_path: Path) -> None:
    campaign, scratch = Campaign.at(tmp_path / "warm"), tmp_path / "scratch"
    scratch.mkdir()
    chosen = ["experiment=smoke", "parallelism=tp1", "cluster.kernels=compiled", f"cluster.scratch_dir={scratch}"]
    pipeline("round", campaign.folder, *chosen, "--no-submit")
    folder = campaign.round("r0001")
    said = [pipeline("worker", campaign.folder, "--round", "r0001", arm) for arm in ("a2", "a3")]
    assert ["once on this node" in each for each in said] == [True, False]
    assert not any("going on without" in each for each in said)
    (cache,) = (path for path in kernel_cache.store_of(str(scratch)).iterdir() if path.is_dir())
    digest = json.loads((cache / "cache.json").read_text())["digest"]
    assert cache.name.startswith(folder.frozen_plan().image_digest[:16]) and tree_digest(cache / "tree") == digest
    assert list(cache.glob("tree/inductor/**/*.so"))
    for arm in ("a2", "a3"):
        result = read_attributes(folder.published(arm))
        told = json.loads(result["coverage"])["kernels"]
        assert result["status"] == "completed" and told.startswith(f"{digest[:16]} (scan torch,")
        assert "elementwise compiled" in folder.attempts(arm)[0].trial_log.read_text()
        assert "elementwise compiled" in folder.attempts(arm)[0].judge_log.read_text()
        assert json.loads(folder.attempts(arm)[0].probe.read_text())["path kernels"]["reached"] is False
        assert "warm_up" in [mark["phase"] for mark in read_json_lines(folder.attempts(arm)[0].phases)]
    assert [path.name for path in scratch.iterdir()] == [cache.parent.parent.name], "private copies are thrown away"
