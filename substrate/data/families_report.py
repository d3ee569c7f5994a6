"""Tests solvers and generators on real rows: the tables of `python -m substrate.families report` and `compare`.

    family              rows  recognised  identical  correct  guessed  wrong  undetermined  unscorable  seconds
    roman              1,414       1,414      1,414    1,414        0      0             0           0      0.1

Columns of a report:

    rows          rows whose first sentence is the family's
    recognised    of these, those that the parser reads whole
    identical     those that are printed back byte for byte
    correct       those whose answer is right
    guessed       of the correct ones, those that the solver did not call determined
    wrong         those that the solver called determined and whose answer is not right
    undetermined  neither right nor called determined, so correct + wrong + undetermined = recognised
    unscorable    those whose own answer the scorer does not read from its box
"""

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

from substrate.answers import is_correct
from substrate.data.competition import Row
from substrate.tasks import FAMILIES

UNKNOWN = "unknown"
_MIN_EXPECTED = 5  # rarer classes are merged, because the chi-square approximation fails below that


@dataclass
class Count:
    """One line of a report; the module's docstring explains the columns."""

    rows: int = 0
    recognised: int = 0
    identical: int = 0
    correct: int = 0
    guessed: int = 0
    wrong: int = 0
    undetermined: int = 0
    unscorable: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """Counts by family, and a line for each row that somebody should look at."""

    by_family: dict[str, Count]
    listed: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, dict[str, float]]:
        """Returns the counts alone."""
        return {family: asdict(count) for family, count in self.by_family.items()}

    def as_text(self, *, with_rows: bool = False) -> str:
        """Returns a table with a line for each family and one for all; `with_rows` adds the listed rows."""
        names = [each.name for each in fields(Count)]
        total = Count(*(sum(getattr(count, name) for count in self.by_family.values()) for name in names))
        lines = ["family             " + "".join(f"{name:>14}" for name in names)]
        for family, count in {**self.by_family, "all": total}.items():
            values = (getattr(count, name) for name in names)
            cells = (f"{value:>14,.1f}" if type(value) is float else f"{value:>14,}" for value in values)
            lines.append(f"{family:19}" + "".join(cells))
        lines.append(f"solved {100 * total.correct / max(1, total.rows):.2f} % of {total.rows:,} rows")
        return "\n".join([*lines, *(self.listed if with_rows else ())])


def report(rows: Sequence[Row]) -> Report:
    """Parses, prints back and solves every row."""
    found = Report({})
    for row in sorted(rows, key=lambda row: row.family or UNKNOWN):
        count = found.by_family.setdefault(row.family or UNKNOWN, Count())
        count.rows += 1
        count.unscorable += not row.is_scorable
        if row.puzzle is None:
            found.listed.append(f"line {row.line} {row.row_id}: not a prompt of a known family")
            continue
        rules = FAMILIES[row.family]
        start = time.perf_counter()
        solution = rules.solve(row.puzzle)
        count.seconds += time.perf_counter() - start
        right = is_correct(row.answer, solution.answer)
        count.recognised += 1
        count.identical += rules.render(row.puzzle) == row.prompt
        count.correct += right
        count.guessed += right and not solution.determined
        count.wrong += solution.determined and not right
        count.undetermined += not right and not solution.determined
        if solution.determined and not right:
            found.listed.append(f"line {row.line} {row.row_id}: solved {solution.answer!r}, the row has {row.answer!r}")
        if not row.is_scorable:
            found.listed.append(f"line {row.line} {row.row_id}: the scorer does not read {row.answer!r} from its box")
    return found


@dataclass(frozen=True)
class Difference:
    """One feature of a family, compared between real rows and as many generated ones."""

    family: str
    feature: str
    test: str  # KS or chi-square
    p_value: float
    real: str  # quartiles, or the most common classes
    generated: str


@dataclass(frozen=True)
class Comparison:
    """All features of all families."""

    differences: list[Difference]

    def as_json(self) -> list[dict[str, float | str]]:
        """Returns one dictionary per feature."""
        return [asdict(each) for each in self.differences]

    def as_text(self) -> str:
        """Returns a table, and how often chance alone gives so small a p-value."""
        lines = [f"{'family':17}{'feature':20}{'test':11}{'p-value':>9}  real | generated"]
        for each in self.differences:
            shown = (
                f"{each.family:17}{each.feature:20}{each.test:11}{each.p_value:>9.4f}  {each.real} | {each.generated}"
            )
            lines.append(shown)
        smallest, number = min(each.p_value for each in self.differences), len(self.differences)
        chance = 1 - (1 - smallest) ** number
        return "\n".join(
            [*lines, f"the smallest of {number} p-values is {smallest:.4g}; by chance, in {chance:.1%} of cases"]
        )


def compare(rows: Sequence[Row]) -> Comparison:
    """Compares generated puzzles of level `full` with the rows whose answers are determined, feature by feature.

    Other rows are left out because generators draw determined puzzles only: what cannot be solved cannot be learned.
    Numbers are compared by the Kolmogorov-Smirnov test, classes by the chi-square test of homogeneity.
    """
    differences = []
    for family, rules in FAMILIES.items():
        real = [row.puzzle for row in rows if row.family == family and row.puzzle is not None]
        real = [puzzle for puzzle in real if rules.solve(puzzle).determined]
        if real:
            drawn = [rules.generate(random.Random(seed), "full") for seed in range(len(real))]
            left, right = ([_features(family, puzzle) for puzzle in side] for side in (real, drawn))
            names = dict.fromkeys(name for each in left for name in each)
            differences += [_compare(family, name, _all(left, name), _all(right, name)) for name in names]
    return Comparison(differences)


def _features(family: str, puzzle: object) -> Mapping[str, Sequence[float | str]]:
    rules = FAMILIES[family]
    prompt = rules.render(puzzle)
    own = rules.features(puzzle)
    return {"examples": [str(prompt.count("\n") - rules.PHRASES[0].count("\n"))], "prompt length": [len(prompt)], **own}


def _all(sides: list[Mapping[str, Sequence[float | str]]], name: str) -> list[float | str]:
    return [value for side in sides for value in side.get(name, ())]


def _compare(family: str, name: str, real: list[float | str], drawn: list[float | str]) -> Difference:
    from scipy import stats

    if isinstance(real[0], str):
        counts = [Counter(map(str, side)) for side in (real, drawn)]
        table = _grouped(counts)
        p_value = float(stats.chi2_contingency(table).pvalue) if len(table[0]) > 1 else 1.0
        return Difference(family, name, "chi-square", p_value, *map(_most_common, counts))
    numbers = [[float(value) for value in side] for side in (real, drawn)]
    p_value = float(stats.ks_2samp(*numbers).pvalue)
    return Difference(family, name, "KS", p_value, *map(_quartiles, numbers))


def _grouped(counts: list[Counter[str]]) -> list[list[int]]:
    """Returns the two sides' counts by class; classes expected less than five times on a side are merged."""
    total = counts[0] + counts[1]
    smaller = min(sum(each.values()) for each in counts) / sum(total.values())
    frequent = [name for name in sorted(total) if total[name] * smaller >= _MIN_EXPECTED]
    table = [
        [each[name] for name in frequent] + [sum(each.values()) - sum(each[n] for n in frequent)] for each in counts
    ]
    return table if table[0][-1] + table[1][-1] else [side[:-1] for side in table]


def _most_common(counts: Counter[str]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.1%}" for name, count in counts.most_common(3))


def _quartiles(values: list[float]) -> str:
    ordered = sorted(values)
    return " ".join(f"{ordered[round(share * (len(ordered) - 1))]:g}" for share in (0, 0.25, 0.5, 0.75, 1))
