"""Whether training prompts repeat evaluation prompts: exactly, under another spelling, or for the most part.

A prompt is compared as a list of tokens: words without regard to case, numbers by their value (`16.70` is `16.7`),
every other character by itself; white space, invisible characters and marks of emphasis are nothing, and arrows, dashes
and quotation marks are one another's. Two prompts with equal tokens have equal digests. A prompt *overlaps* another
when it has at least `SHARE` of its n-grams of `N` tokens, or of its lines in whatever order, not counting what lies
inside the fixed text of a family, which all of its puzzles have.

The rule of shares is for prompts from elsewhere. Generated puzzles of two independent seeds are draws from one
distribution, alike by chance as often as any two; of those only equal ones are kept apart.

Standard library only: the entry runs where scores are made.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from substrate.tasks import FAMILIES

N = 8  # tokens: longer than what two puzzles of a family have in common by chance
SHARE = 0.8
FEWEST = {"gram": 3, "line": 3}  # of them a prompt must have: a share of one or two is chance
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|\S")
_EMPHASIS = re.compile(r"^[ \t>#]*\*\*|\*\*[ \t]*$", re.MULTILINE)
_ALIKE = str.maketrans({"\u2192": "->", "\u21d2": "->", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-",
                        "\u2212": "-", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})  # fmt: skip
MOST_COMMON = 20  # an n-gram or line that more evaluation prompts than so many have says nothing of one of them
Gram = tuple[str, ...]


class Overlap(NamedTuple):
    """A training prompt and the evaluation prompt that it repeats."""

    training_id: str
    evaluation_id: str
    share: float  # of the evaluation prompt's n-grams; 1.0 where the tokens are equal

    def __str__(self) -> str:
        return f"{self.training_id} repeats {self.evaluation_id} ({self.share:.0%})"


def tokens_of(prompt: str) -> list[str]:
    """The prompt without white space, letter case and ways to write a number."""
    found = _TOKEN.findall(_plain(prompt))
    return [_number(token) if token[0].isdigit() else token for token in found]


def _plain(prompt: str) -> str:
    """Compatible characters as one, without invisible ones (Cf, Mn)."""
    text = _EMPHASIS.sub("", unicodedata.normalize("NFKD", prompt.casefold()).translate(_ALIKE))
    return "".join(each for each in text if unicodedata.category(each) not in ("Cf", "Mn"))


def prompt_digest(prompt: str) -> str:
    """Name of a prompt in exclusion lists and data cards: equal for prompts with equal tokens."""
    return hashlib.sha256(" ".join(tokens_of(prompt)).encode(errors="surrogatepass")).hexdigest()


def overlaps(training: Iterable[tuple[str, str]], evaluation: Iterable[tuple[str, str]]) -> list[Overlap]:
    """The worst overlap of each training prompt, in order; both are pairs of id and prompt."""
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
    """`007` and `7.00` as `7`: digits alone, so no float rounds and no huge exponent costs memory."""
    token = "".join(str(unicodedata.decimal(each)) if each.isdecimal() else each for each in token)
    whole, _, part = token.partition(".")
    return (whole.lstrip("0") or "0") + (f".{part}" if (part := part.rstrip("0")) else "")


def _grams(prompt: str) -> set[Gram]:
    """N-grams, and lines of at least two tokens, each with its kind in front."""
    lines = (tokens_of(line) for line in prompt.splitlines())
    whole = {("line", *tokens) for tokens in lines if len(tokens) >= 2}
    return (_windows(tokens_of(prompt)) | whole) - _fixed()


def _kind(gram: Gram) -> str:
    return gram[0]


@cache
def _fixed() -> frozenset[Gram]:
    """N-grams inside the fixed texts."""
    phrases = (phrase for family in FAMILIES.values() for phrase in family.PHRASES)
    texts = [tokens_of(phrase) for phrase in phrases]
    lines = (
        tokens_of(line) for family in FAMILIES.values() for phrase in family.PHRASES for line in phrase.splitlines()
    )
    return frozenset(gram for tokens in texts for gram in _windows(tokens)) | {("line", *tokens) for tokens in lines}


def _windows(tokens: list[str]) -> set[Gram]:
    return {("gram", *tokens[start : start + N]) for start in range(len(tokens) - N + 1)}
