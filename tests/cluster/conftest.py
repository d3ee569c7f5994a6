"""The fixture that puts stand-ins for Slurm's clients on PATH."""

from pathlib import Path

import pytest

from tests.support.slurm_stand_ins import Clients


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    folder = tmp_path / "clients"
    folder.mkdir()
    return Clients(folder, monkeypatch)
