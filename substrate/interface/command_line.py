"""What the entries share: a parser with one-line errors, checked reading of JSON, and atomic writing of files."""

import argparse
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from substrate.interface.errors import DataError, UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError where argparse would print a usage text and exit with code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the arguments")


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file. Raises DataError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; give a readable file in UTF-8") from None


def open_plain(path: Path) -> BufferedReader:
    """Opens a file for reading bytes. Raises DataError for a link to nothing and for what could hang: a pipe, device or folder.

    Whether a file is there ask `os.path.lexists`: a link to nothing is a damaged file, and no absent one.
    """
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # a FIFO would wait for its writer
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise DataError(
                f"cannot read {path}: it is a link to nothing; copy the folder with `cp -rL`, which follows links"
            ) from None
        raise DataError(f"cannot read {path}: {error.strerror}; give a readable file") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError(
            f"cannot read {path}: it is no plain file, but a folder, pipe or device; put the file itself there"
        )
    return file


def read_small(path: Path, most: int) -> str:
    """Returns the text of a plain UTF-8 file of at most `most` bytes, without a byte order mark. Raises DataError for others."""
    with open_plain(path) as file:
        try:
            content = file.read(most + 1)
            if len(content) > most:
                raise DataError(
                    f"cannot read {path}: it has more than {most} bytes, which no such file needs; replace it"
                )
            return content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}; give a readable file in UTF-8") from None


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file. Raises DataError if it cannot be read or parsed."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; the file must hold one JSON value") from None


def parse_object(text: str) -> dict[str, Any]:
    """Returns the object that a JSON text holds. Raises ValueError for another value, and for a key twice or not printable."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > len(dict(pairs)):
            twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
            raise ValueError(f"the key {twice} comes twice")
        if odd := [name for name, _ in pairs if not name.isprintable()]:
            raise ValueError(f"the key {ascii(odd[0])[:80]} cannot be printed")  # it would break the line of an error
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no object")
    return value


def read_json_lines(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Reads a file with one JSON object per line, such as {"item_id": "roman-000012", "family": "roman", "prompt": "..."}.

    Raises DataError with the line's number unless every object has `fields` with exactly these types.
    """
    rows = []
    # Not splitlines(): it would also split at U+2028 and similar characters, which JSON leaves unescaped.
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not JSON: {error}; each line must hold one object") from None
        # `type is`, because a bool would pass for an int.
        if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in fields.items()):
            wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
            raise DataError(f"{path} line {number}: {line[:80]!r}; each line must be an object with {wanted}")
        rows.append(row)
    return rows


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one object per line, in ASCII, so that no reader splits a line at a Unicode separator."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value as `write_text` does."""
    write_text(path, json.dumps(value) + "\n")


def as_umask_says(path: Path) -> None:
    """Gives a file the rights that `open` would have given it; safetensors makes its files readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Writes a temporary file beside the path, flushes it to disk and renames it, so nobody ever reads half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise DataError(f"cannot write {path}: {error}; its folder must exist and be writable") from None
