"""Test what a trial reports about its steps: only finite numbers are believed, one line for each step."""

import json
from types import SimpleNamespace

import pytest

from pipeline.campaign.layout import Attempt
from pipeline.execution.attempt import _training_rows

GOOD = {"phase": "train", "step": 1, "loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 10, "seconds": 0.5}


def _rows(tmp_path, *lines: str) -> list[dict]:
    attempt = Attempt(tmp_path)
    attempt.progress.write_text("".join(f"{line}\n" for line in lines))
    recipe = SimpleNamespace(recipe=SimpleNamespace(num_steps=5))
    return _training_rows(SimpleNamespace(attempt=attempt, chosen=recipe))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [{"step": float("nan")}, {"step": 2**70}, {"step": True}, {"step": -1}, {"step": 1.0}, {"tokens": float("inf")},
     {"loss": 10**400}, {"loss": "2"}, {"grad_norm": None}],
)  # fmt: skip
def test_line_that_no_file_can_hold_is_left_out(tmp_path, change):
    assert _rows(tmp_path, json.dumps(GOOD | change), json.dumps(GOOD | {"step": 2})) == [
        {name: value for name, value in (GOOD | {"step": 2}).items() if name != "phase"}
    ]


def test_the_last_line_of_a_step_counts_and_no_more_steps_than_there_are(tmp_path):
    lines = [GOOD | {"step": step, "loss": float(number)} for number, step in enumerate((2, 1, 2, 3, 4, 5, 6, 7))]
    rows = _rows(tmp_path, *map(json.dumps, lines))
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0)]
