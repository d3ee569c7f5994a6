"""Test that the caps on submissions hold for any requests, in any order and at any time."""

from dataclasses import replace
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import ConfigError, IntegrityError, Refused
from pipeline.decision.board_submissions import submissions_in
from pipeline.decision.submission_caps import Caps, counted_day, left_of, verify
from tests.support.submissions import BEFORE, CAPS, DAY, NEXT, Log


def code_of(log: Log, **asked) -> str:
    before = list(log)
    with pytest.raises(Refused) as refused:
        log.reserve(**asked)
    assert log == before and refused.value.article == "4" and refused.value.exit_code == 3
    return refused.value.code


def test_numbers_count_up_and_a_requeue_gets_its_own_again():
    log = Log()
    assert [log.reserve(arm) for arm in ("a1", "a2", "a1", "a3", "a2")] == [1, 2, 1, 3, 2]
    assert log.reserve("a1", today=NEXT) == 1  # its cap was spent on the day before


def test_the_reference_is_sent_so_often_and_no_oftener():
    log = Log()
    asked = {"arm": "reference", "purpose": "reference", "digest": "reference"}
    assert [log.reserve(copy=copy, **asked) for copy in (1, 2, 1, 2)] == [1, 2, 1, 2]
    assert log.reserve(copy=2, round_name="r0002", **asked) == 2  # of the campaign, not of the round
    assert code_of(log, copy=3, **asked) == "already_submitted"


def test_a_slot_is_sent_once_and_as_what_it_was():
    log = Log()
    log.reserve("a1")
    assert code_of(log, arm="a1", copy=2) == "already_submitted"
    assert code_of(log, arm="a1", digest="another adapter") == "already_submitted"
    assert log.reserve("a1", round_name="r0002") == 2


def test_finalists_are_repeated_from_what_was_held_back():
    log, wide = Log(), replace(CAPS, per_day=100)
    for arm in range(7):
        log.reserve(f"a{arm}", caps=wide)
    assert code_of(log, arm="a7", caps=wide) == "held_back"
    finals = [log.reserve("a1", purpose="finalist", copy=copy, caps=wide) for copy in (1, 2)]
    assert finals == [8, 9]
    assert code_of(log, arm="a1", purpose="finalist", copy=3, caps=wide) == "campaign_cap"
    assert left_of(submissions_in(log), wide, DAY) == {"day": 91, "campaign": 0, "finalists": 0}


def test_the_daily_cap_and_a_clock_that_is_set_back():
    log = Log()
    for arm in ("a1", "a2", "a3"):
        log.reserve(arm)
    assert code_of(log, arm="a4") == "daily_cap"
    assert code_of(log, arm="a4", today=BEFORE) == "daily_cap"
    assert code_of(log, arm="a4", today="1999-01-01") == "daily_cap"
    assert log.reserve("a4", today=NEXT) == 4
    assert submissions_in(log)[3].day == NEXT
    log.reserve("a5", today=BEFORE)
    assert submissions_in(log)[4].day == NEXT  # never before the newest in the log


def test_what_is_sent_on_another_day_counts_there_too():
    log = Log()
    for arm in ("a1", "a2", "a3"):
        log.reserve(arm)
    for number in (1, 2, 3):
        log.attempt(number, NEXT)
    assert code_of(log, arm="a4", today=NEXT) == "daily_cap"
    log.attempt(1, NEXT)  # to try again on its own day takes no more of it
    log = Log()
    for arm in ("a1", "a2", "a3"):
        log.reserve(arm)
    log.reserve("a4", today=NEXT)
    for number in (1, 2):
        log.attempt(number, NEXT)
    with pytest.raises(Refused, match="daily_cap"):
        log.attempt(3, NEXT)


@pytest.mark.parametrize("today", ["yesterday", "2026-11-31", "20261124", "2026-11-24T10:00", ""])
def test_what_is_no_day_is_refused(today):
    with pytest.raises(ConfigError, match="ISO date"):
        counted_day((), today)


requests = st.tuples(
    st.sampled_from(["a0", "a1", "a2", "a3", "reference"]),
    st.sampled_from(["r0001", "r0002"]),
    st.sampled_from(["slot", "finalist"]),
    st.integers(1, 3),
    st.integers(-400, 400),  # days by which the clock is wrong
    st.booleans(),
)
all_caps = st.builds(Caps, st.integers(0, 4), st.integers(0, 8), st.integers(0, 3), st.integers(0, 3))


@given(st.lists(requests, max_size=40), all_caps)
def test_caps_hold_whatever_is_asked_on_whatever_clock(asked, caps):
    log = Log()
    for arm, round_name, purpose, copy, shift, is_sent in asked:
        today = (date(2026, 11, 24) + timedelta(days=shift)).isoformat()
        purpose = "reference" if arm == "reference" else purpose
        newest = max([day for one in submissions_in(log) for day in one.days], default="")
        try:
            number = log.reserve(arm, round_name, purpose, today, caps, copy, digest=arm)
            if is_sent:
                log.attempt(number, today, caps)
        except Refused as refused:
            assert refused.code in ("daily_cap", "campaign_cap", "held_back", "already_submitted")
            continue
        again = list(log)
        assert log.reserve(arm, round_name, purpose, BEFORE, caps, copy, digest=arm) == number and log == again
        assert max(day for one in submissions_in(log) for day in one.days) >= newest
    known = submissions_in(log)
    assert verify(log, caps) == len(known)
    assert [one.number for one in known] == list(range(1, len(known) + 1))
    assert len(known) <= caps.per_campaign
    assert sum(one.purpose != "finalist" for one in known) <= max(0, caps.per_campaign - caps.held_back)
    assert sum(one.purpose == "reference" for one in known) <= caps.reference
    for day in {day for one in known for day in one.days}:
        assert sum(day in one.days for one in known) <= caps.per_day
    for one in known:
        assert min(left_of(known, caps, one.day).values()) >= 0


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ([{"arm": "a4"}], "3 are allowed"),
        ([{"arm": "a4", "day": BEFORE}], "3 are allowed"),
        ([{"arm": "a4", "day": NEXT}, {"arm": "a5", "day": DAY, "number": 5}], "should be 5 of 2026-11-25"),
        ([{"arm": "a1", "day": NEXT}], "sent 1 times"),
        ([{"arm": "a4", "day": NEXT, "number": 9}], "should be 4"),
        ([{"arm": "a4", "day": NEXT, "purpose": "gift"}], "purpose 'gift'"),
    ],
)
def test_an_audit_names_the_submission_that_was_not_allowed(more, what):
    log = Log()
    for arm in ("a1", "a2", "a3"):
        log.reserve(arm)
    assert verify(log, CAPS) == 3
    log.extend({**log[-1], "number": 4, "adapter_digest": "r0001/a1", **change} for change in more)
    with pytest.raises(IntegrityError, match=what):
        verify(log, CAPS)


def test_an_audit_names_the_act_of_sending_that_the_cap_forbids():
    log = Log()
    for arm, day in (("a1", BEFORE), ("a2", BEFORE), ("a3", BEFORE), ("a4", DAY)):
        log.reserve(arm, today=day)
    log.extend({"event": "board_attempt", "number": number, "day": DAY} for number in (1, 2))
    assert verify(log, CAPS) == 4
    log.append({"event": "board_attempt", "number": 3, "day": DAY})
    with pytest.raises(
        IntegrityError, match="sending submission 3 was not allowed: .*3 submissions count on 2026-11-24"
    ):
        verify(log, CAPS)
