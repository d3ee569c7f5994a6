"""Test what is checked of an endpoint before a round of agents is frozen."""

from pathlib import Path

import pytest

from pipeline.agent import arm
from pipeline.campaign.errors import ConfigError
from pipeline.config import settings

LLM = ["experiment=smoke", "worker=llm"]


def test_a_place_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else six arms would end as agent_endpoint after the anchor and the reference were trained."""
    monkeypatch.delenv("MY_KEY", raising=False)
    named = settings.compose([*LLM, "worker.endpoint.api_key_env=MY_KEY"])
    with pytest.raises(ConfigError, match="the variable MY_KEY holds no API key"):
        arm.check(named)
    monkeypatch.setenv("MY_KEY", "hunter2")
    arm.check(named)
    in_file = [*LLM, f"worker.endpoint.api_key_file={tmp_path}/key"]
    for site in ("cluster=local", "cluster=slurm"):
        with pytest.raises(ConfigError, match=r"the file that worker.endpoint.api_key_file names holds no API key"):
            arm.check(settings.compose([*in_file, site]))
    (tmp_path / "key").write_text("hunter2\n")
    arm.check(settings.compose(in_file))


def test_an_address_where_nobody_takes_a_chat_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"worker.endpoint.url ends in '/v1'.*https://api.example.com/v1/chat/completions"
    ):
        arm.check(settings.compose([*LLM, "worker.endpoint.url=https://api.example.com/v1"]))
