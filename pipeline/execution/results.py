"""Write and read the result file of an attempt and the ledger of a campaign. Only this module imports h5py.

An attempt's `result.h5` (schema 2) has its facts as attributes and, where it was scored, one row per item:

    /                      schema_version campaign round arm attempt role status exit_class traceback image_digest runtime_digest
                           constitution_digest config_digest adapter_digest seed started_at finished_at gpu_seconds coverage host
                           slurm_job_id edited_files train_steps train_gpu_seconds
    /items/<set>/          item_id family correct answer num_tokens truncated        set: dev, fresh
    /train/                step loss grad_norm learning_rate tokens seconds
    /completions/<set>     text, in item-id order

HDF5's user block, the first 512 bytes, holds the sha256 of everything after it as 64 hex digits, so that a reader notices a flipped bit.

`a3.h5` is a copy of the published attempt's file. Each meta stage rebuilds `ledger.h5` from the arm files; the same arm files give the
same bytes. Both are written atomically. A reader raises IntegrityError for a file that it cannot read.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.files import file_digest, read_bytes, write_file
from pipeline.campaign.layout import Round
from pipeline.campaign.records import Outcome, Plan

SCHEMA = 2
USER_BLOCK = 512
TEXT = h5py.string_dtype()
ATTRIBUTES: dict[str, type] = {
    "schema_version": int, "campaign": str, "round": str, "arm": str, "attempt": int, "role": str, "status": str, "exit_class": str,
    "traceback": str, "image_digest": str, "runtime_digest": str, "constitution_digest": str, "config_digest": str,
    "adapter_digest": str, "seed": int, "started_at": str, "finished_at": str, "gpu_seconds": float, "coverage": str,
    "host": str, "slurm_job_id": str, "edited_files": int, "train_steps": int, "train_gpu_seconds": float,
}  # fmt: skip
ITEM_COLUMNS = {"item_id": TEXT, "family": TEXT, "correct": "i1", "answer": TEXT, "num_tokens": "i4", "truncated": "i1"}
TRAIN_COLUMNS = {"step": "i8", "loss": "f8", "grad_norm": "f8", "learning_rate": "f8", "tokens": "i8", "seconds": "f8"}
Rows = Sequence[Mapping[str, Any]]


def write_result(
    path: Path,
    attributes: Mapping[str, Any],
    items: Mapping[str, Rows],
    train: Rows,
    completions: Mapping[str, Sequence[str]],
) -> None:
    """Write an attempt's result file.

    attributes: exactly the keys of ATTRIBUTES. items: set -> rows with ITEM_COLUMNS. train: rows with TRAIN_COLUMNS. completions: set ->
    texts in item-id order. Raises WorkFailed where the disk is full, ValueError for a missing or surplus attribute.
    """
    if set(attributes) != set(ATTRIBUTES):
        raise ValueError(f"these result attributes are missing or surplus: {sorted(set(attributes) ^ set(ATTRIBUTES))}")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", track_order=False, userblock_size=USER_BLOCK) as file:
        for name in ATTRIBUTES:
            value = ATTRIBUTES[name](attributes[name])
            file.attrs[name] = _text(value) if isinstance(value, str) else value
        for item_set in sorted(items):
            _write_table(file.create_group(f"items/{item_set}"), items[item_set], ITEM_COLUMNS)
        if train:
            _write_table(file.create_group("train"), train, TRAIN_COLUMNS)
        for item_set in sorted(completions):
            data = np.array([_text(text) for text in completions[item_set]], dtype=object)
            file.create_dataset(f"completions/{item_set}", data=data, dtype=TEXT, track_times=False)
    content = buffer.getvalue()[USER_BLOCK:]
    write_file(path, hashlib.sha256(content).hexdigest().encode().ljust(USER_BLOCK, b"\0") + content)


def read_attributes(path: Path) -> dict[str, Any]:
    """Read the attributes of a result file. Raises IntegrityError where it is truncated, damaged, not HDF5 or of another schema."""
    with _open(path) as file:
        return _attributes(path, file)


def status_of(path: Path) -> str:
    """Return completed or failed, or "" where there is no readable result."""
    try:
        return read_outcome(path, "").status
    except IntegrityError:
        return ""


def has_score(path: Path) -> bool:
    """Whether a result file is there, readable, and of an arm that has a score."""
    return status_of(path) == "completed"


def read_outcome(path: Path, result_digest: str) -> Outcome:
    """Read a published result as an Outcome. Raises IntegrityError as `read_attributes`, and where columns differ in length."""
    with _open(path) as file:
        attributes = _attributes(path, file)
        outcomes: dict[str, dict[str, str]] = {}
        for item_set, table in _read_items(file).items():
            by_family: dict[str, list[str]] = {}
            for family, ok, cut in zip(table["family"], table["correct"], table["truncated"], strict=True):
                by_family.setdefault(family.decode(), []).append(_mark(ok, cut))
            outcomes[item_set] = {family: "".join(text) for family, text in sorted(by_family.items())}
    names = ("arm", "role", "status", "exit_class", "adapter_digest")
    edited = attributes["edited_files"] > 0
    return Outcome(**{n: attributes[n] for n in names}, result_digest=result_digest, outcomes=outcomes, edited=edited)


def read_arm(folder: Round, frozen: Plan, arm: str, role: str) -> Outcome:
    """The outcome of one arm, as it was published. If it has no score, `exit_class` says why.

    The exit classes are `never_started`, `unfinished` (an attempt was claimed and left no result), `integrity: ...` (the file is damaged
    or belongs to another plan), and those that a worker records.
    """
    path = folder.published(arm)
    if not path.exists():
        return Outcome(arm, role, "absent", "unfinished" if folder.attempts(arm) else "never_started")
    try:
        attributes = read_attributes(path)
        expected = {
            "campaign": frozen.campaign, "round": frozen.round, "arm": arm, "image_digest": frozen.image_digest,
            "constitution_digest": frozen.constitution_digest, "config_digest": frozen.config_digest,
        }  # fmt: skip
        wrong = sorted(name for name, value in expected.items() if attributes[name] != value)
        if not wrong:
            return read_outcome(path, file_digest(path))
        why = f"made for another plan, {', '.join(wrong)} differ"
    except IntegrityError:
        why = "not a readable result file"  # the error's own message holds a path, and no record may
    return Outcome(arm, role, "failed", f"integrity: {why}", file_digest(path))


def lengths(path: Path) -> dict[str, list[int]]:
    """Return the tokens of each completion of a result file by set, in item-id order. Raises IntegrityError as `read_attributes`."""
    with _open(path) as file:
        return {item_set: table["num_tokens"].tolist() for item_set, table in _read_items(file).items()}


def item_marks(path: Path) -> dict[str, list[tuple[str, str, int, str]]]:
    """Return (family, item id, number of tokens, mark) of each item by set, in item-id order, and never an answer.

    The mark is that of `Outcome.outcomes`: 1 for right, 0 for wrong, T for truncated. Raises IntegrityError as `read_attributes`.
    """
    names = ("family", "item_id", "num_tokens", "correct", "truncated")
    with _open(path) as file:
        return {
            item_set: [
                (family.decode(), item_id.decode(), int(tokens), _mark(ok, cut))
                for family, item_id, tokens, ok, cut in zip(*(table[name] for name in names), strict=True)
            ]
            for item_set, table in _read_items(file).items()
        }


def _mark(is_right: bool, is_truncated: bool) -> str:
    return "T" if is_truncated else "1" if is_right else "0"


def write_ledger(path: Path, rounds: Mapping[str, Mapping[str, Path]]) -> None:
    """Write the ledger: /<round>/<arm>/ with the attributes and items of each arm file, in name order.

    rounds: round -> arm -> result file. Raises IntegrityError as `read_attributes`, WorkFailed where the disk is full.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", track_order=False) as ledger:
        ledger.attrs["schema_version"] = SCHEMA
        for round_name in sorted(rounds):
            for arm in sorted(rounds[round_name]):
                with _open(rounds[round_name][arm]) as file:
                    attributes, items = _attributes(rounds[round_name][arm], file), _read_items(file)
                group = ledger.create_group(f"{round_name}/{arm}")
                for name, value in attributes.items():
                    group.attrs[name] = value
                for item_set, table in items.items():
                    _write_columns(group.create_group(f"items/{item_set}"), table, ITEM_COLUMNS)
    write_file(path, buffer.getvalue())


def _write_table(group: h5py.Group, rows: Rows, columns: Mapping[str, Any]) -> None:
    values = {name: [row[name] for row in rows] for name in columns}
    _write_columns(
        group, {n: [_text(v) for v in vs] if columns[n] is TEXT else vs for n, vs in values.items()}, columns
    )


def _write_columns(group: h5py.Group, columns: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
        data = np.array(columns[name], dtype=object if kind is TEXT else kind)
        group.create_dataset(name, data=data, dtype=kind, track_times=False)


def _text(value: str) -> str:
    """Replace what HDF5 cannot hold in a model's text by visible characters: NUL, which ends a string, and lone surrogates."""
    return value.replace("\0", "\u2400").encode("utf-8", "backslashreplace").decode()


def _read_items(file: h5py.File) -> dict[str, dict[str, Any]]:
    """Read every column of every set. Raises ValueError where the columns of a set differ in length."""
    sets = {
        item_set: {name: table[name][:] for name in ITEM_COLUMNS} for item_set, table in file.get("items", {}).items()
    }
    for item_set, table in sets.items():
        if len({len(column) for column in table.values()}) > 1:
            raise ValueError(f"the columns of items/{item_set} differ in length")
    return sets


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """Open a result file. Raises IntegrityError for a wrong checksum and for everything that h5py cannot read.

    The checksum is taken of the bytes that are then parsed, because another machine may replace the file meanwhile.
    """
    try:
        content = read_bytes(path)
        if not _is_whole(content):
            raise ValueError("its content does not match the checksum in its first bytes")
        with h5py.File(io.BytesIO(content), "r") as file:
            yield file
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        cure = (
            "It is truncated, damaged or not a result file; start the arm again to replace it"
            if path.exists()
            else "The arm has published no result yet; start it again if no job of it runs"
        )
        raise IntegrityError(f"{path} is not a readable result file ({error})", cure) from error


def _is_whole(content: bytes) -> bool:
    """Whether the checksum in the first bytes matches the others."""
    digest = hashlib.sha256(memoryview(content)[USER_BLOCK:]).hexdigest()
    return content[:USER_BLOCK] == digest.encode().ljust(USER_BLOCK, b"\0")


def _attributes(path: Path, file: h5py.File) -> dict[str, Any]:
    if (schema := int(file.attrs["schema_version"])) != SCHEMA:  # first, because another schema has other attributes
        raise IntegrityError(
            f"{path} has schema {schema}", f"Read it with a version for that schema; this one reads {SCHEMA}"
        )
    return {name: kind(file.attrs[name]) for name, kind in ATTRIBUTES.items()}
