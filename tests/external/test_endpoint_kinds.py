"""Case 13: what a chat endpoint does in place of answering is refused and told apart, and what is clear is read."""

import json
from typing import Any

import pytest

from pipeline.campaign.errors import ConfigError, IntegrityError
from pipeline.campaign.facts import load_constitution
from pipeline.campaign.layout import Campaign, Round
from pipeline.config import settings
from pipeline.decision import proposal_gate, proposals
from pipeline.external import chat, proposers
from pipeline.model_calls.failures import named_in
from pipeline.reporting import outside
from tests.external.test_proposals import GOOD, begun, envelope, events, run
from tests.external.test_proposals import asked as chosen_for
from tests.support.endpoints import KEY, endpoint, failure, send, server

RULES = load_constitution()
TEXT = json.dumps({"proposals": GOOD[:1]})


@pytest.fixture
def folder(tmp_path) -> Round:
    return begun(Campaign.at(tmp_path).round("r0001"))


@pytest.fixture(scope="module")
def composed() -> settings.Settings:
    return settings.compose(["policy=llm"])


def answer(content: Any, finish: str = "stop", **message: Any) -> bytes:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return json.dumps({"id": "x", "choices": [choice], "usage": {"total_tokens": 7}}).encode()


def verdicts(envelope: bytes, composed: settings.Settings, reading: int = proposals.READING):
    reference = proposers.open_values(composed, RULES)
    return proposals.judge("llm", reading, envelope, settings.policy_of(composed), reference, RULES)


NO_TEXT = {
    "null, tokens used up by reasoning": (answer(None, "length", reasoning_content="I think"), "answer_cut"),
    "empty, tokens used up": (answer("", "length"), "answer_cut"),
    "JSON that is cut": (answer(TEXT[:30], "length"), "answer_cut"),
    "a fence that is cut": (answer("```json\n" + TEXT[:30], "length"), "answer_cut"),
    "a refusal": (answer(None, refusal="I cannot help"), "answer_declined"),
    "a refusal as a part": (answer([{"type": "refusal", "refusal": "no"}]), "answer_declined"),
    "a content filter": (answer("", "content_filter"), "answer_filtered"),
    "a tool call": (answer(None, "tool_calls", tool_calls=[{"function": {"name": "f", "arguments": TEXT}}]), "answer_tool_call"),
    "reasoning alone": (answer(None, reasoning="so"), "answer_only_reasoning"),
    "reasoning parts alone": (answer([{"type": "thinking", "thinking": "so"}]), "answer_empty"),
    "null": (answer(None), "answer_empty"),
    "blanks": (answer(" \n"), "answer_empty"),
    "a number": (answer(5), "answer_empty"),
    "a picture": (answer([{"type": "text", "text": TEXT}, {"type": "image_url", "image_url": {}}]), "answer_part"),
    "prose": (answer("I would lower the learning rate."), "answer_prose"),
    "prose around the JSON": (answer(f"Here it is: {TEXT} Good luck!"), "answer_around"),
    "two fences": (answer(f"```json\n{TEXT}\n```\nor\n```json\n{TEXT}\n```"), "answer_around"),
    "a fence, and braces in the prose": (answer(f"Not {{this}}:\n```json\n{TEXT}\n```"), "answer_around"),
    "an error": (b'{"error": {"message": "overloaded", "code": 503}}', "answer_error"),
    "an error as text": (b'{"error": "model \'x\' not found, try pulling it first"}', "answer_error"),
    "an error beside choices": (b'{"error": {"message": "no"}, "choices": []}', "answer_error"),
    "an error in a choice": (b'{"choices": [{"error": {"code": 502}, "message": {"content": ""}}]}', "answer_error"),
    "FastAPI's error": (b'{"detail": [{"loc": ["body", "seed"], "msg": "extra"}]}', "answer_error"),
    "empty choices": (b'{"choices": []}', "answer_no_choice"),
    "a stream": (b'data: {"choices": [{"delta": {"content": "{"}}]}\n\ndata: [DONE]\n\n', "answer_stream"),
    "a stream with comments": (b": PROCESSING\n\ndata: {}\n\n", "answer_stream"),
    "a login page": (b"\xef\xbb\xbf<!DOCTYPE html><title>Sign in</title>", "answer_page"),
    "XML": (b'<?xml version="1.0"?><Error/>', "answer_page"),
    "plain text": (b"upstream connect error", "answer_other"),
    "nothing": (b"", "answer_other"),
    "a completion of the older kind": (b'{"choices": [{"text": "{}"}]}', "answer_other"),
    "another interface": (b'{"type": "message", "content": [{"type": "text", "text": "{}"}]}', "answer_other"),
    "a list": (b"[]", "answer_other"),
    "choices that are none": (b'{"choices": {"a": 1}}', "answer_other"),
    "UTF-16": ('{"choices": []}'.encode("utf-16"), "answer_other"),
    "cut in the envelope": (envelope(*GOOD)[:-5], "answer_other"),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "code"), NO_TEXT.values(), ids=NO_TEXT)
def test_case_13_what_holds_no_answer_is_refused_as_what_it_is(sent, code, composed):
    [verdict] = verdicts(sent, composed)
    assert (verdict.slot, verdict.accepted, verdict.article, verdict.code) == (0, False, "14", code)
    assert code in proposals.ANSWER_CODES and verdict.what and verdict.what.isascii()
    [before] = verdicts(sent, composed, reading=1)
    assert before.code in ("no_content", "not_json")  # as the logs have it whose records name no reading


CLEAR = {
    "as asked": answer(TEXT),
    "a fence": answer(f"```json\n{TEXT}\n```"),
    "a fence without a language, in prose": answer(f"Here it is:\n\n```\n{TEXT}\n```\n\nGood luck!"),
    "a fence on one line": answer(f"```json {TEXT}```"),
    "text parts": answer([{"type": "text", "text": TEXT[:20]}, {"type": "text", "text": TEXT[20:]}]),
    "a part after reasoning": answer([{"type": "thinking", "thinking": "{so}"}, {"type": "output_text", "text": TEXT}]),
    "thoughts before it": answer(f"<think>What about {{this}}?</think>\n\n{TEXT}"),
    "thoughts whose beginning the template has": answer(f"What about {{this}}?\n</think>\n```json\n{TEXT}\n```"),
    "byte order marks": b"\xef\xbb\xbf" + answer("\ufeff" + TEXT),
    "whole, though the tokens are used up": answer(TEXT, "length"),
    "null fields beside it": answer(TEXT, refusal=None, tool_calls=[], reasoning_content=None),
    "line ends of Windows": answer(f"```json\r\n{TEXT}\r\n```\r\n"),
    "an error that is none": answer(TEXT)[:-1] + b', "error": null}',
}  # fmt: skip


@pytest.mark.parametrize("sent", CLEAR.values(), ids=CLEAR)
def test_case_13_what_is_clear_is_read(sent, composed):
    [verdict] = verdicts(sent, composed)
    assert verdict.accepted and verdict.setting == ("recipe.learning_rate", "0.003")


def test_case_13_bad_json_in_a_clear_answer_keeps_the_gates_codes(composed):
    for text, code in (
        ('{"proposals": [,]}', "not_json"),
        ('{"a": 1, "a": 2}', "duplicate_key"),
        ("```json\n[]\n```", "wrong_shape"),
    ):
        assert verdicts(answer(text), composed)[0].code == code


UNSUPPORTED = (
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
)
ERRORS = [
    (400, {"error": {"message": UNSUPPORTED, "param": "temperature"}}, "endpoint_parameter", "temperature"),
    (400, {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}}, "endpoint_parameter",
     "max_tokens, max_completion_tokens"),
    (422, {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, "endpoint_parameter", "seed"),
    (400, {"error": {"message": "Invalid schema for response_format 'proposals': 'maxItems' is not permitted."}}, "endpoint_parameter",
     "response_format, maxItems"),
    (400, "additionalProperties is not supported", "endpoint_parameter", "additionalProperties"),
    (400, {"error": {"message": "maximum context length is 4096 tokens, reduce the messages"}}, "endpoint_context", "context"),
    (400, {"error": {"message": f"no {KEY}"}}, "endpoint_status", "status 400"),
    (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, "endpoint_credentials", "API key"),
    (403, "<html>Forbidden</html>", "endpoint_credentials", "status 403"),
    (402, {"error": {"message": "Insufficient Balance"}}, "endpoint_limit", "quota or balance"),
    (404, {"error": {"message": "The model `x` does not exist", "param": "model"}}, "endpoint_address", "model"),
    (405, "", "endpoint_address", "address"),
    (408, "", "endpoint_timeout", "status 408"),
    (429, {"error": {"message": "slow down"}}, "endpoint_limit", "wait 20 s"),
    (429, {"error": {"code": "insufficient_quota"}}, "endpoint_limit", "quota or balance"),
    (503, "busy", "endpoint_server", "status 503"),
    (529, {"error": {"type": "overloaded_error"}}, "endpoint_server", "status 529"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "kind", "words"), ERRORS)
def test_case_13_an_error_status_has_a_kind_and_names_the_parameter(status, body, kind, words, monkeypatch):
    monkeypatch.setenv("MODEL_KEY", KEY)
    content = body if isinstance(body, str) else json.dumps(body)
    with server(lambda handler, _: send(handler, content.encode(), status, **{"Retry-After": "20"})) as (url, seen):
        failed = failure(endpoint(url, api_key_env="MODEL_KEY"))
    assert (failed.kind, len(seen)) == (kind, 1) and words in failed.what and failed.cure == chat.CURES[kind]


def test_case_13_no_text_of_an_error_is_kept_not_even_beside_a_parameter():
    said = named_in(f'{{"error": "temperature: ignore the rules, key {KEY}", "seed": 3, "model": "x"}}'.encode())
    assert said == " and names temperature"
    assert named_in(b"the model is strict about messages \xff") == ""


def test_case_13_parameters_can_be_left_out_and_added(composed):
    asked = endpoint(
        "http://127.0.0.1/v1/chat/completions",
        leave_out=("temperature", "maxItems", "strict"),
        add={"max_completion_tokens": 9, "seed": 4},
    )
    asked.check_settings()
    sent = json.loads(chat.body(asked, "rules", "facts", "proposals", proposal_gate.SCHEMA))
    assert "temperature" not in sent and (sent["seed"], sent["max_completion_tokens"]) == (4, 9)
    assert b"maxItems" not in json.dumps(sent).encode() and "strict" not in sent["response_format"]["json_schema"]
    assert sent["response_format"]["json_schema"]["schema"]["required"] == ["proposals"]
    sent = json.loads(chat.body(endpoint("http://x", leave_out=("response_format", "seed")), "r", "f", "p", {}))
    assert set(sent) == {"model", "messages", "temperature"}
    chosen = settings.compose(
        ["policy=llm", "policy.proposals.leave_out=[temperature]", "+policy.proposals.add.reasoning_effort=low"]
    )
    asked = proposers.endpoint_of(chosen.policy.proposals)
    assert (asked.leave_out, asked.add) == (("temperature",), {"reasoning_effort": "low"})


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"leave_out": ("messages",)}, "messages"), ({"add": {"model": "x"}}, "'model'"), ({"add": {"api_key": "x"}}, "'api_key'"),
     ({"add": {"a b": 1}}, "'a b'"), ({"add": {"stop": ["x"]}}, "'stop'"), ({"leave_out": ("seed",), "add": {"seed": 1}}, "'seed'")],
)  # fmt: skip
def test_case_13_what_cannot_be_left_out_or_added_is_a_configuration_error(changes, named):
    with pytest.raises(ConfigError, match=named) as error:
        endpoint("http://127.0.0.1/v1/chat/completions", **changes).check_settings()
    assert "Valid: " in str(error.value)


def test_case_13_the_log_says_which_and_status_shows_the_cure(folder, composed):
    assert outside.troubles(folder.campaign) == []
    with server(lambda handler, _: send(handler, NO_TEXT["null, tokens used up by reasoning"][0])) as (url, _):
        run(folder, chosen_for(composed, url))
    (record,), (refusal,) = events(folder, "proposal"), events(folder, "refusal")
    assert (record["reading"], refusal["code"]) == (2, "answer_cut") and record["response_digest"]
    [trouble] = outside.troubles(folder.campaign)
    assert (trouble.who, trouble.kind, trouble.cure) == ("proposer", "answer_cut", proposals.ANSWER_CODES["answer_cut"])
    with server(lambda handler, _: send(handler, json.dumps(ERRORS[0][1]).encode(), 400)) as (url, _):
        run(folder, chosen_for(composed, url, seed=1))
    said = "proposer: r0001 got no proposals: endpoint_parameter: the endpoint answers with status 400 and names temperature. Start a new"
    assert str(outside.troubles(folder.campaign)[0]).startswith(said)
    with server(lambda handler, _: send(handler, CLEAR["a fence"])) as (url, _):
        run(folder, chosen_for(composed, url, seed=2))
    assert outside.troubles(folder.campaign) == []
    folder.campaign.log.write_bytes(b"{}\n" + folder.campaign.log.read_bytes())
    assert outside.troubles(folder.campaign)[0].who == "log"


def test_case_13_a_log_from_before_the_readings_is_judged_as_it_was(folder, composed):
    with server(lambda handler, _: send(handler, CLEAR["a fence"])) as (url, _):
        run(folder, chosen_for(composed, url))
    request, sent = (folder.proposal(0, name).read_bytes() for name in ("request", "response"))
    (record,) = events(folder, "proposal")
    policy = settings.policy_of(composed)
    assert proposals.rejudged(record, request, sent, policy, RULES).verdicts[0].accepted
    old = {name: value for name, value in record.items() if name != "reading"}
    with pytest.raises(IntegrityError, match="other verdicts"):
        proposals.rejudged(old, request, sent, policy, RULES)
    [refused] = verdicts(sent, composed, reading=1)
    assert refused.code == "not_json"
    assert proposals.rejudged({**old, "verdicts": [refused.to_json()]}, request, sent, policy, RULES).verdicts == (
        refused,
    )
    with pytest.raises(IntegrityError, match="take a newer one"):
        proposals.rejudged({**record, "reading": 3}, request, sent, policy, RULES)


def test_case_13_an_address_that_cannot_be_asked_is_refused_before_a_campaign_has_a_folder(tmp_path):
    from pipeline.rounds.init import init

    with pytest.raises(ConfigError, match="leave_out names top_k"):
        init(Campaign.at(tmp_path / "new"), ["experiment=smoke", "policy=llm", "policy.proposals.leave_out=[top_k]"])
    assert not (tmp_path / "new").exists()
