"""Test the list of submissions: a longer log never changes what a shorter one said, and the newest entry for a number counts."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import ConfigError, IntegrityError
from pipeline.decision.board_submissions import (
    known_scores,
    parse_score,
    reference_score,
    submissions_in,
)
from pipeline.decision.submission_caps import Caps
from tests.support.submissions import DAY, Log


def scored_log() -> Log:
    log = Log()
    wide = Caps(100, 100, 0, 2)
    for copy in (1, 2):
        log.reserve("reference", purpose="reference", copy=copy, caps=wide)
    for arm in ("a1", "a2", "a3"):
        log.reserve(arm, caps=wide)
    return log


def test_late_revised_and_withdrawn_scores_change_what_comes_after_them():
    log = scored_log()
    assert known_scores(log) == {} and reference_score(log) is None
    log.score(3, "0.84")
    log.score(1, "0.80")
    seen = [list(log)]
    log.score(4, None, why="unreachable: no route")  # missing
    log.score(3, "0.85")  # revised
    log.score(2, "0.81")
    seen.append(list(log))
    log.score(4, "0.7")  # late
    log.score(3, None, withdrawn=True)
    seen.append(list(log))
    log.score(2, None, withdrawn=True)
    log.score(3, "0.85")  # and given back
    assert [known_scores(prefix) for prefix in (*seen, log)] == [
        {"r0001": {"a1": Decimal("0.84")}},
        {"r0001": {"a1": Decimal("0.85")}},
        {"r0001": {"a2": Decimal("0.7")}},
        {"r0001": {"a2": Decimal("0.7"), "a1": Decimal("0.85")}},
    ]
    assert [reference_score(prefix) for prefix in (*seen, log)] == [
        Decimal("0.80"), Decimal("0.805"), Decimal("0.805"), Decimal("0.80")
    ]  # fmt: skip
    assert [one.state for one in submissions_in(log)] == ["scored", "withdrawn", "scored", "scored", "reserved"]


def test_finalists_are_not_mixed_with_what_was_sent_to_be_judged():
    log, wide = scored_log(), Caps(100, 100, 2, 2)
    log.score(3, "0.84")
    for copy, score in ((1, "0.83"), (2, "0.85")):
        log.score(log.reserve("a1", purpose="finalist", copy=copy, caps=wide), score)
    assert known_scores(log) == {"r0001": {"a1": Decimal("0.84")}}


events = st.one_of(
    st.tuples(st.just("score"), st.integers(1, 5), st.one_of(st.none(), st.integers(0, 100))),
    st.tuples(st.just("withdraw"), st.integers(1, 5), st.none()),
    st.tuples(st.just("attempt"), st.integers(1, 5), st.none()),
    st.tuples(st.just("sent"), st.integers(1, 5), st.none()),
)


@given(st.lists(events, max_size=30))
def test_the_newest_word_on_a_number_counts(happened):
    """Against a dictionary that is overwritten."""
    log, newest = scored_log(), {}
    for kind, number, value in happened:
        if kind in ("attempt", "sent"):
            log.append({"event": f"board_{kind}", "number": number, "day": DAY})
            continue
        printed = None if value is None else f"{value // 100}.{value % 100:02d}"
        log.score(number, printed, **({"withdrawn": True} if kind == "withdraw" else {}))
        newest[number] = printed
    arms = {number: f"a{number - 2}" for number in (3, 4, 5)}
    expected = {arms[number]: Decimal(text) for number, text in newest.items() if text and number > 2}
    assert known_scores(log) == ({"r0001": expected} if expected else {})
    repeats = [Decimal(text) for number, text in newest.items() if text and number <= 2]
    assert reference_score(log) == (sum(repeats) / len(repeats) if repeats else None)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"event": "board_score", "number": 1, "score": "0.5"}, "nobody reserved"),
        ({"event": "board_attempt", "number": "1", "day": DAY}, "nobody reserved"),
        ({"event": "submission", "number": 2}, "follows number 0"),
    ],
)
def test_records_that_contradict_one_another_are_named(record, what):
    with pytest.raises(IntegrityError, match=what):
        submissions_in([record])


@pytest.mark.parametrize("printed", ["1.5", "0.123456", ".5", "nan", "1e-1", "-0", 0.5, "٠.٥", "0.5\n"])
def test_a_score_that_no_target_prints_is_damage_in_the_log_and_a_mistake_of_a_person(printed):
    log = scored_log()
    log.score(1, printed)
    with pytest.raises(IntegrityError, match="number 1"):
        submissions_in(log)
    if isinstance(printed, str):
        with pytest.raises(ConfigError, match="Valid: a decimal from 0 to 1"):
            parse_score(printed)


@given(st.integers(0, 10**5))
def test_every_decimal_of_five_places_is_a_score(value):
    text = f"{value // 10**5}.{value % 10**5:05d}"
    assert Decimal(parse_score(text)) == Decimal(value) / 10**5
