"""The fixtures that put stand-ins for Slurm's clients on PATH."""

from pathlib import Path

import pytest

from pipeline.cluster import slurm_sbatch
from tests.support.slurm_stand_ins import Clients, Queue


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    folder = tmp_path / "clients"
    folder.mkdir()
    return Clients(folder, monkeypatch)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    folder = tmp_path / "cluster"
    folder.mkdir()
    monkeypatch.setattr(slurm_sbatch, "LOOKS", (0.0, 0.01))
    return Queue(folder, monkeypatch)
