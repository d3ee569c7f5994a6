"""Reads a table from a CSV file as people save it, or says in one sentence why it cannot be read.

Read are: UTF-8 with and without a byte order mark, UTF-16 and UTF-32 with one; commas, semicolons, tabs or bars between
fields, as the header shows; any line ends; blank lines; the wanted columns in any order and capitals, with others beside;
separators at the end of every row. Nothing is guessed: bytes of another encoding, a NUL, a field without an end, blanks before a
quote, a row with other fields than the rest, a second header or a missing column are refused by place.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from substrate.interface.errors import DataError

LONGEST_FIELD = 131_072  # characters; a longer field has lost its closing quote
SEPARATORS = ",;\t|"
MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
"""Byte order marks; that of UTF-32 begins with that of UTF-16."""
OTHERS = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"BZh", "compressed by bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it"),
    (b"PK", "a zip archive or an Excel workbook", "unpack the archive, or save the sheet as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", "save the sheet as CSV UTF-8"),
    (b"PAR1", "a Parquet file", "save it as CSV"),
    (b"SQLite format 3", "a SQLite database", "save its table as CSV"),
    (b"%PDF", "a PDF", "download the CSV file instead"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself with `git lfs pull`"),
    (b"<", "a web page", "log in, and download the CSV file again"),
    (b"{", "JSON", "save it as CSV"),
    (b"[", "JSON", "save it as CSV"),
)
"""First bytes of files that somebody took for CSV, what they are, and the cure."""
_BAD_BYTE = re.compile("[\udc80-\udcff]")  # what Python makes of a byte that is not UTF-8


def read_table(path: Path, columns: Sequence[str]) -> list[tuple[int, list[str]]]:
    """Returns each row's last line in the file, and its fields in the order of `columns`; line ends in fields are "\\n".

    Raises DataError with the file, the line, what is wrong and what to do.
    """
    text = _text_of(path, columns)
    before = csv.field_size_limit(
        max(LONGEST_FIELD, len(text))
    )  # so that a field that is too long has a line and a name
    try:
        return list(_rows(path, text, columns))
    finally:
        csv.field_size_limit(before)


def _text_of(path: Path, columns: Sequence[str]) -> str:
    """Returns the file's text, in which surrogates stand for bytes that are not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give the path of a file that you may read") from None
    if not data.strip():
        raise _no_text(path, columns)
    for first, what, cure in OTHERS:
        if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(first):
            raise DataError(f"{path} is {what}, not CSV; {cure}")
    mark, coding = next(((mark, coding) for mark, coding in MARKS if data.startswith(mark)), (b"", "utf-8"))
    if not mark and b"\0" in data[:4]:
        raise DataError(f"{path} looks like UTF-16 or UTF-32 without a byte order mark; save it as UTF-8")
    try:
        text = data[len(mark) :].decode(coding, "surrogateescape" if coding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        at = f"byte {error.start + len(mark)} is not {coding.upper()}, as its byte order mark says"
        raise DataError(f"{path}: {at}; save it as UTF-8") from None
    return text.removesuffix("\x1a")  # the end of a file under DOS


def _rows(path: Path, text: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    separator = _separator(text, columns)
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    last = 0  # line where the row before ends
    header: list[str] = []
    places: list[int] = []
    sizes: list[tuple[int, int]] = []  # last line and number of fields of each row
    try:
        for fields in reader:
            first, last = last + 1, reader.line_num
            if not any(field.strip() for field in fields) or (first == 1 and _is_separator_line(fields, separator)):
                continue
            where = f"{path} line {last}"
            if not header:
                header, places = fields, _places(where, fields, columns)
                continue
            _check_quotes(where, "".join(lines[first - 1 : last]), separator, fields)
            _check_fields(where, fields, header)
            if set(columns) <= {_plain(field) for field in fields}:
                raise DataError(
                    f"{where}: the header comes again; remove this line, and check that the rows below it belong here"
                )
            sizes.append((last, len(fields)))
            yield last, [fields[place].replace("\r\n", "\n").replace("\r", "\n") for place in places]
    except csv.Error as error:
        place = f"{path} line {reader.line_num}: {error}, in the row that begins on line {last + 1}"
        cure = f'put fields with {separator!a}, quotes or line ends in quotes, close every quote, and write one in a field as ""'
        raise DataError(f"{place}; {cure}") from None
    if not header:
        raise _no_text(path, columns)
    longer = [(line, size) for line, size in sizes if size > len(header)]
    if longer and (
        len(sizes) == 1 or len({size for _, size in sizes}) > 1
    ):  # a separator without quotes before an empty field
        line, size = longer[0]
        raise _wrong_number(f"{path} line {line}", size, header)


def _separator(text: str, columns: Sequence[str]) -> str:
    """Returns the separator by which the header has the columns, or most fields. Excel may name it in a line before the header."""
    for line in text.splitlines():
        if named := re.fullmatch(r'"?sep=(.)"?', line, re.IGNORECASE):
            return named[1]
        if line.strip(SEPARATORS + " "):
            names = {sign: [_plain(name) for name in line.split(sign)] for sign in SEPARATORS}
            return max(SEPARATORS, key=lambda sign: (sum(name in names[sign] for name in columns), len(names[sign])))
    return ","


def _no_text(path: Path, columns: Sequence[str]) -> DataError:
    return DataError(f"{path} is empty, line 1: ''; the header must be {','.join(columns)}, with rows below it")


def _is_separator_line(fields: list[str], separator: str) -> bool:
    return separator.join(fields).lower().startswith("sep=")


def _plain(name: str) -> str:
    return name.strip().strip('"').strip().casefold()


def _places(where: str, header: list[str], columns: Sequence[str]) -> list[int]:
    """Returns where the header has each column. Raises DataError for a column that is missing or there twice."""
    names = [_plain(name) for name in header]
    wanted = ",".join(columns)
    missing = [column for column in columns if column not in names]
    if missing:
        what = "is no header" if len(missing) == len(columns) else f"has no column {missing[0]}"
        raise DataError(f"{where}: {','.join(header)[:80]!a} {what}; the first line must be the header {wanted}")
    twice = [column for column in columns if names.count(column) > 1]
    if twice:
        raise DataError(f"{where}: the header names {twice[0]} more than once; remove or rename the other column")
    return [names.index(column) for column in columns]


def _check_fields(where: str, fields: list[str], header: list[str]) -> None:
    """Raises DataError for a row that has not the header's number of fields, or a field that is no text; the first is named."""
    for number, field in enumerate(fields):
        column = f"column {_plain(header[number])[:40]!a}" if number < len(header) else f"field {number + 1}"
        if len(field) > LONGEST_FIELD:
            what = f"has {len(field):,} characters, more than {LONGEST_FIELD:,}"
            raise DataError(f"{where}: {column} {what}; look for a closing quote that is missing, or remove the row")
        if "\0" in field:
            raise DataError(f"{where}: {column} holds a NUL character; save the file as UTF-8 text, or get it again")
        if bad := _BAD_BYTE.search(field):
            byte = f"the byte 0x{ord(bad[0]) - 0xDC00:02X}, which is not UTF-8"
            cure = "save the file as UTF-8 (`iconv -f WINDOWS-1252 -t UTF-8`, or CSV UTF-8 in Excel)"
            raise DataError(f"{where}: {column} holds {byte}; {cure}")
    if len(fields) < len(header) or any(field.strip() for field in fields[len(header) :]):
        raise _wrong_number(where, len(fields), header)


def _wrong_number(where: str, size: int, header: list[str]) -> DataError:
    cure = "put fields that hold a separator in quotes, complete rows that lack one, and remove separators at the end"
    return DataError(f"{where}: {size} fields, but the header names {len(header)}; {cure}")


def _check_quotes(where: str, row: str, separator: str, fields: list[str]) -> None:
    """Raises DataError for a field that has blanks before its opening quote, which then is no quote but text. row: as the file has it."""
    if any(re.match(r'\s+"', field) for field in fields):
        start = rf"(?:^|{re.escape(separator)})"
        if re.search(rf'{start}\s+"', re.sub(rf'{start}"(?:[^"]|"")*"', "", row)):
            raise DataError(
                f"{where}: a field has blanks before its opening quote; remove the blanks between separator and quote"
            )
