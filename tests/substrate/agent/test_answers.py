"""Test that answers of real endpoints are read, and that malformed, cut or hostile ones give a typed error and no call."""

import copy
import json
import random
import re
import tracemalloc

import pytest

from substrate.agent.answers import MOST_ANSWER_BYTES, MOST_CALLS, Answer, BadAnswer, Call, read_answer
from substrate.agent.conversation import turn_of
from substrate.agent.loop import Session
from substrate.agent.socket_client import MOST_LINE_BYTES, Relay, encode
from substrate.agent.task import read_task
from substrate.agent.tool_schemas import fault_of
from tests.support.agent_peer import MANIFEST, Peer, Refused, calls

READ = {"path": "substrate/recipes/rft.py"}
HALF = '{"path": "substrate/recipes/rft.py", "content": "cl'


def completion(message: dict | None, finish: object = "stop", **envelope: object) -> str:
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish}], **envelope})


def called(arguments: object = json.dumps(READ), **call: object) -> dict:
    return {"id": "x", "type": "function", "function": {"name": "read", "arguments": arguments}} | call


OPENAI = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "gpt",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "annotations": [],
                "tool_calls": [called()],
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 0}},
}
VLLM = {
    "id": "chatcmpl-2",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "reasoning_content": "I must read it first.",
                "content": "\n\n",
                "tool_calls": [called(id="chatcmpl-tool-aa", type="function"), called(id="chatcmpl-tool-aa")],
            },
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ],
    "prompt_logprobs": None,
    "kv_transfer_params": None,
}
PARTS = [{"type": "reasoning", "text": None}, {"type": "text", "text": "I "}, {"type": "text", "text": "read."}, "?"]


@pytest.mark.parametrize(
    ("body", "text", "number"),
    [
        (json.dumps(OPENAI), "", 1),
        (json.dumps(VLLM), "\n\n", 2),
        (completion({"content": PARTS, "tool_calls": [called()]}), "I read.", 1),
        (completion({"tool_calls": [{"function": {"name": "read", "arguments": READ}}]}), "", 1),  # no id, an object
        (completion({"content": "", "function_call": {"name": "read", "arguments": json.dumps(READ)}}, None), "", 1),
        (completion({"content": "I stop.", "tool_calls": []}), "I stop.", 0),
        (completion({"content": "I stop.", "tool_calls": None, "function_call": None}), "I stop.", 0),
        (completion({"content": None, "refusal": "I cannot help."}), "I cannot help.", 0),
        (completion({"content": [{"type": "refusal", "refusal": "No."}]}), "No.", 0),
        (completion({"content": None}), "", 0),
        (completion({"content": "<think>Read it?</think>I read.", "tool_calls": [called()]}), "I read.", 1),
        (completion({"content": "Read it?</think>I read."}), "I read.", 0),  # the template wrote the opening
        (completion({"content": "a\ud800b"}), "a?b", 0),
        (completion({"content": "\u00e9 \U0001f600"}, error=None), "\u00e9 \U0001f600", 0),
    ],
)  # fmt: skip
def test_forms_of_real_endpoints(body, text, number):
    assert read_answer(body, 7) == Answer(
        text, tuple(Call(f"c0007000{place}", "read", READ) for place in range(number))
    )


def test_of_several_choices_the_first_is_taken():
    first, second = ({"message": {"content": text}, "finish_reason": "stop"} for text in ("one", "two"))
    assert read_answer(json.dumps({"choices": [first, second]}), 1).text == "one"


def test_ids_are_ours_and_every_one_is_new():
    one, two = (read_answer(calls(*[("read", READ)] * 3), number) for number in (1, 2))
    identities = [call.id for answer in (one, two) for call in answer.calls]
    assert len(set(identities)) == 6 and all(re.fullmatch("[a-z0-9]{9}", identity) for identity in identities)


BAD = {
    "not_json": [
        "", "no", "<html>login</html>", "data: {}\n\n", "[1]", "null", '{"choices": [', '{"a": 1, "a": 2}', "[" * 9_000, '{"a": NaN',
        '{"a": ' + "9" * 5_000 + "}",
    ],
    "error_body": ['{"error": {"message": "no such model"}}', '{"error": "busy", "choices": []}'],
    "no_choice": ["{}", '{"choices": []}', '{"choices": {}}', '{"choices": [1]}', '{"choices": [null]}'],
    "no_message": ['{"choices": [{}]}', completion(None), '{"choices": [{"message": "hello"}]}'],
    "bad_content": [completion({"content": 1}), completion({"content": {"text": "a"}}), completion({"refusal": [1]}).replace("[1]", "true")],
    "cut": [
        completion({"content": "half a sen"}, "length"), completion({}, "error"), completion({"content": "a"}, "max_tokens"),
        calls(("write", HALF), finish_reason="length"), calls(("read", READ), finish_reason="length"),
    ],
    "cut_by_reasoning": [
        completion({"content": None, "reasoning_content": "hm"}, "length"), completion({"content": "", "reasoning": "hm"}, "length"),
        completion({"content": "<think>hm"}, "length"),
    ],
    "filtered": [completion({"content": "a"}, "content_filter"), calls(("read", READ), finish_reason="content_filter")],
    "too_many_calls": [calls(*[("read", READ)] * (MOST_CALLS + 1))],
    "bad_calls": [
        calls(("write", HALF)), calls(("read", READ), ("write", HALF)), calls(("read", "[]")), calls(("read", "null")), calls(("read", '"a"')),
        calls(("read", '{"path": "a", "path": "b"}')), calls(("read", '{"first_line": NaN}')), calls(("read", '{"first_line": 1e999}')),
        calls(("read", '{"path":' + "[" * 20 + "]" * 20 + "}")), calls(("read", "{" * 5_000)),
        calls(("re ad", READ)), calls(("functions.read", READ)), calls(("", READ)), completion({"tool_calls": {"name": "read"}}),
        completion({"tool_calls": ["read"]}), completion({"tool_calls": "read"}), completion({"tool_calls": [{}]}),
        completion({"tool_calls": [{"function": {"name": None, "arguments": "{}"}}]}), completion({"tool_calls": [{"function": {"name": "read"}}]}),
        completion({"tool_calls": [{"type": "custom", "custom": {"name": "read", "input": "x"}}]}), completion({"function_call": "read"}),
    ],
    "too_large": ["x" * (MOST_ANSWER_BYTES + 1), "\U0001f600" * (MOST_ANSWER_BYTES // 4 + 1)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "body"), [(code, body) for code, bodies in BAD.items() for body in bodies], ids=lambda text: text[:40]
)
def test_bad_answers_have_a_code_and_a_sentence_for_the_model(code, body):
    with pytest.raises(BadAnswer) as caught:
        read_answer(body, 1)
    assert caught.value.code == code
    assert str(caught.value).isprintable() and 10 < len(str(caught.value)) < 400


def test_a_cut_by_reasoning_is_told_so(tmp_path):
    cut = completion({"content": None, "reasoning_content": "hm"}, "length")
    with Peer(tmp_path, [cut, Refused("budget_steps", "none is left")]) as peer:
        peer.start()
    assert "your reasoning used up all of its tokens. Think less" in peer.last_messages()[-1]["content"]


# ---- 1,000 damaged answers ----

WHOLE = [
    json.dumps(OPENAI),
    json.dumps(VLLM),
    calls(("read", READ), ("patch", {"path": READ["path"], "old": "1.0", "new": "2.0"})),
    calls(("write", {"path": READ["path"], "content": "x = 1\n" * 40}), text="I write."),
    calls(("train", {"num_steps": None, "why": "all"}), ("run", {"command": "ls", "seconds": 5})),
    calls(("finish", MANIFEST)),
    completion({"content": PARTS, "function_call": {"name": "list", "arguments": '{"path": "."}'}}),
]
JUNK = [
    None, True, 0, -1, 1.5, "", "\ud800", "\x00", "data>>>", "x" * 3_000, [], {}, [[]], {"": {}}, "length", "stop", "finish", 10**30, float("nan"),
    float("inf"), "{", "9" * 5_000,
]  # fmt: skip


def damaged(draw: random.Random) -> str:
    """An answer that was cut, mixed up, or has values that nobody expects."""
    body = draw.choice(WHOLE)
    kind = draw.randrange(5)
    if kind == 0:
        return body[: draw.randrange(len(body))]
    if kind == 1:  # single characters
        characters = list(body)
        for _ in range(draw.randint(1, 8)):
            characters[draw.randrange(len(characters))] = draw.choice('{}[]",:\\x\x00\ud800\u20289')
        return "".join(characters)
    if kind == 2:  # cut arguments in a whole envelope
        value = json.loads(body)
        for call in value["choices"][0]["message"].get("tool_calls", []):
            call["function"]["arguments"] = call["function"]["arguments"][: draw.randrange(60)]
        return json.dumps(value)
    if kind == 3:
        opened, closed = draw.choice([("[", "]"), ('{"a":', "}")])
        return body.replace("null", opened * draw.choice([3, 900, 50_000]) + "1" + closed * draw.choice([3, 900]), 1)
    value = copy.deepcopy(json.loads(body))
    for _ in range(draw.randint(1, 3)):
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(node[key], dict | list) and draw.random() < 0.7:
                node = node[key]
                continue
            if draw.random() < 0.3:
                del node[key]
            else:
                node[key] = draw.choice(JUNK)
            break
    return json.dumps(value)


CODES = {"finished", "malformed", *(f"watchdog_{name}" for name in ("repeats", "cycles", "stalls", "wanders", "flips"))}


def test_a_thousand_damaged_answers_never_do_half_of_a_thing(tmp_path):
    """They go through the real loop, socket and tools. Every session ends typed, and an answer is carried out whole or not at all."""
    draw = random.Random(23)
    answers = [damaged(draw) for _ in range(1_000)] + [draw.choice(WHOLE) for _ in range(250)]
    draw.shuffle(answers)
    outcomes = []
    root = tmp_path / "image"  # a small one, because each session reads it
    (root / "substrate" / "recipes").mkdir(parents=True)
    (root / READ["path"]).write_text("class Rft: ...\n")
    with Peer(tmp_path, [*answers, *[Refused("budget_steps", "no step is left")] * 2]) as peer:
        task, socket = read_task(peer.task)
        while len(peer.of("chat")) < len(answers):
            outcomes.append(Session(task, Relay(socket, 20), root).run().outcome)
    assert peer.wrong == []
    assert len(outcomes) > 20 and {"malformed", "finished"} <= set(outcomes) <= {*CODES, "budget_steps"}, outcomes

    done: list[list[tuple[str, dict]]] = []
    for line in peer.lines:
        if line["kind"] == "chat":
            done.append([])
        else:
            done[-1].append((line["name"], line["arguments"]))
    for body, carried_out in zip(answers, done, strict=False):
        try:
            wanted = read_answer(body, 1).calls
        except BadAnswer:
            wanted = ()
        valid = [
            (call.name, call.arguments) for call in wanted if not fault_of(call.name, call.arguments, task.arm.axis)
        ]
        # An accepted `finish` ends an answer early, and nothing else does.
        assert carried_out == valid[: len(carried_out)]
        assert len(carried_out) == len(valid) or carried_out[-1][0] == "finish"


def test_a_cut_answer_is_never_read_as_a_whole_one():
    for body in WHOLE:
        whole = read_answer(body, 1)
        for end in range(len(body)):
            with pytest.raises(BadAnswer):
                read_answer(body[:end], 1)
        for call in whole.calls:
            written = json.dumps(call.arguments)
            for end in range(1, len(written)):
                with pytest.raises(BadAnswer):
                    read_answer(calls((call.name, written[:end])), 1)


@pytest.mark.parametrize("piece", ["[],", '{"":0},', "0,", '"a",'])
def test_reading_a_dense_answer_takes_bounded_memory(piece):
    body = '{"choices": [' + piece * ((MOST_ANSWER_BYTES - 100) // len(piece)) + "0]}"
    tracemalloc.start()
    with pytest.raises(BadAnswer):
        read_answer(body, 1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 64 * MOST_ANSWER_BYTES


@pytest.mark.parametrize("piece", ["\U0001f600", "\u00e9", "\u2028", "\n", '"', "\x00"])
def test_the_longest_answer_fits_into_the_next_request(piece):
    def body(number: int) -> str:
        message = {"tool_calls": [called(json.dumps({"path": "a", "content": piece * number}, ensure_ascii=False))]}
        return json.dumps({"choices": [{"message": message}]}, ensure_ascii=False)

    each = (len(body(1_000).encode()) - len(body(0).encode())) // 1_000
    answer = read_answer(body((MOST_ANSWER_BYTES - 1_000) // each), 1)
    assert len(encode(turn_of(answer, ["written"]))) < MOST_LINE_BYTES // 2
