"""Test docs/families.md: add its seventh family as a reader would, one file, and run every test of a family on it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The parts of a checkout that a family's tests need, with the module of the page."""
    for name in ("substrate", "pipeline", "tests", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copyfile(ROOT / "setup.cfg", tmp_path / "setup.cfg")
    (module,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/families.md").read_text(), re.DOTALL)
    (tmp_path / "substrate/tasks/clock.py").write_text(module)
    return tmp_path


def _run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)


def test_seventh_family_is_one_file(checkout: Path) -> None:
    shown = _run(checkout, "substrate.families", "show", "clock", "--level", "small")
    assert shown.returncode == 0 and "Now, determine: " in shown.stdout, shown.stderr
    made = _run(checkout, "substrate.payload", "--out", "out", "--seed", "1", "--level", "full", "--num-per-family", "3",
                "--families", "clock")  # fmt: skip
    assert made.returncode == 0, made.stderr
    tested = _run(checkout, "pytest", "-q", "-p", "no:cacheprovider", "tests/substrate/tasks/test_tasks.py", "-k",
                  "parses_back or determined or same_generator or other_text or trace or style or levels")  # fmt: skip
    assert tested.returncode == 0, tested.stdout[-2000:]
    ruff = _run(checkout, "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "substrate/tasks/clock.py")
    assert ruff.returncode == 0, ruff.stdout


def test_the_page_s_experiments_are_taken(checkout: Path) -> None:
    """A family beside the others, and one alone, as the page has them in its blocks of YAML and in the line for a shell."""
    for name in ("hydra_conf", "constitution"):
        shutil.copytree(ROOT / name, checkout / name)
    page = (ROOT / "docs/families.md").read_text()
    beside, alone = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    conf = checkout / "hydra_conf"
    (conf / "experiment/clock.yaml").write_text(beside)
    (conf / "experiment/alone.yaml").write_text(alone)
    recipe = (conf / "recipe/sft_lora.yaml").read_text()
    mix = re.search(r"^mix:.*\n((?:  .*\n)+)", recipe, re.MULTILINE)
    assert mix
    (conf / "recipe/clock.yaml").write_text(recipe.replace(mix[1], "  clock: 1.0\n"))
    (axis,) = re.findall(r"`(\{name: curriculum.*?\})`", page)
    axes = [
        line for line in (conf / "policy/axes/tiny.yaml").read_text().splitlines() if "weak_family_share" not in line
    ]
    (conf / "policy/axes/clock.yaml").write_text("\n".join([*axes, f"  - {axis}"]) + "\n")
    (typed,) = re.findall(r"`('tasks.families=.*?)`", page)
    for words in (["experiment=clock"], ["experiment=alone"], ["experiment=demo", *shlex.split(typed)]):
        done = _run(checkout, "pipeline", "plan-memory", *words, "--json")
        assert done.returncode == 0, done.stderr
    assert _run(checkout, "pipeline", "plan-memory", "experiment=demo", "tasks.families=[clock]").returncode == 2
