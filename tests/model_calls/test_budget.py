"""Budgets hold to the token under parallel calls, believe no usage that cannot be, and lose nothing when calls fail."""

import json
import random
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pipeline.model_calls.budget import MILLION, MOST_TOKENS, Budget, BudgetSpent, Charge, Limits, charge_of

RESERVED = Charge(1000, 100, True)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def budget(**changes: Any) -> Budget:
    return Budget(Limits(**{"steps": 5, "tokens": 1000, "answer_tokens": 100, "wall_seconds": 60.0, **changes}))


def spent(kind: str, asked: Budget, prompt: int = 10, answer: int = 100) -> BudgetSpent:
    with pytest.raises(BudgetSpent) as error:
        asked.reserve(prompt, answer)
    assert error.value.kind == kind and error.value.cure
    return error.value


def test_an_answer_is_lowered_to_what_is_left_and_the_last_token_can_be_spent():
    asked = budget()
    assert asked.reserve(850, 500) == Charge(850, 100, True)  # never more than answer_tokens
    asked.settle(RESERVED_OF(asked), Charge(840, 60))
    last = asked.reserve(90, 100)
    assert last == Charge(90, 10, True)
    asked.settle(last, Charge(90, 10))
    assert asked.held_tokens() == 1000
    spent("budget_tokens", asked, 1)


def RESERVED_OF(asked: Budget) -> Charge:
    return asked._held[-1]


def test_steps_money_and_wall_time_end_a_budget_by_their_own_kind():
    asked = budget(steps=1)
    asked.settle(asked.reserve(10, 10), Charge(1, 1))
    spent("budget_steps", asked)
    # 2 units per million prompt tokens, 10 per million answer tokens; 600 millionths of a unit
    asked = budget(money_millionths=600, prompt_price=2 * MILLION, answer_price=10 * MILLION)
    assert asked.reserve(250, 100).answer_tokens == 10  # 500 for the prompt, 100 for ten tokens
    asked.settle(RESERVED_OF(asked), Charge(250, 10))
    assert asked.spent().money_millionths == 600
    spent("budget_money", asked, 1)
    clock = Clock()
    asked = Budget(Limits(5, 1000, 100, 60.0), clock)
    clock.now = 60.0
    spent("budget_wall", asked)


def test_without_a_limit_of_money_prices_count_and_refuse_nothing():
    asked = budget(prompt_price=2 * MILLION, answer_price=10 * MILLION)
    asked.settle(asked.reserve(100, 100), Charge(100, 100))
    assert asked.spent().money_millionths == 1200
    asked = budget(prompt_price=5 * MILLION, money_millionths=500)  # answers cost nothing
    assert asked.reserve(100, 100).answer_tokens == 100
    spent("budget_money", budget(prompt_price=5 * MILLION, money_millionths=499), 100)


def test_money_is_exact_and_rounded_up_once():
    asked = budget(steps=10, money_millionths=10, prompt_price=1, answer_price=1)
    for _ in range(3):
        asked.settle(asked.reserve(1, 1), Charge(1, 1))
    assert asked.spent().money_millionths == 1  # six millionths of a millionth


def test_what_failed_costs_nothing():
    asked = budget(steps=1)
    for _ in range(5):
        asked.release(asked.reserve(500, 100))
    assert asked.held_tokens() == 0 and asked.spent().steps == 0


def test_an_endpoint_that_counts_more_than_it_was_allowed_ends_the_budget_and_is_charged():
    asked = budget(tokens=10_000)
    reserved = asked.reserve(100, 100)
    with pytest.raises(BudgetSpent, match="counted 5000 tokens for a call for which 200 were reserved"):
        asked.settle(reserved, Charge(4000, 1000))
    assert (asked.spent().prompt_tokens, asked.spent().answer_tokens) == (4000, 1000)
    spent("budget_tokens", asked)


def test_a_prompt_that_was_bounded_by_earlier_counts_may_have_more_as_long_as_the_limits_hold():
    asked = budget()
    asked.settle(asked.reserve(100, 100), Charge(500, 50), most_prompt=600)
    reserved = asked.reserve(100, 100)
    with pytest.raises(BudgetSpent, match="counted 550 tokens"):
        asked.settle(reserved, Charge(500, 50), most_prompt=600)  # 1,100 of 1,000 tokens
    assert asked.held_tokens() == 1100
    spent("budget_tokens", asked, 1)


def test_a_call_waits_for_what_others_return():
    asked = budget()
    first = asked.reserve(900, 100)
    taken: list[Charge] = []
    waiting = threading.Thread(target=lambda: taken.append(asked.reserve(400, 100)))
    waiting.start()
    time.sleep(0.05)
    assert not taken
    asked.settle(first, Charge(100, 10))
    waiting.join(5)
    assert taken == [Charge(400, 100, True)]


@examples(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 6000), st.integers(1, 60), st.integers(0, 5), st.integers(0, 5), st.integers(0, 20_000),
    st.integers(0, 2**32),
)  # fmt: skip
def test_parallel_calls_never_exceed_the_budget_and_lose_nothing(
    steps, tokens, most, prompt_price, answer_price, money, seed
):
    limits = Limits(steps, tokens, most, 60.0, money, prompt_price * MILLION, answer_price * MILLION)
    asked, charged, over, lock = Budget(limits), [], [], threading.Lock()

    def call(number: int) -> None:
        draw = random.Random(f"{seed}/{number}")
        for _ in range(6):
            try:
                reserved = asked.reserve(draw.randrange(400), draw.randrange(1, 100))
            except BudgetSpent:
                continue
            if asked.held_tokens() > tokens:
                over.append(asked.held_tokens())
            if draw.random() < 0.2:
                time.sleep(0.0002)
            if draw.random() < 0.3:
                asked.release(reserved)
                continue
            charge = Charge(draw.randint(0, reserved.prompt_tokens), draw.randint(0, reserved.answer_tokens))
            asked.settle(reserved, charge)
            with lock:
                charged.append(charge)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    total = asked.spent()
    assert not over and asked._held == []
    assert total.steps == len(charged) <= steps
    assert (
        total.prompt_tokens + total.answer_tokens
        == sum(charge.tokens for charge in charged)
        == asked.held_tokens()
        <= tokens
    )
    assert total.money_millionths <= money or money == 0


def body(usage: Any, **message: Any) -> bytes:
    return json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": "x", **message}}], "usage": usage}
    ).encode()


SAID = {
    "as vLLM says": (body({"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27}), Charge(20, 7)),
    "reasoning within": (
        body({"prompt_tokens": 20, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 5}}), Charge(20, 7)
    ),
    "reasoning apart": (
        body({"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 77, "completion_tokens_details": {"reasoning_tokens": 50}}),
        Charge(20, 57),
    ),
    "reasoning in the total alone": (body({"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 77}), Charge(20, 57)),
    "more reasoning than answer": (
        body({"prompt_tokens": 20, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 60}}), Charge(20, 60)
    ),
    "more than was allowed": (body({"prompt_tokens": 2000, "completion_tokens": 700}), Charge(2000, 700)),
    "a huge number": (body({"prompt_tokens": 10**40, "completion_tokens": 1}), Charge(MOST_TOKENS, 1)),
    "nothing for nothing": (body({"prompt_tokens": 20, "completion_tokens": 0}, content=None), Charge(20, 0)),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "charge"), SAID.values(), ids=SAID)
def test_usage_is_believed_where_it_can_be(answer, charge):
    assert charge_of(answer, RESERVED) == charge


NOT_BELIEVED = {
    "no usage": body(None),
    "no JSON": b"<html>",
    "a list": b"[]",
    "nothing at all": b"",
    "usage is a text": body("20"),
    "zero for something": body({"prompt_tokens": 0, "completion_tokens": 0}),
    "zero for a tool call": body({"prompt_tokens": 0, "completion_tokens": 0}, content=None, tool_calls=[{}]),
    "negative": body({"prompt_tokens": -5, "completion_tokens": -1}),
    "texts": body({"prompt_tokens": "5", "completion_tokens": "1"}),
    "floats": body({"prompt_tokens": 5.0, "completion_tokens": 1.5}),
    "booleans": body({"prompt_tokens": True, "completion_tokens": True}),
    "twice": b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1}, "usage": {}}',
}


@pytest.mark.parametrize("answer", NOT_BELIEVED.values(), ids=NOT_BELIEVED)
def test_usage_that_cannot_be_is_charged_as_the_bound(answer):
    assert charge_of(answer, RESERVED) == RESERVED


def test_prompt_and_answer_are_believed_apart():
    assert charge_of(body({"prompt_tokens": 20, "completion_tokens": 0}), RESERVED) == Charge(20, 100, True)
    assert charge_of(body({"completion_tokens": 7}), RESERVED) == Charge(1000, 7, True)
