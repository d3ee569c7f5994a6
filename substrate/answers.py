r"""The competition's scorer: it extracts the answer from a completion and compares it with the true one.

    extract(r"30 XXX ... </think> \boxed{XXXVIII}")     'XXXVIII'
    is_correct("16.65", "16.70")                        True: both are numbers, within 1 %
    is_correct("0110", "110")                           False: an answer of 0 and 1 only is compared as text

These are the rules of the NVIDIA Nemotron Model Reasoning Challenge. The answer is the last non-empty `\boxed{}`
(nested braces count, and one that is never closed runs to the end); without one, the rest of the line after the last
"final answer is:"; else the last number; else the last non-empty line. No string raises an error, because a model may
write anything.
"""

import math
import re
from collections.abc import Iterator

REL_TOLERANCE = "0.01"  # text, so that decimal and float arithmetic start from the same number
ABS_TOLERANCE = "0.00001"
_BOX = r"\boxed{"
# The first of these patterns that matches anywhere is used, with its last match.
_FINAL_ANSWER = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"the final answer is:\s*([^\n]+)",
        r"final answer is:\s*([^\n]+)",
        "final answer\\s*[:\uff1a]\\s*([^\n]+)",  # either an ASCII or a full-width colon
    )
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_BINARY = re.compile(r"[01]+")


def extract(completion: str) -> str:
    """Returns the answer in a completion, or an empty string if it has none."""
    for boxed in _boxes_from_the_end(completion):
        if boxed.strip():
            return boxed.strip()
    for pattern in _FINAL_ANSWER:
        if found := pattern.findall(completion):
            return str(found[-1]).strip()
    if numbers := _NUMBER.findall(completion):
        return str(numbers[-1])
    lines = [line.strip() for line in completion.split("\n") if line.strip()]
    return lines[-1] if lines else ""


def is_correct(gold: str, answer: str) -> bool:
    """Whether `answer` counts as `gold`."""
    gold, answer = gold.strip(), answer.strip()
    if _BINARY.fullmatch(gold):
        return answer == gold
    try:
        return math.isclose(float(gold), float(answer), rel_tol=float(REL_TOLERANCE), abs_tol=float(ABS_TOLERANCE))
    except ValueError:  # one of them is not a number
        return answer.lower() == gold.lower()


def _boxes_from_the_end(text: str) -> Iterator[str]:
    r"""Yields what each `\boxed{` holds up to its closing brace, from the last to the first.

    The caller stops at the first non-empty one, so a model that repeats the opening for ever costs one scan.
    """
    start = text.rfind(_BOX)
    while start >= 0:
        begin = start + len(_BOX)
        yield text[begin : _closing_brace(text, begin)]
        start = text.rfind(_BOX, 0, start)


def _closing_brace(text: str, begin: int) -> int:
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return len(text)
