"""Fixtures of the tests of the board: a campaign with adapters, and a client that stands in for Kaggle's."""

import json
import os
from pathlib import Path

import pytest

from pipeline.campaign.files import write_file
from pipeline.campaign.layout import Campaign
from pipeline.execution import adapter
from tests.support.campaigns import frozen_campaign
from tests.support.paths import ROOT


@pytest.fixture
def campaign(tmp_path) -> Campaign:
    """Its r0001 has adapters of a1 to a5, and r0000 the reference's."""
    campaign = frozen_campaign(tmp_path)
    for round_name, arm in (("r0000", "a0"), *(("r0001", f"a{number}") for number in range(1, 6))):
        attempt = campaign.round(round_name).claim_attempt(arm)
        write_file(attempt.adapter_dir / adapter.WEIGHTS, f"weights of {round_name}/{arm}")
        write_file(attempt.adapter_dir / adapter.CONFIG, "{}")
        write_file(attempt.sealed, json.dumps({"adapter_digest": adapter.kept_digest(attempt.adapter_dir)}))
    return campaign


@pytest.fixture
def client(tmp_path, monkeypatch) -> Path:
    """Folder of a client that stands in for Kaggle's, on PATH."""
    folder = tmp_path / "kaggle"
    folder.mkdir()
    monkeypatch.setenv("STANDIN", str(folder))
    monkeypatch.setenv("PATH", f"{ROOT / 'tests' / 'standins'}:{os.environ['PATH']}")
    monkeypatch.setenv("KAGGLE_KEY", "a-secret-key")
    return folder
