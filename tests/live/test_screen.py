"""Test the screen of a running round: one of 100 x 30 holds it, a narrow one loses columns in order, and every value can be read."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from pipeline.cluster.slurm_jobs import Job, Report
from pipeline.live import screen, view
from pipeline.live.time_left import ALL_ENDED, Left
from tests.support.campaigns import frozen_campaign, publish
from tests.support.running import training


@pytest.fixture
def shown(tmp_path: Path) -> view.RoundView:
    """A round of every kind of arm."""
    folder = frozen_campaign(tmp_path).round("r0001")
    folder.forecast.write_text(
        json.dumps(
            {
                "arm": {"start-up": 9, "training": 9, "decoding": 9, "rest": 9, "arm": 36},
                "arms": 8,
                "source": "measured",
            }
        )
    )
    training(folder.campaign.round("r0000"), "a0", steps=20)
    publish(folder, "a0")
    training(folder, "a1", steps=5)
    training(folder, "a2", steps=12)
    attempt = training(folder, "a3", steps=20)
    (attempt.saved_dir / "000001" / "checkpoints" / "step_000010").mkdir(parents=True)
    training(folder, "a4", steps=1)
    words = {
        "a3": ("PENDING", "BeginTime"),
        "a5": ("PENDING", "AssocGrpGRES"),
        "a6": ("CANCELLED", "by 0"),
        "a7": ("FAILED", ""),
    }
    jobs = {f"r0001/{arm}": Job(f"7_{arm[1]}", state, "", reason) for arm, (state, reason) in words.items()}
    return view.of_round(folder.campaign, folder, Report(jobs))


def drawn(found: view.RoundView, width: int, height: int = 40, **how: bool) -> list[str]:
    return screen.draw(found, ["the last line says what to type"], width, height, **how).plain.splitlines()


def test_a_screen_holds_the_round(shown):
    lines = drawn(shown, 100, 30)
    assert len(lines) < 30 and all(len(line) <= 100 for line in lines[2:-2])
    text = "\n".join(lines)
    for part in ("smoke r0001 is open", "2 completed", "training", "5/20", "▁", "goes on from step 10", "Slurm waits some minutes",
                 "other jobs of the user", "`rerun` with its name starts it", "FAILED"):  # fmt: skip
        assert part in text, part
    assert lines[-1] == "the last line says what to type"


def test_narrow_terminals_lose_columns_in_order(shown):
    titles = [drawn(shown, width)[4].split() for width in (120, 100, 80, 60, 45, 20)]
    assert all(set(less) <= set(more) for more, less in zip(titles, titles[1:], strict=False))
    assert {"left", "loss"} <= set(titles[3]) and titles[-1] == ["arm", "state"]
    for width in (60, 45, 30):
        rows = drawn(shown, width)[5:-4]
        assert all(len(row) <= width for row in rows)


def test_a_low_terminal_loses_second_lines_and_then_completed_arms(shown):
    drawings = [drawn(shown, 60, height) for height in range(40, 4, -1)]
    lengths = [len(each) for each in drawings]
    assert lengths == sorted(lengths, reverse=True)
    by_length = {len(each): each for each in drawings}  # texts with a time change from one second to the next
    whole, low, lowest = (by_length[length] for length in sorted(by_length, reverse=True))
    assert all(any(line.startswith("a0 ") for line in each) for each in (whole, low))
    assert not any(line.startswith("a0 ") for line in lowest) and any(line.startswith("a1 ") for line in lowest)
    assert whole[-1] == low[-1] == lowest[-1]


def test_plain_terminals_get_ascii(shown):
    table = "\n".join(drawn(shown, 100, is_plain=True))
    assert table.isascii() and "###." in table


def test_marks_are_explained_where_they_stand(shown):
    text = "\n".join(drawn(shown, 100))
    assert "~" in text and "left: ~ also counts what was forecast" in text and "vs ref: loss less" in text
    phase = replace(
        shown,
        arms=tuple(replace(arm, left=arm.left and Left(61, "own speed", "training")) for arm in shown.arms),
        end="nobody knows",
    )
    text = "\n".join(drawn(phase, 100))
    assert (
        ">1 min 1 s" in text
        and "left: > the running phase alone" in text
        and "its end is not known: nobody knows" in text
    )
    ended = "\n".join(drawn(replace(shown, end=ALL_ENDED), 100))
    assert "every arm has ended, and the round has no decision yet" in ended and "not known" not in ended


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.6, "1 min"),
        (63, "1 min 3 s"),
        (7500, "2 h 5 min"),
        (3600, "1 h"),
        (2 * 86400 + 3600, "2 d 1 h"),
    ],
)
def test_durations_have_two_units(seconds, words):
    assert screen.duration(seconds) == words


def test_curves_and_bars():
    assert screen.spark([3, 2, 1]) == "█▅▁" and screen.spark([1, 1]) == "▁▁" and screen.spark([]) == ""
    assert screen.spark([5, float("inf"), 1], is_plain=True) == "#_"
    assert screen.spark([1e308, -1e308, 0.0], is_plain=True) == "#_=" and screen.spark([5e-324, 0.0]) == "▁▁"
    assert [screen.bar(share, 4) for share in (-1, 0, 0.5, 1, 7)] == ["░░░░", "░░░░", "██░░", "████", "████"]


def test_a_training_that_writes_any_number_does_not_stop_the_view(tmp_path):
    """`round` shows its own round so, and a view that raises would end it."""
    folder = frozen_campaign(tmp_path).round("r0001")
    attempt = training(folder, "a1", steps=5)
    wild = [1e308, -1e308, 1e-320, 0, -5, 2**53, 1e9, 1e-300]
    for number, value in product(("step", "num_steps", "loss", "tokens", "seconds"), wild):
        with open(attempt.progress, "a") as file:
            fields = {"step": 6, "num_steps": 10, "loss": 1.0, "tokens": 600, "seconds": 6.0, number: value}
            file.write(json.dumps({"phase": "train", **fields}) + "\n")
        found = view.of_round(folder.campaign, folder)
        assert drawn(found, 100)
        json.loads(json.dumps([found.to_json(), [arm.to_json() for arm in found.arms]], allow_nan=False))


def test_what_a_worker_says_cannot_move_the_cursor(tmp_path):
    folder = frozen_campaign(tmp_path).round("r0001")
    attempt = training(folder, "a1", steps=5)
    with open(attempt.phases, "a") as file:
        file.write(json.dumps({"phase": "failed", "at": 1e9, "detail": "\x1b[2J\u202egnp"}) + "\n")
    text = "\n".join(drawn(view.of_round(folder.campaign, folder), 100))
    assert "[2J" in text and "\x1b" not in text and "\u202e" not in text
