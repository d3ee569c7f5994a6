"""Fixtures of the tests that attack: the arena, as root of the machine and as an ordinary user, and a victim outside."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.host import USER, WHO, Arena, lay_out, why_not


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: pytest keeps that below a folder which only its own user may enter.
    with tempfile.TemporaryDirectory(prefix="arena-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module", params=WHO)
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    if why_not(request.param):
        pytest.skip(why_not(request.param))
    with tempfile.TemporaryDirectory(prefix="arena-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        running = Arena(request.param, lay_out(request.param, Path(name)))
        yield running
        assert running.close() == (0, "")


@pytest.fixture
def outsider(arena: Arena) -> Iterator[subprocess.Popen[bytes]]:
    """A process outside every sandbox with the uid that trials have: a sibling's, or the worker's own."""
    uid = arena.uid if arena.who == "root" else USER
    with subprocess.Popen(["sleep", "300"], user=uid if os.geteuid() == 0 else None) as process:
        yield process
        process.kill()
