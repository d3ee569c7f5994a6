"""Text cipher: a prompt shows sentences encrypted by a substitution of letters, decrypted, and one to decrypt.

    In Alice's Wonderland, secret encryption rules are used on text. Here are some examples:
    wkgqa lsrqaq wneeke -> mouse chases mirror
    srppae oerhq gvoae wkgvprnv -> hatter draws under mountain
    psa qaleap hncreo onqlkzaeq -> the secret wizard discovers
    Now, decrypt the following text: hncreo learpaq qaleap              answer: wizard creates secret

In all 1,396 real rows of the NVIDIA Nemotron Model Reasoning Challenge the key is a uniform permutation of the alphabet
(a letter may stand for itself). The rows have 3, 4 or 5 examples with equal frequency. Each sentence has one of the four
shapes of `SHAPES` with equal frequency, and its words are uniform on the lists of `LEXICON`; both were observed in those
rows. In 61 % of the rows some letter of the question occurs in no example and follows from the words that fit. The answer
is never one of the examples.
"""

import random
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from substrate.tasks.protocol import Solution, check_style

HEADER = "In Alice's Wonderland, secret encryption rules are used on text. Here are some examples:\n"
BECOMES = " -> "
QUESTION = "\nNow, decrypt the following text: "
PHRASES = (HEADER, BECOMES, QUESTION)

LEXICON: dict[str, tuple[str, ...]] = {
    slot: tuple(words.split())
    for slot, words in {
        "the": "the",
        "subject": "alice bird cat dragon hatter king knight mouse princess queen rabbit student teacher turtle wizard",
        "verb": "chases creates discovers draws dreams explores follows found imagines reads sees studies watches "
        "writes",
        "adjective": "ancient bright clever colorful curious dark golden hidden magical mysterious secret silver "
        "strange wise",
        "object": "book castle crystal door forest garden key map message mirror potion puzzle secret story treasure",
        "preposition": "above around beyond in inside near through under",
        "place": "castle cave forest garden island library mountain ocean palace school tower valley village "
        "wonderland",
    }.items()
}

Shape = tuple[str, ...]
SHAPES: tuple[Shape, ...] = (
    ("subject", "verb", "object"),
    ("the", "adjective", "subject", "verb"),
    ("subject", "verb", "preposition", "place"),
    ("subject", "verb", "the", "adjective", "object"),
)
SHORT_SHAPES: tuple[Shape, ...] = (("subject", "verb"),)

_WORDS = "[a-z]+(?: [a-z]+)*"
_EXAMPLE = f"({_WORDS}){BECOMES}({_WORDS})"
_PROMPT = re.compile(f"{re.escape(HEADER)}({_EXAMPLE}(?:\n{_EXAMPLE})*){QUESTION}(?P<query>{_WORDS})")


@dataclass(frozen=True)
class Level:
    """Parameters of `generate`."""

    num_examples: tuple[int, int]  # fewest and most
    shapes: tuple[Shape, ...]
    max_word_length: int  # letters
    max_unknown_letters: int  # letters of the question that occur in no example


LEVELS = {
    "small": Level((2, 3), SHORT_SHAPES, max_word_length=5, max_unknown_letters=0),
    "full": Level((3, 5), SHAPES, max_word_length=10, max_unknown_letters=26),
}


@dataclass(frozen=True)
class Puzzle:
    """Pairs of cipher text and plain text, and the cipher text asked for."""

    examples: tuple[tuple[str, str], ...]
    query: str


def parse(prompt: str) -> Puzzle:
    """Reads a prompt in the competition's form. Raises ValueError for any other text."""
    match = _PROMPT.fullmatch(prompt)
    if not match:
        raise ValueError("this text is not a prompt of family text_cipher")
    return Puzzle(tuple(re.findall(_EXAMPLE, match[1])), match["query"])


def render(puzzle: Puzzle) -> str:
    """Prints the puzzle; the inverse of `parse`, byte for byte."""
    lines = "\n".join(f"{cipher}{BECOMES}{plain}" for cipher, plain in puzzle.examples)
    return f"{HEADER}{lines}{QUESTION}{puzzle.query}"


def generate(rng: random.Random, level: str) -> Puzzle:
    """Draws puzzles until one keeps the level's limits and has a single reading."""
    rules = LEVELS[level]
    while True:
        *plains, answer = (_sentence(rng, rules) for _ in range(rng.randint(*rules.num_examples) + 1))
        unknown = set(answer) - set().union(*plains)
        if answer in plains or len(unknown - {" "}) > rules.max_unknown_letters:
            continue
        alphabet = list(string.ascii_lowercase)
        rng.shuffle(alphabet)
        key = str.maketrans(string.ascii_lowercase, "".join(alphabet))
        puzzle = Puzzle(tuple((plain.translate(key), plain) for plain in plains), answer.translate(key))
        if solve(puzzle).determined:
            return puzzle


def solve(puzzle: Puzzle) -> Solution:
    """Substitutes the known letters and finds the rest in the lexicon; determined if exactly one reading fits."""
    key = _known_letters(puzzle)
    if key is None:
        return Solution(puzzle.query, determined=False)
    partial = _substitute(puzzle.query, key)
    if "?" not in partial:
        return Solution(partial, determined=True)
    readings = list(islice(_readings(puzzle.query.split(), key), 2))
    return Solution(readings[0] if readings else partial, determined=len(readings) == 1)


def features(puzzle: Puzzle) -> dict[str, Sequence[float | str]]:
    """Returns the words of the examples, words per sentence, and how many letters of the question no example shows."""
    known = {letter for cipher, _ in puzzle.examples for letter in cipher}
    return {
        "words": [word for _, plain in puzzle.examples for word in plain.split()],
        "sentence lengths": [str(len(cipher.split())) for cipher in [*dict(puzzle.examples), puzzle.query]],
        "unknown letters": [len(set(puzzle.query) - known - {" "})],
    }


def trace(puzzle: Puzzle, style: str) -> str:
    """`stepwise` has a line per word, each letter before its plain letter: `xk qi nn fg`.

    A letter that no example shows is `?`; the line then ends in the word that fits: `xk q? nn fg -> king`.
    """
    check_style(style)
    answer = solve(puzzle).answer
    if style == "short":
        return answer
    key = _known_letters(puzzle) or {}
    lines = []
    for cipher, plain in zip(puzzle.query.split(), answer.split(), strict=True):
        pairs = " ".join(letter + key.get(letter, "?") for letter in cipher)
        lines.append(f"{pairs}{BECOMES}{plain}" if "?" in pairs else pairs)
    return "\n".join(lines)


def _sentence(rng: random.Random, rules: Level) -> str:
    shape = rng.choice(rules.shapes)
    return " ".join(rng.choice([w for w in LEXICON[slot] if len(w) <= rules.max_word_length]) for slot in shape)


def _known_letters(puzzle: Puzzle) -> dict[str, str] | None:
    """Returns cipher letter -> plain letter as the examples show; None if they contradict a substitution."""
    key: dict[str, str] = {}
    for cipher, plain in puzzle.examples:
        extended = _extend(key, cipher, plain)
        if extended is None:
            return None
        key = extended
    return key


def _extend(key: dict[str, str], cipher: str, plain: str) -> dict[str, str] | None:
    """Returns the key extended so that it reads `cipher` as `plain`, or None if no one-to-one key does."""
    if len(cipher) != len(plain):
        return None
    extended = dict(key)
    for letter, meaning in zip(cipher, plain, strict=True):
        if (letter == " ") != (meaning == " ") or extended.setdefault(letter, meaning) != meaning:
            return None
    return extended if len(set(extended.values())) == len(extended) else None


def _substitute(text: str, key: dict[str, str]) -> str:
    return "".join(" " if letter == " " else key.get(letter, "?") for letter in text)


def _readings(words: list[str], key: dict[str, str]) -> Iterator[str]:
    """Yields all sentences of a known shape that a one-to-one completion of the key gives; none fits two shapes."""
    for shape in (*SHORT_SHAPES, *SHAPES):
        if len(shape) == len(words):
            yield from _fill(words, shape, key)


def _fill(words: list[str], shape: Shape, key: dict[str, str]) -> Iterator[str]:
    if not words:
        yield ""
        return
    for candidate in LEXICON[shape[0]]:
        extended = _extend(key, words[0], candidate)
        if extended is not None:
            for rest in _fill(words[1:], shape[1:], extended):
                yield f"{candidate} {rest}".rstrip()
