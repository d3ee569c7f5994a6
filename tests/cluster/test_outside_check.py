"""Test that `doctor` looks for the board's client, the proposer and the engine where the configuration needs them, and sends nothing."""

import os
import socket
import threading

import pytest

from pipeline.campaign.errors import ConfigError
from pipeline.cluster import outside_check
from pipeline.config import decoding, settings

LLM = ["+policy.proposals.kind=llm", "+policy.proposals.model=m"]
KAGGLE = ["external=kaggle", "external.competition=puzzles"]


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """A person without credentials, proxies or clients."""
    for name in [name for name in os.environ if name.startswith("KAGGLE_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()


def found(*overrides: str) -> dict[str, outside_check.Check]:
    checks = list(outside_check.examine(settings.compose(["experiment=smoke", *overrides])))
    assert all(check.cure for check in checks if check.verdict != "good")
    return {check.name: check for check in checks}


def executable(path, script: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_nothing_is_looked_for_where_nothing_is_configured():
    assert found() == {} == found("external=local")


def test_kaggle_s_client_is_looked_for(tmp_path, monkeypatch):
    assert found(*KAGGLE)["program kaggle"].verdict == "bad"
    on_slurm = found("cluster=slurm", *KAGGLE)["program kaggle"]
    assert on_slurm.verdict == "unknown"  # the meta job sends, on a node
    assert found("cluster=slurm", *KAGGLE, "external.push=login")["program kaggle"].verdict == "bad"
    executable(tmp_path / "bin" / "kaggle")
    assert found(*KAGGLE)["program kaggle"].verdict == "good"
    assert found(*KAGGLE)["kaggle's credentials"].verdict == "unknown"
    (tmp_path / ".kaggle").mkdir()
    (tmp_path / ".kaggle" / "kaggle.json").write_text("{}")
    assert found(*KAGGLE)["kaggle's credentials"].verdict == "good"
    (tmp_path / ".kaggle" / "kaggle.json").unlink()
    monkeypatch.setenv("KAGGLE_API_TOKEN", "hunter2")
    assert "environment" in found(*KAGGLE)["kaggle's credentials"].found
    assert not any("hunter2" in check.found for check in found(*KAGGLE).values())


def test_a_site_s_scorer_is_looked_for(tmp_path):
    words = ["external=command", "external.command=[score-it,'{adapter}']", "external.poll_command=[ask-for-it]"]
    assert {check.verdict for check in found(*words).values()} == {"bad"}
    executable(tmp_path / "bin" / "score-it")
    assert {name: check.verdict for name, check in found(*words).items()} == {
        "program of external.command": "good", "program of external.poll_command": "bad",
    }  # fmt: skip


def test_the_proposer_s_endpoint_is_connected_to_and_gets_no_byte():
    got = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"+policy.proposals.url=http://127.0.0.1:{server.getsockname()[1]}/v1/chat/completions"

        def listen():
            with server.accept()[0] as peer:
                got.append(peer.recv(100))

        listening = threading.Thread(target=listen)
        listening.start()
        assert found(*LLM, address)["proposer's endpoint"].verdict == "good"
        listening.join()
    assert got == [b""]
    refused = found(*LLM, address)["proposer's endpoint"]
    assert refused.verdict == "bad" and "no connection to 127.0.0.1" in refused.found


@pytest.mark.parametrize("url", ["", "api.example.com", "http://host:hunter2/v1", "ftp://127.0.0.1/"])
def test_a_wrong_address_is_bad_and_not_repeated(url):
    check = found(*LLM, f"+policy.proposals.url='{url}'")["proposer's endpoint"]
    assert check.verdict == "bad" and "hunter2" not in check.found


def test_case_11_an_address_with_a_password_is_refused_before_it_is_frozen():
    with pytest.raises(ConfigError, match="policy.proposals.url = .not shown") as error:
        found(*LLM, "+policy.proposals.url='http://user:hunter2@:443'")
    assert "hunter2" not in str(error.value)


def test_behind_a_proxy_only_the_proxy_knows(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert found(*LLM, "+policy.proposals.url=http://127.0.0.1:9/v1")["proposer's endpoint"].verdict == "good"


def test_the_proposer_s_key_is_looked_for_and_not_shown(tmp_path, monkeypatch):
    address = "+policy.proposals.url=http://127.0.0.1:9/v1"
    by_name = [*LLM, address, "+policy.proposals.api_key_env=MY_KEY"]
    assert found(*by_name)["proposer's key"].verdict == "bad"
    monkeypatch.setenv("MY_KEY", "hunter2")
    assert found(*by_name)["proposer's key"].found == "MY_KEY is set"
    by_file = [*LLM, address, f"+policy.proposals.api_key_file={tmp_path}/key"]
    (tmp_path / "key").touch()
    assert found(*by_file)["proposer's key"].verdict == "bad"  # empty
    (tmp_path / "key").write_text("hunter2")
    assert found(*by_file)["proposer's key"].verdict == "good"
    assert "proposer's key" not in found(*LLM, address)


def engine(*words):
    chosen = settings.compose(words)
    return {check.name: check for check in outside_check.decoding_engine(chosen, decoding.settled_of(chosen))}


@pytest.mark.parametrize(
    ("program", "verdict", "said"),
    [
        ("", "bad", "bin/python is no program here"),
        ("echo 0.9", "good", "0.9 is imported"),
        ("echo INFO starting; echo 0.10", "bad", "0.10"),
        (
            "echo 'ModuleNotFoundError: no vllm' >&2; exit 1",
            "bad",
            "could not import vllm: ModuleNotFoundError: no vllm",
        ),
    ],
)
def test_the_other_engine_is_imported_in_its_runtime(tmp_path, program, verdict, said):
    words = ["tasks.engine=vllm", "tasks.engine_version='0.9'", f"cluster.vllm_runtime={tmp_path}/venv"]
    if program:
        executable(tmp_path / "venv" / "bin" / "python", program)
    check = engine(*words)["engine vllm"]
    assert check.verdict == verdict and said in check.found


def test_the_engine_and_the_replicas_are_said_with_the_reasons():
    checks = engine()
    assert checks["engine"].found.startswith("native, because the site has no GPUs")
    assert checks["replicas"].found.startswith("a replica that decodes: 1 core, because")
    assert "engine vllm" not in checks


def test_case_14_the_agents_endpoint_and_key_are_looked_for(tmp_path, monkeypatch):
    """A round of agents with a dead address or without a key would train what has no agent, and fail in the rest."""
    llm = [
        "worker=llm",
        "worker.endpoint.url=http://127.0.0.1:9/v1/chat/completions",
        "worker.endpoint.api_key_env=MY_KEY",
    ]
    monkeypatch.delenv("MY_KEY", raising=False)
    checks = found(*llm)
    assert {checks["agents' endpoint"].verdict, checks["agents' key"].verdict} == {"bad"}
    assert "worker.endpoint.url" in checks["agents' endpoint"].cure
    monkeypatch.setenv("MY_KEY", "hunter2")
    assert found(*llm)["agents' key"].verdict == "good"
    assert not [name for name in found("worker=scripted") if name.startswith("agents")]


def test_the_agents_model_server_is_looked_for(tmp_path):
    served = ["worker=served", f"cluster.vllm_runtime={tmp_path}", f"worker.server.weights_dir={tmp_path}"]
    assert found(*served)["agents' model server"].verdict == "bad"
    executable(tmp_path / "bin" / "python")
    (tmp_path / "config.json").touch()
    assert found(*served)["agents' model server"].verdict == "good"
