"""The bounds of prompts hold for every tokenizer that we can build here, and a conversation's bound follows what was counted."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pipeline.model_calls.prompt_bounds import MESSAGE_TOKENS, PromptBounds, by_bytes
from tests.support.relays import REQUEST

TEXTS = st.text(st.characters(exclude_categories=[]), max_size=60)


def bytes_of(request: dict[str, Any]) -> int:
    """What the worst tokenizer counts: each byte of every text is a token, and a template writes ten around a message."""
    texts = [message[name] for message in request["messages"] for name in ("role", "content")]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) + 10 * len(request["messages"]) + 300


@examples(max_examples=200)
@given(st.lists(TEXTS, min_size=1, max_size=8))
def test_no_prompt_has_more_tokens_than_its_bound(texts):
    request = {"messages": [{"role": "user", "content": text} for text in texts]}
    assert bytes_of(request) <= by_bytes(request)


@examples(max_examples=200)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(0, 6), st.lists(TEXTS, max_size=4), st.integers(1, 8))
def test_a_bound_by_counts_holds_whatever_the_tokenizer_and_wherever_the_conversations_part(
    texts, kept, more, bytes_a_token
):
    def counted(request: dict[str, Any]) -> int:
        pieces = [len(each["content"].encode("utf-8", "surrogatepass")) for each in request["messages"]]
        return sum(-(-piece // bytes_a_token) + 8 for piece in pieces) + 200

    first = {"messages": [{"role": "user", "content": text} for text in texts], "tools": [{"type": "function"}]}
    then = {
        **first,
        "messages": first["messages"][:kept] + [{"role": "tool", "content": text} for text in more]
        or first["messages"],
    }
    bounds = PromptBounds()
    bounds.learn(first, counted(first), by_bytes(first))
    assert counted(then) <= bounds.of(then) <= by_bytes(then)


def test_a_long_conversation_is_bounded_by_what_was_counted():
    long = {"messages": [{"role": "user", "content": "word " * 10_000}]}
    bounds = PromptBounds()
    assert bounds.of(long) > 50_000
    bounds.learn(long, 10_008, bounds.of(long))
    more = {"messages": [*long["messages"], {"role": "assistant", "content": "yes"}]}
    added = len(b'{"content":"yes","role":"assistant"}') + 1 + MESSAGE_TOKENS
    assert bounds.of(long) == 10_008 and bounds.of(more) == 10_008 + added
    assert bounds.of({**more, "tools": []}) == by_bytes({**more, "tools": []})  # other tools are another prompt
    assert bounds.of({"messages": [{"role": "system", "content": "x"}, *long["messages"]]}) > 50_000


@pytest.mark.parametrize("seed", range(5))
def test_old_counts_are_forgotten_and_never_make_a_bound_too_small(seed):
    draw, bounds = random.Random(seed), PromptBounds()
    messages = [dict(REQUEST["messages"][0])]
    for _ in range(60):
        request = {"messages": list(messages)}
        size = 100 + sum(len(message["content"]) // 3 + 4 for message in messages)
        assert size <= bounds.of(request)
        bounds.learn(request, size, bounds.of(request))
        messages.append({"role": "user", "content": "x" * draw.randrange(500)})
        if draw.random() < 0.2:
            messages = messages[: draw.randrange(1, len(messages) + 1)]


def test_an_endpoint_that_leaves_out_what_its_cache_had_is_bounded_by_bytes_once_it_contradicts_itself():
    request = {"messages": [{"role": "user", "content": "word " * 1000}]}
    bounds = PromptBounds()
    bounds.learn(request, 20, bounds.of(request))  # nobody counts 20 tokens in 5,000 bytes
    assert bounds.of(request) == by_bytes(request)
    bounds.learn(request, 300, bounds.of(request))  # the cache had the rest
    assert bounds.of(request) == 300
    bounds.learn(request, 1010, bounds.of(request))
    assert bounds.of(request) == by_bytes(request)
    bounds.learn(request, 300, bounds.of(request))
    assert bounds.of(request) == by_bytes(request)
