"""From the training file to the rows of a run: which examples, in which order, and the data card that records them.

    shares of families  ->  places        the family of each place, so that every prefix follows the shares
    real and generated  ->  their places  within a family's, by `real_share`
    slice               ->  its places    within the generated ones, by `slice_share`
    epochs              ->  how many      different examples fill the places: as many as there are, or fewer, repeated
    curriculum          ->  order         shuffled, or the short ones of a family first

One line of the file, and the row that it becomes (`|` where the prompt ends; only what follows is learned):

    {"item_id": "roman-000012", "family": "roman", "prompt": "... 38 ...", "answer": "XXXVIII",
     "traces": {"short": "30 8", "stepwise": "30 XXX ..."}, "source": "generated"}
    <s> ... 3 8 ... <think> | 3 0 _ X X X ... </think> \\boxed{ X X X V I I I } </s>

Examples, plan and seed determine everything. The data card (docs/contract.md) records what was chosen, what was left out
and why, and the digest of every prompt that the run can learn from, which the judge compares with its own prompts.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from substrate.data.prompt_overlap import prompt_digest
from substrate.interface.command_line import read_json_lines
from substrate.interface.errors import DataError, UsageError

CURRICULA = ("shuffled", "short_first")
SOURCES = ("generated", "slice", "real")  # a "slice" row is generated too, and lies in its family's declared slice
WEIGHTINGS = ("uniform", "per_family", "per_row", "min_log_prob")  # of a batch's loss: batches.make_batch


class Example(NamedTuple):
    """One solved puzzle."""

    item_id: str
    family: str
    prompt: str
    answer: str
    traces: dict[str, str]  # the reasoning, by style
    source: str  # one of SOURCES


class Row(NamedTuple):
    """An example as token ids."""

    item_id: str
    family: str
    prompt: list[int]
    learned: list[int]  # the tokens after the prompt, which end with </s>
    answer: str

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.learned)


Encode = Callable[[Example], tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Plan:
    """How to choose and order examples: keys of a recipe, by the same names. Raises UsageError for a wrong value."""

    mix: dict[str, float]  # share of each family in the places; a family without one is left out
    real_share: float  # share of real rows in each family's places
    epochs: float  # passes through the chosen examples; 0: use as many different ones as there are
    curriculum: str  # one of CURRICULA
    holdout_per_family: int  # examples of each family that are not trained on
    sequence_length: int  # most tokens of an example; longer ones are left out and listed in the card
    num_places: int  # rows of the run: steps x batch size
    seed: int
    slice_share: float = (
        0.0  # of the generated places of a family with a slice, those that are filled from the slice alone
    )

    def __post_init__(self) -> None:
        total = sum(self.mix.values())
        if min(self.mix.values(), default=-1) < 0 or not 0 < total < float("inf"):
            raise UsageError(f"mix is {self.mix}; valid are shares >= 0, of which one is > 0")
        if self.curriculum not in CURRICULA:
            raise UsageError(f"curriculum is {self.curriculum!r}; valid are {', '.join(CURRICULA)}")
        if not 0 <= self.slice_share <= 1:
            raise UsageError(f"slice_share is {self.slice_share}; valid are 0 to 1")

    @property
    def families(self) -> dict[str, float]:
        """The families with a share above 0."""
        return {family: share for family, share in self.mix.items() if share > 0}


@dataclass(frozen=True)
class Prepared:
    """A run's rows in order, its holdout by family, and its data card."""

    rows: list[Row]
    holdout: dict[str, list[Row]]
    card: dict[str, Any]


def read_examples(path: Path) -> list[Example]:
    """Reads a training file (JSON lines, docs/contract.md). Raises DataError with the line's number."""
    fields: dict[str, type] = {**dict.fromkeys(Example._fields, str), "traces": dict}
    return [Example(*(row[name] for name in Example._fields)) for row in read_json_lines(path, fields)]


def prepare(examples: Sequence[Example], encode: Encode, plan: Plan) -> Prepared:
    """Chooses and orders the rows. Raises DataError if the plan asks for a family or source that the file lacks."""
    chosen: dict[str, list[Row]] = {}
    holdout: dict[str, list[Row]] = {}
    described: dict[str, Any] = {}
    digests: set[str] = set()
    num_places = _counts(plan.families, plan.num_places)
    for family in plan.families:
        members = [example for example in examples if example.family == family]
        if not members:
            present = ", ".join(sorted({example.family for example in examples}))
            raise DataError(f"mix names {family}, which the training file lacks; it holds {present}")
        pick = _Family(family, members, encode, plan)
        holdout[family] = pick.holdout
        chosen[family] = pick.rows(num_places[family])
        described[family] = pick.describe(chosen[family])
        digests |= pick.digests
    if plan.slice_share and not any(example.source == "slice" for example in examples):
        raise DataError(
            f"slice_share is {plan.slice_share}, and no row of the training file lies in a declared slice; set it to 0"
        )
    order = family_order(plan.families, plan.num_places)
    following = {family: iter(rows) for family, rows in chosen.items()}
    rows = [next(following[family]) for family in order]
    card = {"schema": 1, "num_places": plan.num_places, "families": described, "prompts": sorted(digests)}
    return Prepared(rows, holdout, card)


class _Family:
    """The examples of one family, encoded when they are taken; those that are too long are skipped."""

    def __init__(self, family: str, members: list[Example], encode: Encode, plan: Plan) -> None:
        self.family, self._encode, self._plan = family, encode, plan
        self.left_out: list[str] = []
        self.digests: set[str] = set()
        # random.Random hashes a string seed with SHA-512: the same on every host and in every process.
        self._generator = random.Random(f"{plan.seed}/{family}")
        # Held out in the file's order, so that every seed holds out the same.
        self.holdout = [row for row, _ in islice(self._encoded(members), plan.holdout_per_family)]
        rest = members[len(self.holdout) + len(self.left_out) :]
        self._has_slice = any(example.source == "slice" for example in members)
        self._by_source = {
            source: [example for example in rest if self._is_of(source, example)]
            for source, share in self._source_shares().items()
            if share > 0
        }
        for source, found in self._by_source.items():
            if not found:
                raise DataError(
                    f"no {source} example of {family} is left to train on; change real_share {plan.real_share}, "
                    f"slice_share {plan.slice_share} or the holdout"
                )

    def _source_shares(self) -> dict[str, float]:
        real = self._plan.real_share
        in_slice = (1 - real) * self._plan.slice_share if self._has_slice else 0.0
        return {"generated": 1 - real - in_slice, "slice": in_slice, "real": real}

    def _is_of(self, source: str, example: Example) -> bool:
        """Whether an example may fill a place of this source. A slice is a part of what is generated."""
        return example.source == source or (source == "generated" and example.source == "slice")

    def rows(self, num_places: int) -> list[Row]:
        """Returns the family's rows in order."""
        shares = {source: share for source, share in self._source_shares().items() if share > 0}
        needed = _counts(shares, num_places)
        streams = {source: iter(self._fill(source, needed[source])) for source in shares}
        rows = [next(streams[source]) for source in family_order(shares, num_places)]
        return sorted(rows, key=lambda row: len(row.learned)) if self._plan.curriculum == "short_first" else rows

    def _fill(self, source: str, num_places: int) -> list[Row]:
        """Fills the places with passes through the source's examples, each pass in a new order."""
        if not num_places:
            return []
        members = self._by_source[source]
        # With fewer epochs than one pass through all of them would need, all examples are used.
        passes = max(self._plan.epochs, num_places / len(members)) if self._plan.epochs else num_places / len(members)
        limit = min(len(members), math.ceil(num_places / passes))
        shuffled = self._generator.sample(members, len(members))
        rows: list[Row] = []
        for row, digest in self._encoded(shuffled):
            rows.append(row)
            self.digests.add(digest)
            if len(rows) == min(limit, num_places):
                break
        if not rows:
            raise DataError(
                f"every {source} example of {self.family} is longer than sequence_length {self._plan.sequence_length}; raise it"
            )
        filled, rows = list(rows), sorted(rows, key=lambda row: row.item_id)
        while len(filled) < num_places:
            filled += self._generator.sample(rows, len(rows))
        return filled[:num_places]

    def _encoded(self, members: Sequence[Example]) -> Iterator[tuple[Row, str]]:
        for example in members:
            row = Row(example.item_id, example.family, *self._encode(example), example.answer)
            if row.num_tokens > self._plan.sequence_length:
                self.left_out.append(example.item_id)
            else:
                yield row, prompt_digest(example.prompt)

    def describe(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Returns the family's part of the card; tokens are counted with repeats."""
        different = {row.item_id for row in rows}
        return {
            "places": len(rows),
            "examples": len(different),
            "holdout": len(self.holdout),
            "tokens": sum(row.num_tokens for row in rows),
            "learned_tokens": sum(len(row.learned) for row in rows),
            "longest": max((row.num_tokens for row in rows), default=0),
            "too_long": sorted(set(self.left_out)),
        }


def family_order(mix: dict[str, float], num_places: int) -> Iterator[str]:
    """Yields the family of each place, so that the counts in every prefix follow the shares to about one.

    `mix` maps a family to its share, normalised here. The family furthest behind its share is next; the first named wins
    a tie.
    """
    total = sum(mix.values())
    held = dict.fromkeys(mix, 0)
    for place in range(1, num_places + 1):
        family = max(mix, key=lambda name: mix[name] / total * place - held[name])
        held[family] += 1
        yield family


def _counts(mix: dict[str, float], num_places: int) -> dict[str, int]:
    counts = dict.fromkeys(mix, 0)
    for family in family_order(mix, num_places):
        counts[family] += 1
    return counts
