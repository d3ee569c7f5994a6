"""What the stdlib entry points share: a command line that fails in one line, and files that are whole when they exist.

{"item_id": "roman-000012", "family": "roman", "prompt": "In Alice's Wonderland, numbers are ..."}
{"item_id": "roman-000013", "family": "roman", "prompt": "In Alice's Wonderland, numbers are ..."}
"""

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from substrate.interface.errors import DataError, UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are a UsageError instead of a usage text and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; DataError where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; a readable file in UTF-8 is needed") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file; DataError where it is none."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; one JSON value is needed") from None


def read_json_lines(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a file, one a line; DataError with the line's number unless each has `fields` with these types."""
    rows = []
    # Not splitlines(): a completion may hold U+2028 and the like, which JSON leaves unescaped.
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number}: {error}; one JSON object a line is needed") from None
        # `type is`, because a bool would pass for an int.
        if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in fields.items()):
            wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
            raise DataError(f"{path} line {number}: {line[:80]!r}; an object with {wanted} is needed")
        rows.append(row)
    return rows


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one object a line; ASCII only, so that no reader splits a line at an exotic separator."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, whole."""
    write_text(path, json.dumps(value) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside the path, flush to disk, rename: nobody ever reads half a file."""
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
        raise DataError(f"cannot write {path}: {error}; a writable folder is needed") from None
