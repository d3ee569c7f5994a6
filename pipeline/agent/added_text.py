"""The text that an edit adds: lines, literals of code and rows of data, as leak_check.py searches them.

Hostile text is only cut into tokens (`tokenize`), never parsed or run: Python's parser can be crashed by nested brackets.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from pipeline.campaign import strict_json

WINDOW, STEP = 40, 20  # added lines of one text; a prompt has at most about fifteen
LEAST_LITERAL = 40  # characters of literals that could hold a prompt
LITERALS = (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))  # the second from Python 3.12 on
_COMMENT = re.compile(r"^\s*(?:#|//|--|;|>)+\s?")
_SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def added_lines(before: str, after: str) -> dict[int, str]:
    """Line number -> line of what `after` has and `before` has nowhere; order and number of equal lines do not count."""
    known = set(before.split("\n"))
    return {number: line for number, line in enumerate(after.split("\n"), 1) if line not in known and line.strip()}


def texts_of(path: str, source: str, added: Mapping[int, str]) -> Iterator[tuple[int, str]]:
    """(line, text) of all that could hold a prompt: the strings of rows of data, else windows of added lines and literals of code."""
    numbers = sorted(added)
    if path.endswith((".jsonl", ".json")):
        for number in numbers:
            yield number, "\n".join(_strings(added[number])) or added[number]
        return
    for start in range(0, len(numbers), STEP):
        window = numbers[start : start + WINDOW]
        yield window[0], "\n".join(_COMMENT.sub("", added[number]) for number in window)
    for tokens in logical_lines(source) if path.endswith(".py") else ():
        literals = [token for token in tokens if is_literal(token)]
        if any(number in added for token in literals for number in range(token.start[0], token.end[0] + 1)):
            text = joined(tokens)
            if len(text) >= LEAST_LITERAL:
                yield literals[0].start[0], text


def joined(tokens: list[tokenize.TokenInfo]) -> str:
    """The literals of a logical line: those that stand side by side, or with a plus between, are one text."""
    text, gap = "", False
    for token in tokens:
        if is_literal(token):
            text += ("\n" if gap and text else "") + value_of(token.string)
            gap = False
        elif token.string not in ("+", "(", ")"):
            gap = True
    return text


def _strings(line: str) -> Iterator[str]:
    """The texts of a row of data, also nested ones; none where it is no JSON."""
    try:
        waiting: deque[Any] = deque([strict_json.read(line.encode(errors="replace"))])
    except strict_json.BadJson:
        return
    while waiting:
        value = waiting.popleft()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            waiting.extend(value.values() if isinstance(value, dict) else value)


def logical_lines(source: str) -> Iterator[list[tokenize.TokenInfo]]:
    """The tokens of each logical line without comments and white space; it ends where the text is no Python."""
    line: list[tokenize.TokenInfo] = []
    with suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NEWLINE and line:
                yield line
                line = []
            elif token.type not in (*_SKIPPED, tokenize.NEWLINE):
                line.append(token)
    if line:
        yield line


def is_literal(token: tokenize.TokenInfo) -> bool:
    """Whether a token is a text or a part of one."""
    return token.type in LITERALS


def value_of(literal: str) -> str:
    """What a literal's token says; itself where it cannot be read alone, as an f-string."""
    try:
        value = ast.literal_eval(literal)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return literal
    return value if isinstance(value, str) else value.decode("latin-1") if isinstance(value, bytes) else literal
