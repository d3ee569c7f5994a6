"""Manifests are read strictly, and what an audit derives from a transcript is what was accepted and used."""

import copy
import json
from typing import Any

import pytest

from pipeline.campaign.errors import IntegrityError
from pipeline.model_calls.chat_request import compose
from pipeline.model_calls.derive_run import of_transcript, outcome_of, why_ended
from pipeline.model_calls.manifest import BadManifest, read_manifest
from pipeline.model_calls.prompt_bounds import by_bytes
from pipeline.model_calls.transcript import Writer, load
from tests.support.relays import MANIFEST, REQUEST, agents_endpoint

FULL: dict[str, Any] = {
    **copy.deepcopy(dict(MANIFEST)), "axis": "learning_rate", "change": "data", "hypothesis": "Short ones first.\nThey carry over.",
    "tried": [{"what": "sorted", "outcome": "better"}], "failed": [{"what": "a typo", "kind": "smoke", "repaired": True}],
    "equivalent_settings": [["recipe.curriculum", "short_first"]],
}  # fmt: skip


def test_typed_fields_are_kept_and_free_text_only_as_a_digest():
    read = read_manifest(FULL, "learning_rate")
    assert read.typed == {
        "axis": "learning_rate", "change": "data", "expected_effect": "none", "tried": ["better"],
        "failed": [{"kind": "smoke", "repaired": True}], "checkpoint": "last", "equivalent_settings": [["recipe.curriculum", "short_first"]],
    }  # fmt: skip
    for name, text in (
        ("hypothesis", "other"),
        ("summary", "other"),
        ("checkpoint", {"choice": "last", "why": "other"}),
    ):
        other = read_manifest({**FULL, name: text}, "learning_rate")
        assert other.typed == read.typed and other.texts_sha256 != read.texts_sha256
    for free in ("Short ones", "a typo", "sorted"):
        assert free not in json.dumps(read.typed)


WRONG = [
    (None, "the manifest is None"), ([], "an object with hypothesis"), ({**FULL, "extra": 1}, "has 'extra'"),
    ({name: value for name, value in FULL.items() if name != "summary"}, "lacks summary"),
    ({**FULL, "hypothesis": "x" * 601}, "has 601 characters. Valid: a text of at most 600"), ({**FULL, "summary": 5}, "summary is 5"),
    ({**FULL, "summary": "a\x1b[2J"}, "does not print"), ({**FULL, "summary": "a\ud800"}, "does not print"),
    ({**FULL, "summary": "a\u202eb"}, "does not print"), ({**FULL, "axis": None}, "learning_rate, the arm's axis"),
    ({**FULL, "change": "data "}, "one of none, data"), ({**FULL, "change": ["data"]}, "one of none, data"),
    ({**FULL, "expected_effect": "huge"}, "large_gain"), ({**FULL, "tried": [{}]}, r"tried\[0\] lacks what"),
    ({**FULL, "tried": [{"what": "a", "outcome": "good"}]}, r"tried\[0\].outcome is 'good'"),
    ({**FULL, "tried": FULL["tried"] * 21}, "has 21 entries"), ({**FULL, "tried": "none"}, "a list of at most 20"),
    ({**FULL, "failed": [{"what": "a", "kind": "edit", "repaired": 1}]}, "true or false"),
    ({**FULL, "failed": [{"what": "a" * 201, "kind": "edit", "repaired": True}]}, "201 characters"),
    ({**FULL, "checkpoint": {"choice": "first", "why": ""}}, "one of last, best, average"), ({**FULL, "checkpoint": "last"}, "an object"),
    ({**FULL, "equivalent_settings": [["recipe.x", 5]]}, "a pair of texts"), ({**FULL, "equivalent_settings": [["x", "5"]]}, "a pair"),
    ({**FULL, "equivalent_settings": [["recipe.x", "${oc.env:HOME}"]]}, "a pair"), ({**FULL, "equivalent_settings": [["recipe.x"]]}, "a pair"),
    ({**FULL, "equivalent_settings": [["recipe._target_", "a b"]]}, "a pair"), ({**FULL, "equivalent_settings": [[]] * 6}, "6 entries"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "words"), WRONG)
def test_everything_else_is_refused_with_what_came_and_what_is_valid(value, words):
    with pytest.raises(BadManifest, match=words) as error:
        read_manifest(value, "learning_rate")
    assert str(error.value).isascii() and len(str(error.value)) < 400 and "Valid: " in str(error.value)


def test_an_arm_without_an_axis_says_null():
    assert read_manifest(MANIFEST, None).typed["axis"] is None
    with pytest.raises(BadManifest, match="null, because"):
        read_manifest(FULL, None)


def written(tmp_path, *events: tuple[str, Any, dict[str, Any]]):
    writer = Writer(tmp_path / "t")
    for kind, content, fields in events:
        writer.append(kind, content, **fields)
    writer.close()
    return load(tmp_path / "t").records


SENT = compose(agents_endpoint(), REQUEST, 50)
ANSWER = b'{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}'


def tool(number: int, name: str, arguments: Any, failure: str = "", **facts: Any):
    return [
        ("tool", json.dumps(arguments).encode(), {"tool": number, "name": name}),
        (
            "tool_result",
            b"",
            {"tool": number, "ok": not failure, "failure": failure, "what": "", "truncated": False, "facts": facts},
        ),
    ]


def test_usage_manifest_and_outcome_follow_from_the_events(tmp_path):
    run = of_transcript(
        written(
            tmp_path,
            ("request", SENT, {"call": 0, "prompt_bound": 5000}), ("answer", ANSWER, {"call": 0, "tries": 1, "prompt_tokens": 9, "answer_tokens": 2}),
            *tool(0, "train", {"num_steps": 2}, "trial_failed"), *tool(1, "train", {"num_steps": 2}),
            *tool(2, "train", {"num_steps": None}, "budget_gpu_seconds"), *tool(3, "train", {"num_steps": None}),
            ("request", SENT, {"call": 1, "prompt_bound": 5000}),
            ("failure", None, {"call": 1, "tries": 1, "failure": "endpoint_server", "what": ""}),
            ("answer", b"no JSON", {"call": 1, "tries": 2, "prompt_tokens": by_bytes(REQUEST), "answer_tokens": 50}),
            *tool(4, "finish", {**FULL, "change": 5}, "bad_manifest"), *tool(5, "finish", FULL),
        ),
        "learning_rate",
    )  # fmt: skip
    assert run.manifest == read_manifest(FULL, "learning_rate") and run.outcome == "completed"
    assert (run.usage.steps, run.usage.prompt_tokens, run.usage.answer_tokens) == (2, 9 + by_bytes(REQUEST), 52)
    assert (run.usage.tool_calls, run.usage.full_runs, run.usage.smoke_runs, run.usage.failed_tries) == (6, 1, 2, 1)


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ([], "agent_contract"),
        ([("end", None, {"outcome": "watchdog_stalls", "what": ""})], "agent_watchdog"),
        ([("end", None, {"outcome": "malformed", "what": ""})], "agent_malformed"),
        ([("end", None, {"outcome": "endpoint_limit", "what": ""})], "agent_endpoint"),
        ([("end", None, {"outcome": "budget_tokens", "what": ""})], "agent_budget"),
        ([("end", None, {"outcome": "budget_gpu_seconds", "what": ""})], "agent_gpu_seconds"),
        (tool(0, "finish", FULL), "agent_no_adapter"),
        ([*tool(0, "train", {"num_steps": 3}), *tool(1, "finish", FULL)], "agent_no_adapter"),
        ([*tool(0, "train", {"num_steps": None}, "closed_path"), *tool(1, "finish", FULL)], "agent_closed_path"),
        ([*tool(0, "train", {"num_steps": None}, "budget_gpu_seconds"), *tool(1, "finish", FULL)], "agent_gpu_seconds"),
        ([*tool(0, "train", {"num_steps": None}, "bad_arguments"), *tool(1, "finish", FULL)], "agent_no_adapter"),
        ([*tool(0, "train", {"num_steps": None}, "trial_failed", kind="diverged"),
          *tool(1, "train", {"num_steps": None}, "budget_attempts"), *tool(2, "finish", FULL)], "diverged"),
        ([*tool(0, "train", {"num_steps": None}, "trial_failed", kind="crashed"), *tool(1, "train", {"num_steps": None}),
          *tool(2, "finish", FULL)], "completed"),
    ],
)  # fmt: skip
def test_each_end_has_its_outcome(events, outcome, tmp_path):
    assert of_transcript(written(tmp_path, *events), "learning_rate").outcome == outcome


def test_a_transcript_that_claims_another_charge_or_manifest_is_found(tmp_path):
    charged = {"call": 0, "tries": 1, "prompt_tokens": 9, "answer_tokens": 1}
    with pytest.raises(IntegrityError, match="charges other tokens"):
        of_transcript(
            written(tmp_path, ("request", SENT, {"call": 0, "prompt_bound": 5000}), ("answer", ANSWER, charged)), None
        )
    (tmp_path / "t").unlink()
    with pytest.raises(IntegrityError, match="charges other tokens"):
        of_transcript(written(tmp_path, ("answer", ANSWER, charged)), None)
    (tmp_path / "t").unlink()
    with pytest.raises(IntegrityError, match="is none"):
        of_transcript(written(tmp_path, *tool(0, "finish", FULL)), "other_axis")


def test_an_outcome_that_no_rule_knows_breaks_the_contract():
    assert outcome_of("closed") == outcome_of("") == "agent_contract"


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([*tool(0, "train", {"num_steps": None}), *tool(1, "finish", FULL)], ""),
        (
            [
                *tool(0, "train", {"num_steps": None}, "budget_gpu_seconds", kind="timeout", gpu_seconds=302),
                *tool(1, "finish", FULL),
            ],
            "its full run was cut off, because 302 of 300 GPU-seconds were used",
        ),
        (
            [*tool(0, "train", {"num_steps": None}, "budget_gpu_seconds"), *tool(1, "finish", FULL)],
            "its full run was refused, because 302 of 300 GPU-seconds were used",
        ),
        (
            [*tool(0, "train", {"num_steps": None}, "closed_path"), *tool(1, "finish", FULL)],
            "article 16 refused its full run, because its edits (substrate/answers.py) go beyond the open paths",
        ),
        (
            [*tool(0, "train", {"num_steps": None}, "trial_failed", kind="crashed"), *tool(1, "finish", FULL)],
            "its last full run does not count: crashed",
        ),
        (tool(0, "finish", FULL), "it handed in its manifest and never asked for the full run"),
        (
            [("end", None, {"outcome": "watchdog_repeats", "what": "the same call 5 times"})],
            "watchdog_repeats: the same call 5 times",
        ),
        ([], "its loop broke off without saying why"),
    ],
)
def test_why_a_run_ended_is_told_with_its_cause_and_not_with_the_manifest_alone(tmp_path, events, why):
    records = written(tmp_path, *events)
    run = of_transcript(records, "learning_rate")
    assert why_ended(records, run, "302 of 300 GPU-seconds", ["substrate/answers.py"]) == why
    if "cut off" in why:
        assert run.outcome == "agent_gpu_seconds" and run.usage.full_runs == 1
