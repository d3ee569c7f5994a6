"""Test that a conversation is kept within its bound by a pure rule, and always stays one that an endpoint takes."""

import copy

from hypothesis import given
from hypothesis import strategies as st

from substrate.agent import conversation
from substrate.agent.answers import Answer, Call
from substrate.agent.conversation import BLOCK, messages, most_tokens, num_tokens, turn_of, turn_of_text
from substrate.agent.task import Budget

FIRST = [{"role": "system", "content": "the job " * 50}, {"role": "user", "content": "the arm " * 50}]


def turn(number: int, sizes: list[int]) -> conversation.Turn:
    called = tuple(Call(f"c{number:04d}{place:04d}", "read", {"path": "a.py"}) for place in range(len(sizes)))
    return (
        turn_of(Answer("I read.", called), ["x" * size for size in sizes])
        if sizes
        else turn_of_text("Hm.", "Call a tool.")
    )


TURNS = st.lists(st.lists(st.integers(0, 5_000), max_size=4), max_size=25).map(
    lambda sizes: [turn(number, each) for number, each in enumerate(sizes)]
)


@given(TURNS, st.integers(300, 40_000))
def test_what_is_sent_fits_is_whole_and_is_a_function_of_the_turns(turns, most):
    before = copy.deepcopy(turns)
    sent = messages(FIRST, turns, most)
    assert turns == before and sent == messages(FIRST, turns, most)
    assert sent[:2] == FIRST
    last = turns[-1] if turns else []
    shortest = num_tokens([*FIRST, *last]) + 60  # with the sentence on what was left out
    assert num_tokens(sent) <= max(most + 60, shortest)
    if num_tokens([*FIRST, *(message for one in turns for message in one)]) <= most:
        assert sent == [*FIRST, *(message for one in turns for message in one)]
    # Every call has its reply, right behind it and in its order, and no reply is without a call.
    waiting: list[str] = []
    for message in sent[2:]:
        if message["role"] == "tool":
            assert message["tool_call_id"] == waiting.pop(0)
            continue
        assert not waiting
        waiting = [call["id"] for call in message.get("tool_calls", [])]
    assert not waiting
    # What the templates of Mistral, Hermes and Nemotron raise an exception for.
    spoken = [message["role"] for message in sent[1:] if message["role"] != "tool" and "tool_calls" not in message]
    assert spoken == [("user", "assistant")[place % 2] for place in range(len(spoken))]
    assert all(type(message["content"]) is str for message in sent)
    assert all(
        message["name"] == "read" and len(message["tool_call_id"]) == 9 for message in sent if message["role"] == "tool"
    )
    # The last turn is whole, but for the sentence before its first reply.
    if last:
        assert [message["content"] for message in sent[-len(last) :]][-1].endswith(last[-1]["content"])


def test_oldest_outputs_go_first_in_blocks_and_are_named_by_size():
    turns = [turn(number, [3_000]) for number in range(12)]
    most = num_tokens([*FIRST, *(message for one in turns for message in one)]) - 1
    sent = [message["content"] for message in messages(FIRST, turns, most) if message["role"] == "tool"]
    assert (
        sent[:BLOCK]
        == [
            "(This output of 3000 bytes was removed to keep the conversation short. Call the tool again if you need it.)"
        ]
        * BLOCK
    )
    assert sent[BLOCK:] == ["x" * 3_000] * (12 - BLOCK)


def test_a_long_session_keeps_the_beginning_that_an_endpoint_has_cached():
    """In most steps the request begins with the whole of the one before, so that the endpoint's cache holds."""
    turns = [turn(number, [2_000]) for number in range(40)]
    sent = [messages(FIRST, turns[:number], 12_000) for number in range(1, 41)]
    extended = sum(later[: len(earlier)] == earlier for earlier, later in zip(sent, sent[1:], strict=False))
    assert extended >= len(turns) * (1 - 1 / BLOCK) - 2


def test_turns_are_left_out_when_outputs_do_not_suffice():
    turns = [turn_of_text("y" * 3_000, "Go on.") for _ in range(12)]
    sent = messages(FIRST, turns, 6_000)
    assert num_tokens(sent) <= 6_060 and sent[2]["role"] == "assistant"
    assert sent[3]["content"].startswith("(8 earlier answers of yours") and sent[3]["content"].endswith("\nGo on.")


def test_the_bound_follows_the_budget():
    budget = Budget(steps=40, tokens=400_000, answer_tokens=4_096, attempts=3, gpu_seconds=600, wall_seconds=1_800)
    assert most_tokens(budget, 9_000) == 21_000  # the first request and ROOM_TOKENS
    assert most_tokens(budget, 1_000) == 20_000 - 4_096  # twice a step's tokens, less the answer
    large = Budget(steps=10, tokens=10**8, answer_tokens=4_096, attempts=3, gpu_seconds=600, wall_seconds=1_800)
    assert most_tokens(large, 9_000) == conversation.MOST_TOKENS


def test_a_command_is_not_recommended_again():
    called = tuple(Call(f"c{place:08d}", name, {}) for place, name in enumerate(("read", "run", "train")))
    turns = [turn_of(Answer("", called), ["x" * 900] * 3), turn_of_text("Hm.", "Go on.")]
    notes = [message["content"] for message in messages(FIRST, turns, 1)[2:] if message["role"] == "tool"]
    assert not notes  # the whole turn is left out
    notes = [message["content"] for message in messages(FIRST, turns, num_tokens([*FIRST, *turns[0], *turns[1]]) - 300)]
    assert [note.endswith("if you need it.)") for note in notes[3:6]] == [True, False, False]
