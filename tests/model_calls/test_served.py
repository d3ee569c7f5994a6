"""The round's own model server: a real process with vLLM's flags, over TLS, from its start to its end."""

import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.campaign import keys
from pipeline.campaign.errors import ConfigError, NotFound, WorkFailed
from pipeline.campaign.layout import Campaign, Round
from pipeline.config import settings
from pipeline.model_calls import chat_request, model_server, served
from pipeline.model_calls.endpoint import Endpoint, encoded
from pipeline.model_calls.failures import EndpointFailed
from tests.support.paths import ROOT
from tests.support.served import Site

ASKED = encoded({"model": "served", "messages": [{"role": "user", "content": "begin"}], "tools": [], "max_tokens": 100})
MODEL = Endpoint("served", "served", chat_request.USE, 30)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.make(tmp_path, "no_edit")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Round:
    """A round with two arms that agents run, and nothing else."""
    arms = [SimpleNamespace(name=f"a{number}", role="axis") for number in (1, 2)]
    monkeypatch.setattr(Round, "frozen_plan", lambda self: SimpleNamespace(arms=arms))
    campaign = Campaign.at(tmp_path / "campaign")
    campaign.vault.mkdir(parents=True, mode=0o700)
    campaign.round("r0001").folder.mkdir(parents=True)
    return campaign.round("r0001")


class Serving:
    """A stage that serves in a thread of the test."""

    def __init__(self, folder: Round, chosen: settings.Settings) -> None:
        self.stop, self.lines, self.ended = threading.Event(), list[str](), list[Any]()

        def run() -> None:
            try:
                self.ended.append(model_server.serve(folder, chosen, ["a1", "a2"], self.stop.is_set, self.lines.append))
            except Exception as error:
                self.ended.append(error)

        self.thread = threading.Thread(target=run)


@contextmanager
def serving(folder: Round, chosen: settings.Settings) -> Iterator[Serving]:
    found = Serving(folder, chosen)
    found.thread.start()
    try:
        yield found
    finally:
        found.stop.set()
        found.thread.join(60)


def composed(site: Site, *words: str) -> settings.Settings:
    return settings.compose(site.words(*words))


def conclude(folder: Round, arm: str) -> None:
    attempt = folder.claim_attempt(arm)
    attempt.result.write_bytes(b"")


def until(holds: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_it_answers_until_the_arms_have_ended_and_leaves_no_key(site: Site, folder: Round) -> None:
    with serving(folder, composed(site)) as found:
        asks = served.Served(folder, MODEL, 60)
        assert json.loads(asks.ask(ASKED, 60))["choices"][0]["message"]["tool_calls"]
        key = folder.server_key.read_text()
        for path in (folder.server_key, folder.server_certificate, folder.server_address):
            assert path.stat().st_mode & 0o777 == 0o600, path
        assert folder.server_key.parent.stat().st_mode & 0o777 == 0o700
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
        assert any(str(site.weights).encode() in line for line in lines) and not any(
            key.encode() in line for line in lines
        )
        conclude(folder, "a1")
        time.sleep(1.5)
        assert found.thread.is_alive()  # another arm may still ask
        conclude(folder, "a2")
        found.thread.join(60)
    assert found.ended == [True]
    assert not any(path.exists() for path in (folder.server_key, folder.server_certificate, folder.server_address))
    assert key not in "".join(found.lines) + folder.server_log.read_text()
    assert "beside False" in folder.server_log.read_text()  # the frozen code of PYTHONPATH is not vLLM's


def readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


def test_nobody_without_the_rounds_certificate_reaches_any_path_of_it(site: Site, folder: Round) -> None:
    """vLLM asks for its key below /v1 alone, so the certificate must close the rest."""
    with serving(folder, composed(site)):
        at = served.Served(folder, MODEL, 60).wait(60)
        stranger = ssl.create_default_context()
        stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
        for path in ("/health", "/v1/models", "/invocations"):
            with pytest.raises((urllib.error.URLError, OSError)) as refused:
                urllib.request.urlopen(at.url.replace("/v1/chat/completions", path), timeout=10, context=stranger)
            assert not isinstance(refused.value, urllib.error.HTTPError), path
        # who has the certificate but no key is refused by the server itself
        assert not served.is_alive(replace(served.Served(folder, MODEL, 60).at(at), api_key_file=""))


def test_another_server_at_its_address_is_not_believed(site: Site, folder: Round) -> None:
    with serving(folder, composed(site)):
        asks = served.Served(folder, MODEL, 60)
        at = asks.wait(60)
        folder.server_certificate.write_bytes(keys.new_certificate("localhost"))  # so the server has another one
        with pytest.raises(EndpointFailed) as failed:
            asks.ask(ASKED, 10)
        assert (
            failed.value.kind in ("endpoint_tls", "endpoint_broken") and failed.value.may_pass and asks.lost == at.start
        )


def test_a_server_that_dies_is_started_again_and_followed(site: Site, folder: Round) -> None:
    (site.weights / "dies_after").write_text("1")
    with serving(folder, composed(site)) as found:
        asks = served.Served(folder, MODEL, 60)
        asks.ask(ASKED, 60)
        first = served.read_address(folder)
        with pytest.raises(EndpointFailed) as failed:
            asks.ask(ASKED, 60)
        assert failed.value.may_pass  # so that the relay repeats the call, which then waits for the next server
        assert json.loads(asks.ask(ASKED, 60))["choices"]
        second = served.read_address(folder)
        assert first and second and first.start != second.start
        assert "3 starts are left" in "".join(found.lines)


def test_a_server_that_hangs_is_started_again(site: Site, folder: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (model_server, "ALIVE_SECONDS", 0.2), (model_server, "MOST_SILENT", 3), (model_server, "KILL_SECONDS", 1.0), (served, "PROBE_SECONDS", 0.5)
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    (site.weights / "hangs_after").write_text("1")
    with serving(folder, composed(site)) as found:
        asks = served.Served(folder, MODEL, 60)
        asks.ask(ASKED, 60)
        with pytest.raises(EndpointFailed) as failed:
            asks.ask(ASKED, 5)
        assert failed.value.kind in ("endpoint_timeout", "endpoint_broken") and failed.value.may_pass
        assert json.loads(asks.ask(ASKED, 60))["choices"]
        assert "the model server stopped answering; 3 starts are left" in "".join(found.lines)


STAGE = """
import sys
from pathlib import Path
from types import SimpleNamespace
from pipeline.campaign.layout import Campaign, Round
from pipeline.config import settings
from pipeline.model_calls import model_server
from tests.support.served import Site
Round.frozen_plan = lambda self: SimpleNamespace(arms=[SimpleNamespace(name="a1", role="axis")])
folder, site = Campaign.at(Path(sys.argv[1])).round("r0001"), Site(Path(sys.argv[2]), Path(sys.argv[3]))
model_server.serve(folder, settings.compose(site.words()), [], lambda: False, print)
"""


def test_nothing_is_left_of_a_server_whose_stage_was_killed(site: Site, folder: Round) -> None:
    """Also not of its engine, a process that it starts."""
    (site.weights / "has_engine").touch()
    words = [sys.executable, "-c", STAGE, folder.campaign.folder, site.runtime, site.weights]
    stage = subprocess.Popen(list(map(str, words)), cwd=ROOT)

    def left() -> int:
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
        return sum(str(site.weights).encode() in line for line in lines)

    until(folder.server_address.exists)
    assert left() >= 3  # the stage, the server and its engine
    stage.kill()
    stage.wait()
    until(lambda: left() == 0, 10)


def test_a_server_that_never_answers_is_given_up_and_the_arms_hear_of_it(site: Site, folder: Round) -> None:
    chosen = composed(
        site, "worker.server.restarts=1", "worker.server.tool_call_parser=x", "worker.server.arguments=[--no-such-flag]"
    )
    with serving(folder, chosen) as found:
        found.thread.join(60)
        assert isinstance(found.ended[0], WorkFailed) and "2 times in all" in str(found.ended[0])
        begun = time.monotonic()
        with pytest.raises(EndpointFailed, match="ended with exit code 2") as failed:
            served.Served(folder, MODEL, 600).ask(ASKED, 600)
        assert failed.value.kind == "endpoint_not_served" and time.monotonic() - begun < 5
    assert "unrecognized arguments: --no-such-flag" in folder.server_log.read_text()
    assert model_server.gpu_seconds(folder) == 0 and len(list(folder.server_dir.glob("use_*.json"))) == 1


def test_who_waits_in_vain_fails_in_time_and_does_not_wait_again(folder: Round) -> None:
    asks = served.Served(folder, MODEL, 1.0)
    asks.wait_first()
    begun = time.monotonic()
    with pytest.raises(EndpointFailed, match="did not come within"):
        asks.ask(ASKED, 600)
    assert time.monotonic() - begun < 1
    stopping = served.Served(folder, MODEL, 600, lambda: True)
    stopping.wait_first()
    assert time.monotonic() - begun < 3


def test_a_second_stage_takes_the_place_of_the_first_after_it(site: Site, folder: Round) -> None:
    chosen = composed(site)
    with serving(folder, chosen) as first:
        at = served.Served(folder, MODEL, 60).wait(60)
        with serving(folder, chosen) as second:
            time.sleep(1.5)
            assert served.read_address(folder) == at and not second.lines
            first.stop.set()
            until(lambda: second.lines)
            now = served.Served(folder, MODEL, 60).wait(60)
            assert now.start != at.start
    assert first.ended == [False] and second.ended == [False]


def test_an_arm_has_ended_by_the_result_of_a_later_attempt(folder: Round) -> None:
    worker = settings.compose(["experiment=smoke"]).worker
    worker.agent, worker.endpoint.url = "llm", "served"
    conclude(folder, "a1")
    assert served.stage(folder, worker, ["a1", "a2", "a5"])[3:] == ("a1=1", "a2=0")  # type: ignore[index]
    assert served.arms_left(folder, ["a1=1", "a2=0"], worker) == ["a1", "a2"]
    assert served.arms_left(folder, [], worker) == ["a2"]
    conclude(folder, "a1")
    assert served.arms_left(folder, ["a1=1"], worker) == []
    with pytest.raises(ConfigError, match="a9"):
        served.arms_left(folder, ["a9"], worker)


REFUSED = {
    "cluster.vllm_runtime=''": "cluster.vllm_runtime",
    "worker.server.weights_dir=''": "worker.server.weights_dir",
    "worker.server.tool_call_parser=''": "worker.server.tool_call_parser",
    "worker.endpoint.api_key_env=MY_KEY": "api_key_env",
    "worker.server.arguments=[--host, 0.0.0.0]": "worker.server.arguments",
    "worker.server.arguments=['--api_key=abc']": "worker.server.arguments",
    "worker.server.wait_seconds=0": "worker.server.wait_seconds",
    "worker.server.restarts=-1": "worker.server.restarts",
}


@pytest.mark.parametrize(("word", "key"), REFUSED.items())
def test_what_it_lacks_is_refused_with_the_key(site: Site, word: str, key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        composed(site, word)


def test_one_machine_needs_gpus_for_an_arm_and_the_server(site: Site) -> None:
    with pytest.raises(ConfigError, match=r"cluster.gpus_per_node = 2. Valid: 3 or more"):
        composed(site, "cluster.gpus_per_node=2")
    assert composed(site, "cluster.gpus_per_node=3").cluster.agent.gpus == 1


def test_a_runtime_without_vllm_is_named(site: Site, folder: Round) -> None:
    os.unlink(site.runtime / "bin" / "vllm")
    with pytest.raises(NotFound, match="bin/vllm is missing"):
        model_server.serve(folder, composed(site), [], lambda: False, print)
    with pytest.raises(EndpointFailed, match="bin/vllm is missing"):
        served.Served(folder, MODEL, 600).wait(600)
    chosen = composed(site)
    assert served.stage(folder, chosen.worker, ["a1"]) and served.read_address(folder) is None


def test_the_gpus_of_the_job_hold_the_model_together(site: Site, folder: Round) -> None:
    chosen = composed(
        site, "cluster.gpus_per_node=8", "cluster.agent.gpus=4", "worker.server.arguments=['--max-model-len=1000']"
    )
    words = model_server.command(folder, chosen, Path("vllm"), "0.0.0.0", 1)
    assert words[words.index("--tensor-parallel-size") + 1] == "4" and words[-1] == "--max-model-len=1000"
    assert words[1:3] == ["serve", str(site.weights)]
