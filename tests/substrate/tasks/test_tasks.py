"""Test puzzle families: printed puzzles are parsed back, drawn ones are solved, and solved ones are explained."""

import random
import re
import subprocess
import sys
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate.tasks import FAMILIES, LEVELS, STYLES, roman, text_cipher, unit_conversion
from tests.support.paths import ROOT

families = st.sampled_from(sorted(FAMILIES))
levels = st.sampled_from(LEVELS)
generators = st.integers(0, 2**64).map(random.Random)


@given(families, levels, generators)
def test_printed_puzzle_parses_back(family, level, rng):
    puzzle = FAMILIES[family].generate(rng, level)
    prompt = FAMILIES[family].render(puzzle)
    assert FAMILIES[family].parse(prompt) == puzzle
    assert FAMILIES[family].render(FAMILIES[family].parse(prompt)) == prompt


@given(families, levels, generators)
def test_drawn_puzzle_is_determined_and_of_one_family(family, level, rng):
    puzzle = FAMILIES[family].generate(rng, level)
    assert FAMILIES[family].solve(puzzle).determined
    for other in FAMILIES.keys() - {family}:
        with pytest.raises(ValueError, match=other):
            FAMILIES[other].parse(FAMILIES[family].render(puzzle))


@given(families, levels, st.integers(0, 2**64))
def test_same_generator_same_puzzle(family, level, seed):
    draw = FAMILIES[family].generate
    assert draw(random.Random(seed), level) == draw(random.Random(seed), level)


@given(families, st.text())
def test_other_text_is_refused(family, text):
    with pytest.raises(ValueError, match=family):
        FAMILIES[family].parse(text)


@given(families, levels, generators, st.sampled_from(STYLES))
def test_trace_is_about_the_answer(family, level, rng, style):
    puzzle = FAMILIES[family].generate(rng, level)
    trace = FAMILIES[family].trace(puzzle, style)
    answer = FAMILIES[family].solve(puzzle).answer
    assert trace and trace == trace.strip() and "boxed" not in trace
    if family == "text_cipher" and style == "stepwise":
        for line, word in zip(trace.split("\n"), answer.split(), strict=True):
            pairs, _, completed = line.partition(" -> ")
            assert completed == word or "".join(pair[1] for pair in pairs.split(" ")) == word
    else:
        assert trace.endswith(answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_style_is_refused(family):
    puzzle = FAMILIES[family].generate(random.Random(1), "small")
    with pytest.raises(ValueError, match="short, stepwise"):
        FAMILIES[family].trace(puzzle, "verbose")


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_differ_by_parameters_alone(family):
    assert tuple(FAMILIES[family].LEVELS) == LEVELS
    lengths = {level: [_length(family, level, seed) for seed in range(50)] for level in LEVELS}
    assert max(lengths["small"]) < max(lengths["full"])


def _length(family: str, level: str, seed: int) -> int:
    return len(FAMILIES[family].render(FAMILIES[family].generate(random.Random(seed), level)))


@given(st.integers(1, 3999))
def test_numeral_reads_back(number):
    value = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    digits = [value[symbol] for symbol in roman.numeral(number)]
    # A smaller symbol before a larger one is subtracted.
    assert sum(-d if any(d < n for n in digits[i + 1 : i + 2]) else d for i, d in enumerate(digits)) == number
    assert not re.search(r"(.)\1{3}|([VLD])\2", roman.numeral(number))


@pytest.mark.parametrize("number", [0, -1, 4000])
def test_numeral_out_of_range(number):
    with pytest.raises(ValueError, match=r"1\.\.3999"):
        roman.numeral(number)


def test_roman_that_contradicts_its_examples_is_not_determined():
    assert not roman.solve(roman.Puzzle(((4, "IIII"),), 9)).determined


@given(generators, levels)
def test_every_equation_of_a_conversion_trace_holds(rng, level):
    puzzle = unit_conversion.generate(rng, level)
    trace = unit_conversion.trace(puzzle, "stepwise")
    equations = re.findall(r"([\d.]+)\*([\d.]+)\+(\d+)=(\d+)", trace)
    equations += [(*pair, "0", product) for *pair, product in re.findall(r"(?<![\d.=])(\d)\*(\d+)=(\d+)", trace)]
    assert equations
    for left, right, carry, result in equations:
        assert Decimal(left) * Decimal(right) + Decimal(carry) == Decimal(result)
    for dividend, divisor, digit, remainder in re.findall(r"([\d.]+)=([\d.]+)\*(\d+)(?: r ([\d.]+))?(?:\n|$)", trace):
        assert Decimal(divisor) * int(digit) + Decimal(remainder or 0) == Decimal(dividend)


@given(generators)
def test_long_multiplication_adds_up_to_the_product(rng):
    puzzle = unit_conversion.generate(rng, "full")
    trace = unit_conversion.trace(puzzle, "stepwise")
    factor = re.search(r"factor ([\d.]+)", trace)
    if factor:  # a factor of one digit is not written out
        assert Decimal(trace.split("total ")[-1].split("\n")[0]) == puzzle.query * Decimal(factor[1])


@given(generators)
def test_small_conversion_has_a_factor_of_one_digit(rng):
    puzzle = unit_conversion.generate(rng, "small")
    factors = {result / measurement for measurement, result in puzzle.examples}
    assert len(factors) == 1 and factors <= set(map(Decimal, range(2, 10)))
    assert Decimal(unit_conversion.solve(puzzle).answer) == puzzle.query * factors.pop()


def test_conversion_that_contradicts_itself_is_not_determined():
    examples = ((Decimal("10.0"), Decimal("20.00")), (Decimal("10.0"), Decimal("21.00")))
    assert not unit_conversion.solve(unit_conversion.Puzzle(examples, Decimal("5.0"))).determined


def test_conversion_of_something_too_small_to_measure_is_not_determined():
    examples = ((Decimal("0.01"), Decimal("0.01")),)
    assert not unit_conversion.solve(unit_conversion.Puzzle(examples, Decimal("50.0"))).determined


@given(generators)
def test_small_cipher_needs_no_guess(rng):
    puzzle = text_cipher.generate(rng, "small")
    assert set(puzzle.query) <= {letter for cipher, _ in puzzle.examples for letter in cipher}


def test_cipher_completes_unseen_letters_by_the_one_word_that_fits():
    puzzle = text_cipher.Puzzle((("king sees", "king sees"),), "bird sees")  # the key may be the identity
    assert text_cipher.solve(puzzle) == text_cipher.Solution("bird sees", determined=True)
    assert text_cipher.trace(puzzle, "stepwise") == "b? ii r? d? -> bird\nss ee ee ss"


def test_cipher_with_two_readings_is_not_determined():
    # Nothing is known of the first word, and several subjects have its four different letters.
    assert not text_cipher.solve(text_cipher.Puzzle((("zz", "ee"),), "abcd qwwq")).determined


@pytest.mark.parametrize(
    "examples",
    [(("ab", "cc"),), (("aa", "cd"),), (("abc", "cd"),), (("a bc", "ab c"),)],
    ids=["two letters for one", "one letter for two", "length", "spaces"],
)
def test_cipher_that_is_no_substitution_is_not_determined(examples):
    assert not text_cipher.solve(text_cipher.Puzzle(examples, "ab")).determined


def test_families_import_without_torch():
    code = "import sys, substrate.tasks; sys.exit('torch' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
