"""Test the digest of the code that computes: it ignores a moved module and changes with a constant."""

import pytest

from studies.calibrate import what_computes

SOURCE = '''
"""A module."""

import numpy as np
from scipy.special import ndtr

from pipeline.stats import shift_test
from pipeline.stats.design import Design


def tail(score: float, design: Design) -> float:
    """Say what it does."""
    from studies.simulated import EDGE

    return np.clip(ndtr(-score) * (1 + shift_test.GUARD), EDGE, 1) / design.arms  # a comment
'''
CALLED_AND_LYING_ELSEWHERE = """
import numpy
from scipy import special as functions

from pipeline.tests.shift import GUARD
from studies.somewhere import design as a_design, edges


def tail(score: float, design: a_design.Design) -> float:
    return numpy.clip(functions.ndtr(-score) * (1 + GUARD), edges.EDGE, 1,) / (
        design.arms
    )
"""


def test_modules_may_move_and_be_renamed():
    assert what_computes(CALLED_AND_LYING_ELSEWHERE) == what_computes(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(1 + shift", "(2 + shift"), ("1 + shift", "1 - shift"), ("-score", "score"), ("clip", "power"), ("ndtr(-", "ndtri(-"),
        ("GUARD", "SLACK"), ("design.arms", "design.rounds"), ("1) /", "1.0) /"), ("1) /", "True) /"), ("1) /", "None) /"),
        ("scipy.special", "scipy.stats"), ("import numpy", "import cupy"), ("def tail", "def tails"),
    ],
)  # fmt: skip
def test_what_computes_may_not_change(old, new):
    assert SOURCE.count(old) == 1 or old == "GUARD"
    assert what_computes(SOURCE.replace(old, new)) != what_computes(SOURCE)
