"""Test replaying a table of scores from anywhere, with families, and every mistake in such a table."""

import pytest

from pipeline.campaign.errors import ConfigError, NotFound
from studies import replay


def written(tmp_path, *lines: str):
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_board_that_follows_is_no_alarm(tmp_path):
    path = written(tmp_path, "round,dev,board", "0,.70,.71", "1,.74,.75", "2,.78,.79", "3,.82,.82")
    found = replay.judge_table(replay.read_table(path, 900, 1000), num_nulls=2000)
    assert [line["verdict"] for line in found["rounds"]] == ["none"] * 3
    assert found["rounds"][2]["beats_the_round_before"] == "supported"


def test_a_family_is_named_where_the_table_tells_them_apart(tmp_path):
    rows = ["0,.60,.60,.60,.60", "1,.62,.62,.62,.62", "2,.80,.61,.61,.99", "3,.80,.61,.61,.99"]
    path = written(tmp_path, "round,dev,board,dev:roman,dev:equation", *rows)
    found = replay.judge_table(replay.read_table(path, 2000, 3000), num_nulls=4000)
    assert [(line["verdict"], line["family"]) for line in found["rounds"][1:]] == [("alarm", "equation")] * 2


def test_where_nothing_moves_there_is_no_alarm(tmp_path):
    """Nor is there in any draw of its null: E is 1 everywhere."""
    path = written(tmp_path, "\ufeffround,board,dev:roman", *(f"{n},.70,.70" for n in range(4)))
    found = replay.judge_table(replay.read_table(path, 900, 1000), num_nulls=200)
    assert [line["verdict"] for line in found["rounds"]] == ["none"] * 3


@pytest.mark.parametrize("rows", [{"dev_rows": 0}, {"board_rows": -5}])
def test_a_number_of_rows_is_one_at_least(rows):
    with pytest.raises(ConfigError, match="Valid: a number of rows"):
        replay.read_table(replay.EXAMPLE, **rows)


def test_a_round_that_was_not_submitted_is_passed_over(tmp_path):
    path = written(
        tmp_path, "round,dev,board,dev_rows,board_rows", "0,.70,.71,900,1000", "1,.74,,900,1000", "2,.78,.79,900,1000"
    )
    found = replay.judge_table(replay.read_table(path), num_nulls=2000)
    assert [line["beats_the_round_before"] for line in found["rounds"]] == ["not scored"] * 2
    assert found["rounds"][0]["e_value"] == "1.0000"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["round,dev", "0,.7", "1,.8"], "no column board"),
        (["round,dev,board", "0,.7,.7"], "1 line"),
        (["round,dev,board", "0,.7,.7", "1,.８,.8"], "line 3: dev is '.８'"),
        (["round,dev,board", "0,.7,.7", "1,1e-9,.8"], "line 3: dev is '1e-9'"),
        (["round,dev,board,dev", "0,.7,.7,.7", "1,.8,.8,.8"], "the column dev twice"),
        (["round,dev,board", "0,.7,.7", "1,.8,.8", "1,.8,.8"], "the round '1' twice"),
        (["round,dev,board", *(f"{n},.7,.7" for n in range(40))], "more than 32 line"),
        (["round,dev,board", "0,.7,.7", "1,x,.8"], "line 3: dev is 'x'"),
        (["round,dev,board", "0,.7,.7", "1,.8,80"], "line 3: board is '80'"),
        (["round,dev,board", "0,.7,", "1,.8,.8"], "the reference has no board score"),
        (["round,dev,board", "0,.7,.7", "1,.8,.8"], "Give a column dev_rows or --dev-rows N"),
        (["round,dev,board", "0,.7,.7", "1,NaN,.8"], "line 3: dev is 'NaN'"),
        (["round,dev,board", "0,.7,.7", "1,.8"], "no line after the reference has a board score"),
    ],
)  # fmt: skip
def test_a_table_that_is_wrong_is_told_where(tmp_path, lines, said):
    with pytest.raises(ConfigError, match=said):
        replay.judge_table(replay.read_table(written(tmp_path, *lines)))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(NotFound, match="cannot read"):
        replay.read_table(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NotFound, match="cannot read"):
        replay.read_table(tmp_path / "bytes.csv")
