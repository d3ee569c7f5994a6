"""Test docs/families.md: add its seventh family as a reader would, one file, and run every test of a family on it."""

import os
import re
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
