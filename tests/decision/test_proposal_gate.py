"""Test the gate: it refuses every hostile proposal with a reason, accepts every legal one, and judges equal bytes alike."""

import json
import re
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.campaign import constitution, strict_json
from pipeline.decision import proposal_gate, proposals
from pipeline.model_calls import failures
from tests.support.hostile import AXIS_OF, HOSTILE, OPEN, POLICY, REFERENCE, RULES, WHOLE, answer, proposal


def judge(content: bytes, **changes: Any) -> tuple[proposal_gate.ProposalVerdict, ...]:
    return proposal_gate.judge_answer(content, POLICY, REFERENCE, RULES, **changes)


def code(content: bytes) -> str:
    """The one refusal of an answer."""
    (verdict,) = judge(content)
    assert not verdict.accepted and verdict.setting is None
    assert verdict.article == proposal_gate.CODES[verdict.code]
    return verdict.code


@pytest.mark.parametrize("expected", WHOLE)
def test_an_answer_that_is_none(expected):
    for content in WHOLE[expected]:
        assert code(content) == expected, content[:80]
        assert judge(content)[0].slot == 0


def test_an_empty_list_proposes_nothing():
    assert judge(b'{"proposals": []}') == ()


@pytest.mark.parametrize(
    "content", [b"[" * 65_000, b'"' + b'\\"' * 32_000, b'{"a":' * 13_000, b"1" * 65_000, b"[1e" + b"9" * 65_000 + b"]"]
)
def test_hostile_bytes_cost_little(content):
    began = time.perf_counter()
    judge(content)
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize("expected", HOSTILE)
def test_a_hostile_proposal_has_its_reason(expected):
    for each in HOSTILE[expected]:
        assert code(answer(each)) == expected, each


def test_what_takes_no_part_in_the_standing_recipe_is_compared_with_the_reference():
    assert (
        code(answer(proposal(axis="style", key="recipe.trace_style", value=REFERENCE["recipe.trace_style"])))
        == "unchanged"
    )
    (back,) = judge(answer(proposal(axis="lora_rank", key="recipe.lora.rank", value=REFERENCE["recipe.lora.rank"])))
    assert back.accepted  # the reference's rank is a move away from the standing one


def test_a_proposal_twice_counts_once():
    first, second, third = judge(answer(proposal(), proposal(value="0.00300"), proposal(value="0.005")))
    assert first.accepted and third.accepted and second.code == "repeated"


def test_within_an_answer_an_axis_has_one_key_and_a_key_one_axis():
    epochs, steps = {"key": "recipe.epochs", "value": "1"}, {"key": "recipe.warmup_steps", "value": "1"}
    twice = judge(answer(proposal(axis="foo", **epochs), proposal(axis="bar", **epochs | {"value": "2"})))
    assert [verdict.code for verdict in twice] == ["", "wrong_axis"]
    both = judge(answer(proposal(axis="foo", **epochs), proposal(axis="foo", **steps)))
    assert [verdict.code for verdict in both] == ["", "wrong_axis"]


def test_what_makes_no_configuration_does_not_fit():
    asked = []

    def fits(arm: tuple[tuple[str, str], ...]) -> str:
        asked.append(arm)
        return "" if ("recipe.learning_rate", "0.003") in arm else "no"

    first, second = judge(answer(proposal(), proposal(value="0.005")), fits=fits)
    assert first.accepted and second.code == "does_not_fit"
    assert asked[0] == (*POLICY.standing, ("recipe.learning_rate", "0.003"))


def test_one_refused_proposal_does_not_touch_the_others():
    verdicts = judge(answer(proposal(), proposal(key="z"), proposal(value="0.005")))
    assert [verdict.accepted for verdict in verdicts] == [True, False, True]
    assert [verdict.slot for verdict in verdicts] == [1, 2, 3]


def hostile_numbers() -> st.SearchStrategy[str]:
    """Spellings of numbers that are none of ours, and numbers beyond the learning rate's range."""
    outside = st.decimals("0.06", 10**9, places=3) | st.decimals(-(10**9), 0, places=3)
    spelled = st.decimals("0.001", "0.05", places=4).flatmap(
        lambda number: st.sampled_from(
            [
                f"+{number}",
                f"{number:.3e}",
                f"0{number}",
                f" {number}",
                f"{number}f",
                str(number).replace(".", ","),
                str(number).translate({ord(d): 0xFF10 + int(d) for d in "0123456789"}),
                f"${{x:{number}}}",
                f"{number}_0",
            ]
        )
    )
    return outside.map(lambda number: format(number, "f")) | spelled


def hostile() -> st.SearchStrategy[Any]:
    """A thousand ways not to be let in: a table entry, a closed key, a number that is none, an unwanted type, or any text at all."""
    closed = st.text(max_size=60).filter(lambda text: text not in OPEN)
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3)
    )
    return st.one_of(
        st.sampled_from([each for group in HOSTILE.values() for each in group]),
        closed.map(lambda key: proposal(key=key)),
        hostile_numbers().map(lambda value: proposal(value=value)),
        anything.filter(lambda value: not isinstance(value, str)).map(lambda value: proposal(value=value)),
        st.text(max_size=30)
        .filter(lambda text: not re.fullmatch(r"0\.0\d*", text))
        .map(lambda value: proposal(value=value)),
        st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=6).filter(
            lambda found: set(found) != set(proposal_gate.FIELDS)
        ),
    )


@settings(max_examples=1000)
@given(hostile())
def test_a_thousand_hostile_proposals_and_none_passes(found):
    verdicts = judge(answer(found))
    assert [verdict.accepted for verdict in verdicts] == [False]
    assert verdicts[0].code in proposal_gate.CODES and verdicts[0].what
    assert len(verdicts[0].what) < 300 and verdicts[0].what.isascii() and verdicts[0].what.isprintable()


def legal() -> st.SearchStrategy[dict[str, Any]]:
    """Any open key with any value in its range, by any spelling of plain decimals."""

    def value_of(key: str) -> st.SearchStrategy[str]:
        rule = OPEN[key]
        if rule["type"] == "choice":
            return st.sampled_from(rule["choices"])
        if rule["type"] == "integer":
            return st.integers(int(rule["low"]), int(rule["high"])).map(str)
        return st.decimals(rule["low"], rule["high"], places=12).flatmap(
            lambda number: st.sampled_from([format(number, "f"), proposal_gate.plain_number(format(number, "f"))])
        )

    def whole(key: str) -> st.SearchStrategy[dict[str, Any]]:
        axis = st.just(AXIS_OF[key]) if key in AXIS_OF else st.from_regex(r"new_[a-z0-9_]{0,30}", fullmatch=True)
        hypothesis = st.text(
            st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), max_size=proposal_gate.MAX_HYPOTHESIS
        )
        plain = hypothesis.filter(lambda text: not proposal_gate._UNPRINTABLE.search(text))
        return st.builds(proposal, axis=axis, key=st.just(key), value=value_of(key), hypothesis=plain)

    def moves(found: dict[str, Any]) -> bool:
        key, value = found["key"], found["value"]
        numeric = OPEN[key]["type"] != "choice"
        current = {**REFERENCE, **dict(POLICY.standing)}[key]
        others = [current, *(dead for at, dead in POLICY.dead_ends if at == key)]
        return all(Decimal(value) != Decimal(other) if numeric else value != other for other in others)

    return st.sampled_from(sorted(set(REFERENCE) - {"recipe.clip_norm"})).flatmap(whole).filter(moves)


@settings(max_examples=1000)
@given(legal())
def test_a_thousand_legal_proposals_and_all_pass(found):
    (verdict,) = judge(answer(found))
    assert verdict.accepted, verdict
    key, value = verdict.setting
    assert key == found["key"]
    RULES.check_settings([(key, value)])
    if OPEN[key]["type"] != "choice":
        assert Decimal(value) == Decimal(found["value"]) and value == proposal_gate.plain_number(value)
        assert value == "0" or not (value.endswith("0") and "." in value)


@given(
    st.binary(max_size=300)
    | st.text(max_size=200).map(str.encode)
    | st.lists(hostile(), max_size=4).map(lambda found: answer(*found))
)
def test_any_bytes_have_a_verdict_and_always_the_same(content):
    verdicts = judge(content)
    assert verdicts == judge(bytes(bytearray(content)))
    for verdict in verdicts:
        assert json.loads(json.dumps(verdict.to_json()))["accepted"] is verdict.accepted


@given(st.binary(max_size=200))
def test_any_envelope_has_a_content(envelope):
    assert proposal_gate.content_of(envelope, 1000) in (b"",)


def test_the_content_of_an_envelope():
    def envelope(content: Any) -> bytes:
        return json.dumps(
            {"id": "x", "choices": [{"message": {"content": content}, "logprobs": [0.5]}], "usage": {}}
        ).encode()

    assert proposal_gate.content_of(envelope(answer(proposal()).decode()), 10_000) == answer(proposal())
    for absent in (None, 1, {"a": 1}, "\ud800"):
        assert proposal_gate.content_of(envelope(absent), 10_000) == b""
    assert proposal_gate.content_of(envelope("x"), 10) == b""
    assert proposal_gate.content_of(b'{"choices": []}', 1000) == b""


@pytest.mark.parametrize(
    ("text", "plain"),
    [("0.0100", "0.01"), ("-0", "0"), ("-0.000", "0"), ("10", "10"), ("100.0", "100"), ("0", "0"), ("-1.50", "-1.5")],
)
def test_a_number_has_one_spelling(text, plain):
    assert proposal_gate.plain_number(text) == plain


DOCUMENTED = dict(re.findall(r"^\| `(\w+)` \| (\d+|[a-z]\w*)", Path("docs/proposals.md").read_text(), re.MULTILINE))


def test_every_code_is_in_the_table_with_its_article():
    ours = {
        name: article
        for name, article in DOCUMENTED.items()
        if not name.startswith(("endpoint_", "answer_")) and name not in ("shadow", "active")
    }
    assert ours == dict(proposal_gate.CODES)
    of_agents = {"endpoint_not_served"}  # no proposer is served by the round
    assert {name for name in DOCUMENTED if name.startswith("endpoint_")} == set(failures.KINDS) - of_agents
    assert {name for name in DOCUMENTED if name.startswith("answer_")} == set(proposals.ANSWER_CODES)


def test_every_code_that_the_source_raises_is_known_and_reached():
    source = Path(proposal_gate.__file__).read_text()
    raised = set(re.findall(r'(?:_Refusal\(|refused\(slot, )\s*"(\w+)"', source)) | set(
        re.findall(r'\("(\w+)", _[A-Z]+, "', source)
    )
    raised |= set(re.findall(r'Refused\(\s*"2",\s*"(\w+)"', Path(constitution.__file__).read_text()))
    of_reader = set(re.findall(r'BadJson\("(\w+)"', Path(strict_json.__file__).read_text()))
    raised |= of_reader - {"not_whole"}  # the gate reads no number
    assert raised == set(proposal_gate.CODES)
    assert {*WHOLE, *HOSTILE, "repeated", "does_not_fit"} == set(proposal_gate.CODES)
