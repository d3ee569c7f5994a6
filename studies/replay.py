"""Judge a table of scores from anywhere, as far as printed totals allow.

    round,dev,board,dev_rows,board_rows
    0,.79,.80,950,250
    1,.82,.82,950,250
    ...

The first line is the reference. The columns `dev_rows` and `board_rows` may be left out if the caller gives both numbers. Columns
`dev:FAMILY` give dev scores by family; each family weighs the same on the board. Single items are not known, so we assume that two equal
models disagree on 12 % of them, and that half of this is shared by all rounds (the reference's own luck). The test is the board test
(pipeline.stats.shift_test). Its critical values belong to this very table: quantiles of the campaign's largest E in 20,000 draws of what the
board would have printed if nothing were wrong.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError, NotFound
from pipeline.stats.decimal_math import (
    Matrix,
    cholesky,
    decimal_of,
    dot,
    exactly,
    quantile,
    upper_tail,
    whiten,
)
from pipeline.stats.difficulty import HEALTHY_SD, corrected, information, moved
from pipeline.stats.shift_test import KINDS, SLACK_VARIANCE, BoardModel, bayes_factor

EXAMPLE = Path(__file__).resolve().parent / "examples" / "published_campaign.csv"
DISAGREEMENT = Decimal("0.12")  # share of items on which two equal models differ (statistics.md 1.3)
INFERENCE_VARIANCE = Decimal("0.004") ** 2  # of a board score under repetition
NUM_NULLS = 20_000
ALARM, SUSPECT = 0.975, 0.90  # points of the largest E of a campaign under the worst null
TOTAL = "all families"
MOST_LINES = 32  # the test grows with their cube
SCORE = re.compile(r"[01]|[01]?\.[0-9]{1,12}")


@dataclass(frozen=True)
class Scores:
    """A table as read: `dev[r]` maps families (or TOTAL) to scores, and `board[r]` is None where nothing was submitted."""

    rounds: tuple[str, ...]
    dev: tuple[Mapping[str, Decimal], ...]
    board: tuple[Decimal | None, ...]
    dev_rows: int
    board_rows: int
    dev_step: Decimal  # of the last printed digit
    board_step: Decimal


def read_table(path: Path, dev_rows: int | None = None, board_rows: int | None = None) -> Scores:
    """Read a CSV file. Raises NotFound, or ConfigError that names line and column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # a spreadsheet may begin it with a byte order mark
            reader = csv.DictReader(file, skipinitialspace=True)
            rows, columns = list(itertools.islice(reader, MOST_LINES + 1)), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise NotFound(f"cannot read {path} ({error})", f"An example that is there: {EXAMPLE}") from error
    families = [name for name in columns if name.startswith("dev:")]
    _check_form(path, columns, rows, ["round", "board"] if families else ["round", "dev", "board"])
    for name, option in (("--dev-rows", dev_rows), ("--board-rows", board_rows)):
        if option is not None and option < 1:
            raise ConfigError(f"{name} is {option}", "Valid: a number of rows, 1 at least")
    dev = tuple(
        {name.removeprefix("dev:"): _score(path, line, row, name) for name in families}
        if families
        else {TOTAL: _score(path, line, row, "dev")}
        for line, row in enumerate(rows, start=2)
    )
    board = tuple(
        _score(path, line, row, "board") if (row["board"] or "").strip() else None
        for line, row in enumerate(rows, start=2)
    )
    if board[0] is None:
        raise ConfigError(f"{path}, line 2: the reference has no board score", "Every lift is over it")
    if not any(score is not None for score in board[1:]):
        raise ConfigError(f"{path}: no line after the reference has a board score", "One is needed to judge anything")
    return Scores(
        rounds=tuple(str(row["round"]).strip() for row in rows),
        dev=dev,
        board=board,
        dev_rows=_rows(path, rows, "dev_rows") if dev_rows is None else dev_rows,
        board_rows=_rows(path, rows, "board_rows") if board_rows is None else board_rows,
        dev_step=_step([value for each in dev for value in each.values()]),
        board_step=_step([value for value in board if value is not None]),
    )


def judge_table(scores: Scores, num_nulls: int = NUM_NULLS) -> dict[str, Any]:
    """Return the verdict on each line after the first (`rounds`), the critical values and what was assumed. Numbers are decimal strings."""
    families = list(scores.dev[0])
    number_of_lines = len(scores.rounds)
    critical = critical_values_of_table(scores, num_nulls)
    found: list[dict[str, Any]] = []
    for number in range(1, number_of_lines):
        e_value, carried = e_values(scores, number)
        biggest = max(carried, key=lambda family: carried[family])
        with exactly():
            share = carried[biggest] / e_value
        p_value = null_p_value(critical["nulls"], float(e_value))
        state = next((word for word in ("alarm", "suspect") if float(e_value) > critical[word]), "none")
        found.append({
            "round": scores.rounds[number],
            "e_value": f"{e_value:.4f}",
            "p_value": f"{p_value:.4f}",
            "verdict": state,
            "family": biggest if len(families) > 1 and share >= Decimal("0.5") else "not identifiable",
            **compare_with_line_before(scores, number),
        })  # fmt: skip
    return {
        "rounds": found,
        "critical": {
            "alarm": f"{critical['alarm']:.3f}",
            "suspect": f"{critical['suspect']:.3f}",
            "worst_null": critical["worst"],
        },
        "nulls": num_nulls,
        "dev_rows": scores.dev_rows,
        "board_rows": scores.board_rows,
    }


def compare_with_line_before(scores: Scores, number: int) -> dict[str, str]:
    """Say whether the board score of this line beats that of the line before it (one-sided, 5 %), and by which z."""
    now, before = scores.board[number], scores.board[number - 1]
    if now is None or before is None:
        return {"beats_the_round_before": "not scored", "z": ""}
    with exactly():
        variance = DISAGREEMENT / scores.board_rows + 2 * (_rounding(scores.board_step) + INFERENCE_VARIANCE)
        z = (now - before) / variance.sqrt()
        supported = z > 0 and upper_tail(min(z, Decimal(12))) <= Decimal("0.05")
    return {"beats_the_round_before": "supported" if supported else "not supported", "z": f"{z:.2f}"}


def e_values(scores: Scores, upto: int) -> tuple[Decimal, dict[str, Decimal]]:
    """Return E from the lines up to number `upto`, and how much of it each family carries."""
    families = list(scores.dev[0])
    last = len(scores.rounds) - 1
    model = healthy_model_of_table(scores, upto)
    with exactly():
        carried = {}
        for position, family in enumerate(families):
            total = Decimal(0)
            for kind in KINDS:
                first = int(kind == "gain")
                if last - first < 1:
                    total += 1
                    continue
                opened = [bayes_factor(model, position, since, kind) for since in range(first, upto)]
                total += (sum(opened, Decimal(0)) + last - first - len(opened)) / (last - first)
            carried[family] = total / len(KINDS) / len(families)
        return sum(carried.values(), Decimal(0)), carried


def healthy_model_of_table(scores: Scores, upto: int) -> BoardModel:
    """Do as shift_test.healthy_model, from printed scores. Round 0 of the model is the first line after the reference.

    A family's lift on dev becomes the lift that the same effect in probits is worth on the board, as the reference's printed totals have it.
    """
    families = list(scores.dev[0])
    lines = [number for number in range(1, upto + 1) if scores.board[number] is not None]
    reference = scores.board[0]
    assert reference is not None
    with exactly():
        weight, rows = 1 / Decimal(len(families)), max(1, scores.dev_rows // len(families))
        levels = [[_level(line[family], rows) for family in families] for line in scores.dev]
        known = [information(corrected(Fraction(scores.dev[0][family]) * rows, rows), rows) for family in families]
        target = moved(levels[0], known, reference, scores.board_rows)
        means = [
            [
                weight * target.lift(number, now - before)
                for number, (now, before) in enumerate(zip(line, levels[0], strict=True))
            ]
            for line in levels[1 : upto + 1]
        ]
        effects = [means[number - 1] for number in lines]
        single = _rounding(scores.board_step) + INFERENCE_VARIANCE + weight * _rounding(scores.dev_step)
        items = DISAGREEMENT / 2 * (1 / Decimal(scores.board_rows) + 1 / Decimal(scores.dev_rows))
        covariance: Matrix = []
        for i in range(len(lines)):
            row = [single + items + HEALTHY_SD**2 * dot(effects[i], other) for other in effects]
            row[i] += single + items + SLACK_VARIANCE
            covariance.append(row)
        lower = cholesky(covariance)
        printed = [scores.board[number] or Decimal(0) for number in lines]
        residual = [y - reference - sum(effect, Decimal(0)) for y, effect in zip(printed, effects, strict=True)]
        return BoardModel(
            [number - 1 for number in lines],
            effects,
            means,
            lower,
            whiten(lower, residual),
            [HEALTHY_SD**2] * len(families),
        )


def critical_values_of_table(scores: Scores, num: int) -> dict[str, Any]:
    """Return quantiles of the campaign's largest E under the worst null on this table's own dev lifts, and all draws of that null."""
    from studies.printed_nulls import largest_e

    last = len(scores.rounds) - 1
    nulls = largest_e(healthy_model_of_table(scores, last), last, num)
    worst = max(nulls, key=lambda name: float(nulls[name][int(ALARM * num)]))
    points = {word: float(nulls[worst][int(point * num)]) for word, point in (("alarm", ALARM), ("suspect", SUSPECT))}
    return {**points, "worst": worst, "nulls": nulls[worst]}


def null_p_value(sorted_values: Any, value: float) -> float:
    """Return the share of the null's campaigns at or above a value, where the observed campaign counts as one of them."""
    import numpy as np

    above = len(sorted_values) - int(np.searchsorted(sorted_values, value))
    return (above + 1) / (len(sorted_values) + 1)


def _score(path: Path, line: int, row: Mapping[str, Any], column: str) -> Decimal:
    text = str(row.get(column) or "").strip()
    if SCORE.fullmatch(text) and Decimal(text) <= 1:
        return Decimal(text)
    raise ConfigError(
        f"{path}, line {line}: {column} is {row.get(column)!r}", "Valid: a score from 0 to 1, such as 0.84"
    )


def _check_form(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], needed: Sequence[str]) -> None:
    """Raises ConfigError for a table that is not of the form, before a cell of it is read."""
    cure = f"Valid: a header with {','.join(needed)}, the reference's line and {MOST_LINES - 1} more at most"
    if missing := [name for name in needed if name not in columns]:
        one = f"; its only column is {columns[0]!r}, and commas separate them" if len(columns) == 1 else ""
        raise ConfigError(f"{path} has no column {', '.join(missing)}{one}", cure)
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ConfigError(f"{path} has the column {', '.join(twice)} twice", "Each has one meaning")
    if not 2 <= len(rows) <= MOST_LINES:
        raise ConfigError(
            f"{path} has {'more than ' * (len(rows) > MOST_LINES)}{min(len(rows), MOST_LINES)} line(s) after its header",
            cure,
        )
    names = [str(row["round"]).strip() for row in rows]
    if odd := [name for name in names if not name.isprintable() or names.count(name) > 1]:
        raise ConfigError(
            f"{path} has the round {odd[0]!r} twice, or it does not print", "A line is a round, in their order"
        )


def _rows(path: Path, rows: Sequence[Mapping[str, Any]], column: str) -> int:
    words = {str(row.get(column) or "").strip() for row in rows} - {""}
    if len(words) == 1 and (word := words.pop()).isascii() and word.isdigit() and len(word) < 10 and int(word) > 0:
        return int(word)
    option = "--" + column.replace("_", "-")
    raise ConfigError(
        f"{path} does not say how many rows {column.removesuffix('_rows')} has", f"Give a column {column} or {option} N"
    )


def _step(values: Sequence[Decimal]) -> Decimal:
    """The coarsest last digit that all values are printed with."""
    return Decimal(1).scaleb(min(int(value.as_tuple().exponent) for value in values))


def _level(accuracy: Decimal, num_items: int) -> Decimal:
    return quantile(corrected(Fraction(accuracy) * num_items, num_items))


def _rounding(step_size: Decimal) -> Decimal:
    return decimal_of(1) * step_size**2 / 12
