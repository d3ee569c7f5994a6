"""The relay: what comes through the socket reaches nothing but the model and the tools, budgets hold, and the key is nowhere."""

import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.agent import relay as relay_module
from pipeline.agent.relay import Relay
from pipeline.agent.scripted_model.server import ScriptedModel
from pipeline.agent.tool_queue import ToolAnswer, ToolQueue
from pipeline.campaign.errors import ConfigError, Interrupted, WorkFailed
from pipeline.model_calls.budget import Budget, Limits
from pipeline.model_calls.derive_run import of_transcript
from pipeline.model_calls.failures import CallFailed, EndpointFailed
from pipeline.model_calls.replay import Difference, Replay
from pipeline.model_calls.transcript import Writer, content_of, load
from tests.support.endpoints import ECHOES, KEY, cut_short, huge, malformed, redirecting, send, server, silent
from tests.support.relays import LIMITS, MANIFEST, REQUEST, agents_endpoint, asker, play, running, takes_manifest

GOOD = b'{"choices": [{"message": {"role": "assistant", "content": "hi"}}], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}'


def good(request: bytes, seconds: float) -> bytes:
    return GOOD


def never(request: bytes, seconds: float) -> bytes:
    raise AssertionError("the endpoint was asked")


def test_a_chat_reaches_the_endpoint_as_composed_and_comes_back_whole(tmp_path):
    seen = []

    def ask(request: bytes, seconds: float) -> bytes:
        seen.append(json.loads(request))
        return GOOD

    endpoint = agents_endpoint(leave_out=("seed", "max_tokens"), add={"reasoning_effort": "low"})
    with running(tmp_path, ask, endpoint=endpoint) as relay:
        assert relay.chat() == {"ok": True, "answer": GOOD.decode()}
        spent = relay.budget.spent()
        assert (spent.steps, spent.prompt_tokens, spent.answer_tokens) == (1, 9, 2)
        request, answer = relay.events().records
    assert seen == [
        {
            "messages": REQUEST["messages"],
            "temperature": 0,
            "reasoning_effort": "low",
            "model": "small",
            "max_completion_tokens": 100,
        }
    ]
    assert json.loads(content_of(request)) == seen[0] and content_of(answer) == GOOD
    assert (answer["prompt_tokens"], answer["answer_tokens"]) == (9, 2)


MESSAGE = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "read", "parameters": {}}}
HOSTILE = {
    "another model": {"model": "other"},
    "an address": {"url": "http://example.com"},
    "headers": {"headers": {"Authorization": "x"}},
    "extra body": {"extra_body": {"model": "x"}},
    "many choices": {"n": 100},
    "a stream": {"stream": True},
    "the newer limit": {"max_completion_tokens": 10**6},
    "a picture by address": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
    "text parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    "audio": {"messages": [{**MESSAGE, "audio": {"id": "x"}}]},
    "another role": {"messages": [{"role": "developer", "content": "a"}]},
    "no messages": {"messages": []},
    "messages that are none": {"messages": "hello"},
    "a tool of the server": {"tools": [{"type": "mcp", "server_url": "http://x"}]},
    "a search": {"tools": [{"type": "web_search"}]},
    "a tool with more": {"tools": [{**TOOL, "server_url": "http://x"}]},
    "a function with more": {"tools": [{"type": "function", "function": {"name": "a", "url": "http://x"}}]},
    "a function without a name": {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    "a call with more": {"messages": [{"role": "assistant", "content": "", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "a", "arguments": "{}"}, "url": "x"}]}]},
    "a choice of a tool": {"tool_choice": {"type": "mcp", "server_label": "x"}},
    "hot": {"temperature": 3},
    "not a number": {"temperature": "0"},
    "a true seed": {"seed": True},
    "a huge seed": {"seed": 2**60},
    "no tokens": {"max_tokens": 0},
    "half a token": {"max_tokens": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_nothing_that_arrives_names_another_model_endpoint_header_or_address(changes, tmp_path):
    with running(tmp_path, never) as relay:
        refused = relay.chat(**changes)
        assert (refused["ok"], refused["failure"]) == (False, "bad_request") and "Valid" in refused["what"]
        assert relay.events().records == () and relay.budget.held_tokens() == 0


LINES = [
    b"\n", b"{}\n", b"[]\n", b"null\n", b'{"kind": "chat"}\n', b'{"kind": "shell", "command": "id"}\n', b"\xff\xfe\n", b"{" * 5000 + b"\n",
    b'{"kind": "chat", "request": {}}\n', b'{"kind": "chat", "request": [], "key": 1}\n', b'{"kind": ["chat"], "request": {}}\n',
    b'{"kind": "tool", "name": "READ", "arguments": {}}\n', b'{"kind": "tool", "name": "read", "arguments": []}\n',
    b'{"kind": "tool", "name": "\\ud800", "arguments": {}}\n', b'{"kind": "end", "outcome": "a b", "what": ""}\n',
    b'{"kind": "end", "outcome": "x", "what": 5}\n', b'{"kind": "chat", "kind": "tool"}\n', b'{"kind": "tool", "name": NaN}\n',
    b'{"kind": "end", "outcome": "done", "what": ""}\nmore', b"x" * 100_000 + b"\n",
]  # fmt: skip


def test_a_thousand_malformed_lines_leave_no_half_state(tmp_path):
    draw = random.Random(7)
    whole = json.dumps({"kind": "chat", "request": REQUEST}).encode() + b"\n"

    def line(number: int) -> bytes:
        if number < len(LINES):
            return LINES[number]
        cut = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            cut[draw.randrange(len(cut) - 1)] = draw.randrange(256)
        cut = cut.replace(b"\n", b" ")
        return bytes(cut[: draw.randrange(len(cut))]) + b"\n"

    asked = []

    def ask(request: bytes, seconds: float) -> bytes:
        asked.append(json.loads(request))
        return GOOD

    with running(tmp_path, ask, limits=Limits(2000, 10**8, 4096, 120.0)) as relay:
        lines = [line(number) for number in range(1000)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(relay.exchange, lines))
        assert {answer.get("failure", "") for answer in answers} <= {"bad_request", ""}
        assert sum(not answer["ok"] for answer in answers) > 950
        assert all(
            set(request) <= {"messages", "temperature", "seed", "max_tokens", "model", "tools", "tool_choice"}
            for request in asked
        )
        assert relay.budget._held == [] and relay.budget.spent().steps == len(asked)
        assert relay.chat()["ok"]
        of_transcript(relay.events().records, None)
        deadline = time.monotonic() + 5
        while relay.relay._connections and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not relay.relay._connections


def test_a_thousand_hostile_replies_leave_no_half_state(tmp_path):
    draw = random.Random(3)

    def ask(request: bytes, seconds: float) -> bytes:
        kind = draw.randrange(6)
        if kind == 0:
            raise EndpointFailed("endpoint_broken", "cut", "worker.endpoint")
        if kind == 1:
            return bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
        if kind == 2:
            return GOOD[: draw.randrange(len(GOOD))]
        if kind == 3:
            return json.dumps(
                {
                    "usage": {
                        "prompt_tokens": draw.choice([-1, 0, "5", None, 10]),
                        "completion_tokens": draw.choice([{}, 3]),
                    }
                }
            ).encode()
        return b"\xff" * draw.randrange(1000) if kind == 4 else GOOD

    with running(tmp_path, ask, limits=Limits(2000, 10**8, 100, 120.0)) as relay, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: relay.chat(), range(1000)))
        assert {answer.get("failure", "endpoint_broken") for answer in answers} == {"endpoint_broken"}
        records = relay.events().records
        run, spent = of_transcript(records, None), relay.budget.spent()
        assert relay.budget._held == []
        assert run.usage.steps == spent.steps == sum(answer["ok"] for answer in answers)
        assert (run.usage.prompt_tokens, run.usage.answer_tokens) == (spent.prompt_tokens, spent.answer_tokens)


def test_slow_and_half_senders_time_out_and_a_long_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(relay_module, "MOST_LINE_BYTES", 1 << 16)
    with running(tmp_path, good, line_seconds=0.3) as relay:
        address = str(relay.relay.path)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            connection.sendall(b'{"kind":')
            assert "no whole line" in json.loads(connection.makefile("rb").readline())["what"]
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            connection.sendall(b'{"kind":')
            connection.shutdown(socket.SHUT_WR)
            assert "ended before the line" in json.loads(connection.makefile("rb").readline())["what"]
        assert "longer than" in relay.chat(messages=[{"role": "user", "content": "x" * 70_000}])["what"]
        drips = [socket.socket(socket.AF_UNIX) for _ in range(relay_module.MOST_CONNECTIONS)]
        for each in drips:  # all places are taken by senders that never finish, for as long as a line may take
            each.connect(address)
        assert relay.chat()["ok"]
        for each in drips:
            each.close()


def test_only_so_many_connections_are_served_at_once(tmp_path):
    inside, most, lock, go = 0, 0, threading.Lock(), threading.Event()

    def ask(request: bytes, seconds: float) -> bytes:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        go.wait(5)
        with lock:
            inside -= 1
        return GOOD

    with (
        running(tmp_path, ask, limits=Limits(100, 10**7, 100, 60.0), line_seconds=5.0) as relay,
        ThreadPoolExecutor(50) as pool,
    ):
        futures = [pool.submit(relay.chat) for _ in range(45)]
        time.sleep(0.5)
        go.set()
        assert all(future.result()["ok"] for future in futures)
    assert most == relay_module.MOST_CONNECTIONS


def test_parallel_calls_hold_the_budget_to_the_token(tmp_path):
    with ScriptedModel("endless_loop") as model:
        endpoint = agents_endpoint(model.url)
        limits = Limits(steps=1000, tokens=20_000, answer_tokens=50, wall_seconds=60.0)
        with (
            running(tmp_path, asker(endpoint), endpoint=endpoint, limits=limits) as relay,
            ThreadPoolExecutor(10) as pool,
        ):
            answers = list(
                pool.map(lambda number: relay.chat(messages=[{"role": "user", "content": "x" * 1500}]), range(120))
            )
            spent = relay.budget.spent()
            assert {answer.get("failure", "") for answer in answers} == {"", "budget_tokens"}
            assert 20_000 - 2600 < spent.prompt_tokens + spent.answer_tokens <= 20_000
            run = of_transcript(relay.events().records, None)
            assert (run.usage.prompt_tokens, run.usage.answer_tokens) == (spent.prompt_tokens, spent.answer_tokens)


def test_calls_that_may_pass_are_repeated_and_every_try_is_kept(tmp_path):
    tries = iter([(429, "0"), (503, ""), (429, ""), (500, "0.0"), (200, "")])

    def answer(handler, content):
        status, after = next(tries)
        send(
            handler,
            GOOD if status == 200 else b"busy: check your quota and billing",
            status,
            **({"Retry-After": after} if after else {}),
        )

    with (
        server(answer) as (url, seen),
        running(tmp_path, asker(agents_endpoint(url)), endpoint=agents_endpoint(url)) as relay,
    ):
        assert relay.chat()["ok"] and len(seen) == 5 and len({body for _, body in seen}) == 1
        kinds = [(record["kind"], record.get("failure"), record.get("tries")) for record in relay.events().records]
    assert kinds == [
        ("request", None, None), ("failure", "endpoint_limit", 1), ("failure", "endpoint_server", 2), ("failure", "endpoint_limit", 3),
        ("failure", "endpoint_server", 4), ("answer", None, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "failure", "num_asked"),
    [
        (lambda handler, content: send(handler, b"busy", 503), "endpoint_server", 5),
        (lambda handler, content: handler.connection.close(), "endpoint_broken", 5),
        (cut_short, "endpoint_broken", 5),
        (lambda handler, content: send(handler, b"", 429, **{"Retry-After": "9999"}), "endpoint_limit", 1),
        (lambda handler, content: send(handler, b'{"error": {"code": "insufficient_quota"}}', 429), "endpoint_limit", 1),
        (lambda handler, content: send(handler, b"pay", 402), "endpoint_limit", 1),
        (lambda handler, content: send(handler, b"no", 401), "endpoint_credentials", 1),
        (lambda handler, content: send(handler, b"no", 400), "endpoint_status", 1),
        (huge, "endpoint_too_large", 1),
        (malformed, "endpoint_broken", 1),
        (redirecting(307), "endpoint_redirect", 1),
        (silent, "endpoint_timeout", 1),
    ],
)  # fmt: skip
def test_a_hostile_endpoint_is_a_typed_failure_that_costs_nothing(answer, failure, num_asked, tmp_path):
    with server(answer) as (url, seen):
        endpoint = agents_endpoint(url, timeout_seconds=0.7)
        with running(tmp_path, asker(endpoint), endpoint=endpoint) as relay:
            said = relay.chat()
            assert (said["ok"], said["failure"], len(seen)) == (False, failure, num_asked)
            assert "worker.endpoint" in said["what"] or "policy" not in said["what"]
            assert relay.budget.held_tokens() == 0 and "127.0.0.1" not in said["what"]
            assert [record["kind"] for record in relay.events().records] == ["request"] + ["failure"] * num_asked


def test_the_wall_time_ends_a_call_and_its_repeats(tmp_path):
    with server(silent) as (url, _):
        endpoint = agents_endpoint(url)
        with running(tmp_path, asker(endpoint), endpoint=endpoint, limits=Limits(5, 10**5, 100, 0.4)) as relay:
            began = time.monotonic()
            assert relay.chat()["failure"] == "budget_wall" and time.monotonic() - began < 2
            assert relay.chat()["failure"] == "budget_wall"


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_the_key_is_in_no_transcript_answer_error_or_environment(echo, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_KEY", KEY)
    replies = iter([GOOD, b'{"a": "' + echo + b'"}', None])

    def answer(handler, content):
        reply = next(replies)
        send(handler, reply or f"bad key {KEY}".encode(), 200 if reply else 401)

    said = []
    with server(answer) as (url, seen):
        endpoint = agents_endpoint(url, api_key_env="MODEL_KEY")
        with running(tmp_path, asker(endpoint), endpoint=endpoint) as relay:
            said = [relay.chat() for _ in range(3)]
            state = repr(relay.relay.__dict__) + repr(relay.budget.__dict__)
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers, _ in seen) and len(seen) == 3
    assert [each.get("failure") for each in said] == [None, "endpoint_key_echoed", "endpoint_credentials"]
    kept = (tmp_path / "transcript.jsonl").read_bytes()
    for text in (kept, json.dumps(said).encode(), state.encode()):
        assert KEY.encode() not in text and echo not in text
    assert json.loads(kept.splitlines()[3])["failure"] == "endpoint_key_echoed"


def test_tools_are_served_one_after_the_other_by_the_thread_that_serves(tmp_path):
    threads = set()

    def handle(name, arguments):
        threads.add(threading.get_ident())
        if name == "train":
            return ToolAnswer(
                failure="trial_failed", what="it crashed: \ud800", facts={"kind": "crashed", "gpu_seconds": 3}
            )
        return ToolAnswer(f"{name} \udcff {arguments['number']}", truncated=True)

    with running(tmp_path, never, handler=handle) as relay, ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda number: relay.tool("read", number=number)["output"], range(30)))
        assert outputs == [f"read \udcff {number}" for number in range(30)]
        assert relay.tool("train", num_steps=None)["failure"] == "trial_failed"
        records = relay.events().records
    assert len(threads) == 1 and threads != {threading.get_ident()}
    results = [record for record in records if record["kind"] == "tool_result"]
    assert len(results) == 31 and results[-1]["facts"] == {"kind": "crashed", "gpu_seconds": 3}
    assert {record["tool"] for record in records if record["kind"] == "tool"} == set(range(31))


def test_after_a_manifest_or_an_end_nothing_more_is_served(tmp_path):
    (tmp_path / "a").mkdir()
    with running(tmp_path / "a", never) as relay:
        assert relay.tool("finish", **{**MANIFEST, "change": "all"})["failure"] == "bad_manifest"
        assert relay.tool("finish", **MANIFEST)["ok"] and relay.relay.is_finished
        assert relay.tool("read")["failure"] == "bad_request" and relay.chat()["failure"] == "bad_request"
    with running(tmp_path, never) as relay:
        assert relay.exchange({"kind": "end", "outcome": "watchdog_repeats", "what": "again \ud800" + "x" * 1000}) == {
            "ok": True
        }
        assert (
            relay.relay.ending
            and relay.relay.ending.outcome == "watchdog_repeats"
            and len(relay.relay.ending.what) == 600
        )
        assert relay.chat()["failure"] == "bad_request"
        assert of_transcript(relay.events().records, None).outcome == "agent_watchdog"


def test_what_the_handler_raises_reaches_the_main_thread_and_the_loop_is_hung_up_on(tmp_path):
    class Stop(Exception):
        pass

    def handle(name, arguments):
        raise Stop

    with pytest.raises(Stop), running(tmp_path, never, handler=handle) as relay, pytest.raises(ValueError):
        relay.tool("read")


def test_a_transcript_that_cannot_be_written_reaches_the_main_thread(tmp_path, monkeypatch):
    def full(self, kind, content=None, **fields):
        raise WorkFailed("cannot append to the transcript: No space left on device")

    monkeypatch.setattr(Writer, "append", full)
    with pytest.raises(WorkFailed, match="No space left"), running(tmp_path, good) as relay:
        with pytest.raises(ValueError):
            relay.chat()
        time.sleep(0.5)


def test_closing_ends_waiting_calls_and_repeats_and_leaves_no_socket(tmp_path):
    limits = Limits(5, 10**5, 100, 60.0)
    relay = Relay(
        tmp_path / "relay", os.geteuid(), agents_endpoint(), failing, Budget(limits), Writer(tmp_path / "t"), pause_seconds=30.0
    )  # fmt: skip
    answers = []

    def ask(line: dict) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(relay.path))
            connection.sendall(json.dumps(line).encode() + b"\n")
            answers.append(connection.makefile("rb").readline())

    lines = [{"kind": "tool", "name": "read", "arguments": {}}, {"kind": "chat", "request": REQUEST}]
    with relay:
        threads = [threading.Thread(target=ask, args=(line,)) for line in lines]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        began = time.monotonic()
    for thread in threads:
        thread.join(5)
    assert time.monotonic() - began < 4 and len(answers) == 2
    assert all(answer == b"" or json.loads(answer)["failure"] == "closed" for answer in answers)
    assert not relay.path.exists() and load(tmp_path / "t").cut_bytes == 0


def failing(request: bytes, seconds: float) -> bytes:
    raise EndpointFailed("endpoint_server", "status 500", "worker.endpoint", may_pass=True)


def test_the_folder_and_the_socket_are_the_sandboxs_alone(tmp_path):
    with running(tmp_path, good) as relay:
        folder, place = relay.relay.path.parent.stat(), relay.relay.path.stat()
        assert (folder.st_mode & 0o777, place.st_mode & 0o777, folder.st_uid) == (0o700, 0o600, os.geteuid())


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become another user")
def test_another_user_is_not_served_even_with_the_right_to_connect(tmp_path):
    with running(tmp_path, good) as relay:
        for folder in (relay.relay.path.parent, *relay.relay.path.parent.parents):
            if str(folder).startswith("/tmp/"):
                folder.chmod(0o777)
        relay.relay.path.chmod(0o777)
        pid = os.fork()
        if pid == 0:
            os.setuid(65_534)
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(relay.relay.path))
                    connection.sendall(json.dumps({"kind": "chat", "request": REQUEST}).encode() + b"\n")
                    os._exit(0 if connection.recv(10) == b"" else 1)
            except ConnectionError:
                os._exit(0)
            except BaseException:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert relay.events().records == ()


def test_a_path_too_long_for_a_socket_names_the_cure(tmp_path):
    folder = Path("/tmp") / ("a" * 110)
    with pytest.raises(ConfigError, match=r"has 117 bytes, and Linux takes 107. Set cluster.scratch_dir"):
        Relay(folder, 0, agents_endpoint(), good, Budget(LIMITS), Writer(tmp_path / "t"))


def test_a_replay_plays_answers_and_failures_and_names_the_first_difference(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    with ScriptedModel("rate_limited") as model:
        endpoint = agents_endpoint(model.url)
        with running(tmp_path / "a", asker(endpoint), endpoint=endpoint) as relay:
            assert play(relay) == "finished"
            recorded = relay.events().records
    played = Replay(recorded)
    with running(tmp_path / "b", played.ask, endpoint=endpoint, pause_seconds=60.0) as relay:
        assert play(relay) == "finished" and played.left == 0 and played.difference is None
        told = [
            {name: value for name, value in record.items() if name not in ("at_ms", "previous")}
            for record in relay.events().records
        ]
    assert told == [
        {name: value for name, value in record.items() if name not in ("at_ms", "previous")} for record in recorded
    ]
    played = Replay(recorded)
    other = takes_manifest(None, lambda name, given: ToolAnswer("another log"))
    with running(tmp_path / "c", played.ask, endpoint=endpoint, handler=other) as relay:
        assert play(relay) == "finished"
        assert played.difference and played.difference.call == 1
        assert recorded and played.difference.offset == content_of(
            [record for record in recorded if record["kind"] == "request"][1]
        ).index(b"done")
    with running(tmp_path / "d", Replay(recorded[:-4]).ask, endpoint=endpoint) as relay:
        assert play(relay) == "replay_ended"
        assert of_transcript([*relay.events().records], None).outcome == "agent_contract"


def test_a_replay_refuses_to_run_past_its_end():
    played = Replay([])
    assert played.left == 0 and played.difference is None
    with pytest.raises(CallFailed, match="one more") as error:
        played.ask(b"{}", 1.0)
    assert error.value.kind == "replay_ended" and error.value.cure
    assert Difference(0, 1).call == 0


def test_a_thread_that_cannot_go_on_ends_the_running_tool():
    """A training takes hours. The worker's stop is set, the tool ends as it does for a stop, and what went wrong is raised."""
    tools, stop, began = ToolQueue(), threading.Event(), time.monotonic()
    tools.on_trouble = stop.set

    def train(name, arguments):
        threading.Thread(target=tools.fail, args=(WorkFailed("No space left on device"),)).start()
        assert stop.wait(30)
        raise Interrupted("the trial was asked to stop")

    waiting = threading.Thread(target=tools.call, args=("train", {}))
    waiting.start()
    with pytest.raises(WorkFailed, match="No space left"):
        tools.serve(train, lambda: False)
    waiting.join(30)
    assert time.monotonic() - began < 20 and not waiting.is_alive()
    with pytest.raises(WorkFailed):  # also where nothing ran, and the stop that it set ends the serving
        tools.serve(train, stop.is_set)
