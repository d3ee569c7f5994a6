"""What is sent again with each request: the first messages, and the turns since, kept within a bound by a fixed rule.

A turn is one answer of the model with the replies to it: a tool message for each call, or a user message. The oldest outputs are
replaced by a note of their size, then the oldest turns are left out. The first messages and the last turn always stay whole.

Chat templates differ in what they take. So contents are texts, never null; ids have nine letters and digits; a tool message has the
tool's name; and user and assistant alternate, calls and their outputs aside.
"""

from collections.abc import Sequence
from typing import Any

from substrate.agent.answers import Answer
from substrate.agent.socket_client import encode
from substrate.agent.task import Budget
from substrate.agent.watchdog import ACTS

Message = dict[str, Any]
Turn = list[Message]

BYTES_PER_TOKEN = 3  # of a request's JSON; English and code have about four
ROOM_TOKENS = 12_000  # for what follows the first messages: two outputs of 16 KiB, and an answer
MOST_TOKENS = 100_000  # models with 128 K tokens are common; a smaller context is found by its error (`loop.py`)
BLOCK = 4  # outputs, and turns, that go at once: in between, an endpoint's cache of the beginning still holds


def most_tokens(budget: Budget, first_tokens: int) -> int:
    """Returns how many tokens one request may have: twice what the budget has for each step, within ROOM_TOKENS and MOST_TOKENS.

    first_tokens: of the first request.
    """
    return min(MOST_TOKENS, max(first_tokens + ROOM_TOKENS, 2 * budget.tokens // budget.steps - budget.answer_tokens))


def num_tokens(value: Any) -> int:
    """Returns about how many tokens a JSON value has, from its bytes; no tokenizer is at hand."""
    return -(-len(encode(value)) // BYTES_PER_TOKEN)


def turn_of(answer: Answer, replies: Sequence[str]) -> Turn:
    """Returns the turn of an answer with calls, and a reply to each."""
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": encode(call.arguments).decode()},
        }
        for call in answer.calls
    ]
    asked: Message = {"role": "assistant", "content": answer.text, "tool_calls": calls}
    told = [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "name": call.name,
            "content": reply,
        }  # some templates ask for the name
        for call, reply in zip(answer.calls, replies, strict=True)
    ]
    return [asked, *told]


def turn_of_text(text: str, remark: str) -> Turn:
    """Returns the turn of an answer that had no call, or could not be read: what can be shown of it, and a remark on it."""
    return [
        {"role": "assistant", "content": text if text.strip() else "(no text)"},
        {"role": "user", "content": remark},
    ]


def messages(first: Sequence[Message], turns: Sequence[Turn], most: int) -> list[Message]:
    """Returns the messages of the next request. most: the tokens that they may have; what cannot be shortened may exceed it."""
    outputs = [
        (number, place)
        for number, turn in enumerate(turns[:-1])
        for place, message in enumerate(turn)
        if message["role"] == "tool" and len(message["content"]) > len(_note(message))
    ]
    shortened = [list(turn) for turn in turns]
    for start in range(0, len(outputs), BLOCK):
        if _tokens(first, shortened) <= most:
            break
        for number, place in outputs[start : start + BLOCK]:
            shortened[number][place] = shortened[number][place] | {"content": _note(shortened[number][place])}
    left_out = 0
    while _tokens(first, shortened[left_out:]) > most and left_out < len(turns) - 1:
        left_out = min(left_out + BLOCK, len(turns) - 1)
    kept = shortened[left_out:]
    if left_out:
        told = kept[0][1]
        words = f"({left_out} earlier answers of yours, and the replies to them, were left out to keep the conversation short.)"
        kept[0][1] = told | {"content": f"{words}\n{told['content']}"}
    return [*first, *(message for turn in kept for message in turn)]


def _tokens(first: Sequence[Message], turns: Sequence[Turn]) -> int:
    return num_tokens([*first, *(message for turn in turns for message in turn)])


def _note(message: Message) -> str:
    """Returns what stands in place of an output. Only a look is worth a second call; a command or a run would cost seconds again."""
    again = "" if message["name"] in ACTS else " Call the tool again if you need it."
    return (
        f"(This output of {len(message['content'].encode())} bytes was removed to keep the conversation short.{again})"
    )
