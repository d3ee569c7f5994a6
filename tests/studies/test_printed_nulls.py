"""Test that E of a null's draws is E as `replay` computes it, and that a healthy board exceeds it as seldom as E allows."""

import numpy as np
import pytest

from studies import printed_nulls, replay


def test_e_of_a_draw_is_that_of_the_table():
    scores = replay.read_table(replay.EXAMPLE)
    last = len(scores.rounds) - 1
    model = replay.healthy_model_of_table(scores, last)
    effects, means = (np.array(values, float) for values in (model.effects, model.means))
    lower = np.zeros((len(effects), len(effects)))
    for number, row in enumerate(model.lower):
        lower[number, : number + 1] = [float(value) for value in row]
    residual = (lower @ np.array(model.residual, float))[None]
    for upto in range(1, last + 1):
        found = printed_nulls._e_values(np.array(model.rounds), effects, means, lower, residual, upto, last)
        assert found == pytest.approx(float(replay.e_values(scores, upto)[0]), rel=1e-9)


def test_e_exceeds_twenty_in_at_most_a_twentieth_of_healthy_campaigns():
    scores = replay.read_table(replay.EXAMPLE)
    last = len(scores.rounds) - 1
    found = printed_nulls.largest_e(replay.healthy_model_of_table(scores, last), last, 4000)
    assert set(found) == set(printed_nulls.NULLS)
    for values in found.values():
        assert len(values) == 4000 and np.array_equal(values, np.sort(values))
    assert (found["healthy"] > 20).mean() < 0.05
