"""Finds training prompts that repeat evaluation prompts: exactly, in another spelling, or for the most part.

A prompt is compared as a list of tokens: words without letter case, numbers by their value (`16.70` equals `16.7`), and
every other character by itself. White space, invisible characters and marks of emphasis are ignored; variants of arrows,
dashes and quotation marks are equal. Two prompts with equal tokens have equal digests. A prompt *overlaps* another if
it has at least `SHARE` of its n-grams of `N` tokens, or of its lines in any order. N-grams inside the fixed text of a
family do not count, because all of its puzzles have them.

Shares are for prompts from elsewhere. Generated puzzles of two independent seeds are draws from one distribution and
similar by chance, so among those only equal ones are kept apart.

Standard library only, because `substrate.items` and `substrate.overlap` import it.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from substrate.tasks import FAMILIES

N = 8  # tokens of an n-gram: longer than what two puzzles of a family share by chance
SHARE = 0.8
FEWEST = {"gram": 3, "line": 3}  # of either that a prompt must have, because a share of one or two is chance
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|\S")
_EMPHASIS = re.compile(r"^[ \t>#]*\*\*|\*\*[ \t]*$", re.MULTILINE)
_ALIKE = str.maketrans({"\u2192": "->", "\u21d2": "->", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-",
                        "\u2212": "-", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})  # fmt: skip
MOST_COMMON = 20  # an n-gram or line in more evaluation prompts than this does not tell them apart
Gram = tuple[str, ...]


class Overlap(NamedTuple):
    """A training prompt and the evaluation prompt that it repeats."""

    training_id: str
    evaluation_id: str
    share: float  # of the evaluation prompt's n-grams or lines; 1.0 if the tokens are equal

    def __str__(self) -> str:
        return f"{self.training_id} repeats {self.evaluation_id} ({self.share:.0%})"


def tokens_of(prompt: str) -> list[str]:
    """Returns the tokens that prompts are compared by."""
    found = _TOKEN.findall(_plain(prompt))
    return [_number(token) if token[0].isdigit() else token for token in found]


def _plain(prompt: str) -> str:
    """Returns the text with compatible characters unified and invisible ones (categories Cf, Mn) removed."""
    text = _EMPHASIS.sub("", unicodedata.normalize("NFKD", prompt.casefold()).translate(_ALIKE))
    return "".join(each for each in text if unicodedata.category(each) not in ("Cf", "Mn"))


def prompt_digest(prompt: str) -> str:
    """Returns the SHA-256 of the tokens, by which exclusion lists and data cards name a prompt."""
    return hashlib.sha256(" ".join(tokens_of(prompt)).encode(errors="surrogatepass")).hexdigest()


def overlaps(training: Iterable[tuple[str, str]], evaluation: Iterable[tuple[str, str]]) -> list[Overlap]:
    """Returns the largest overlap of each training prompt that has one, in order. Both are (id, prompt) pairs."""
    ids, equal = [], {}
    having: defaultdict[Gram, list[int]] = defaultdict(list)
    for number, (item_id, prompt) in enumerate(evaluation):
        ids.append(item_id)
        equal[prompt_digest(prompt)] = item_id
        for gram in _grams(prompt):
            having[gram].append(number)
    telling = {gram: numbers for gram, numbers in having.items() if len(numbers) <= MOST_COMMON}
    sizes = Counter((number, _kind(gram)) for gram, numbers in telling.items() for number in numbers)
    found = []
    for training_id, prompt in training:
        if same := equal.get(prompt_digest(prompt)):
            found.append(Overlap(training_id, same, 1.0))
            continue
        hits = Counter((number, _kind(gram)) for gram in _grams(prompt) for number in telling.get(gram, ()))
        shares = ((count / sizes[key], ids[key[0]]) for key, count in hits.items() if sizes[key] >= FEWEST[key[1]])
        share, worst = max(shares, default=(0.0, ""))
        if share >= SHARE:
            found.append(Overlap(training_id, worst, share))
    return found


def _number(token: str) -> str:
    """Writes `007` and `7.00` as `7`, digit by digit, so that no float rounds and no huge exponent costs memory."""
    token = "".join(str(unicodedata.decimal(each)) if each.isdecimal() else each for each in token)
    whole, _, part = token.partition(".")
    return (whole.lstrip("0") or "0") + (f".{part}" if (part := part.rstrip("0")) else "")


def _grams(prompt: str) -> set[Gram]:
    """Returns the n-grams, and the lines of at least two tokens, each with its kind in front."""
    lines = (tokens_of(line) for line in prompt.splitlines())
    whole = {("line", *tokens) for tokens in lines if len(tokens) >= 2}
    return (_windows(tokens_of(prompt)) | whole) - _fixed()


def _kind(gram: Gram) -> str:
    return gram[0]


@cache
def _fixed() -> frozenset[Gram]:
    """Returns the n-grams and lines of the families' fixed texts."""
    phrases = (phrase for family in FAMILIES.values() for phrase in family.PHRASES)
    texts = [tokens_of(phrase) for phrase in phrases]
    lines = (
        tokens_of(line) for family in FAMILIES.values() for phrase in family.PHRASES for line in phrase.splitlines()
    )
    return frozenset(gram for tokens in texts for gram in _windows(tokens)) | {("line", *tokens) for tokens in lines}


def _windows(tokens: list[str]) -> set[Gram]:
    return {("gram", *tokens[start : start + N]) for start in range(len(tokens) - N + 1)}
