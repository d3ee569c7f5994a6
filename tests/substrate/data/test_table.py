"""Case 12: real rows as people save them. Each form is read as the same rows, or refused in one sentence with place and cure."""

import codecs
import gzip
import io
import os
import random
import re
import zipfile
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError
from pipeline.cluster import doctor
from pipeline.config import settings
from pipeline.rounds import init
from pipeline.sandbox import entries
from substrate.data.competition import read_rows
from substrate.data.table import LONGEST_FIELD
from substrate.interface.errors import DataError
from substrate.tasks import FAMILIES

PLAIN = 'id,prompt,answer\n1,"two\nlines",42\n2,"says ""x"", and ø",ab;c\n'
ROWS = [("1", "two\nlines", "42"), ("2", 'says "x", and ø', "ab;c")]
UTF8 = PLAIN.encode()


def with_separator(sign: str) -> bytes:
    quoted = f'id{sign}prompt{sign}answer\n1{sign}"two\nlines"{sign}42\n2{sign}"says ""x"", and ø"{sign}"ab;c"\n'
    return quoted.encode()


READ = {
    "as the competition has it": UTF8,
    "a byte order mark": codecs.BOM_UTF8 + UTF8,
    "UTF-16, little end first": codecs.BOM_UTF16_LE + PLAIN.encode("utf-16-le"),
    "UTF-16, big end first": codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
    "UTF-32": codecs.BOM_UTF32_LE + PLAIN.encode("utf-32-le"),
    "line ends of Windows": UTF8.replace(b"\n", b"\r\n"),
    "line ends of an old Mac": UTF8.replace(b"\n", b"\r"),
    "blank lines before, between and after": b"\n\r\n" + UTF8.replace(b"\n2,", b"\n\n , ,\n2,") + b"\n\n,,\n  \n",
    "no line end at the end": UTF8.rstrip(),
    "the end of a DOS file": UTF8 + b"\x1a",
    "capitals and blanks in the header": UTF8.replace(b"id,prompt,answer", b'"ID", Prompt ,ANSWER'),
    "an index, and empty columns of a sheet": b',id,prompt,answer,,\n0,1,"two\nlines",42,,\n1,2,"says ""x"", and \xc3\xb8",ab;c,,\n',
    "another order, and further columns": b'answer,note,id,prompt\n42,"a, b",1,"two\nlines"\nab;c,,2,"says ""x"", and \xc3\xb8"\n',
    "empty fields beyond the header": UTF8.replace(b"42\n", b"42,\n").replace(b"ab;c\n", b"ab;c,\n"),
    "semicolons": with_separator(";"),
    "tabs": with_separator("\t"),
    "bars": with_separator("|"),
    "semicolons, which Excel names before": b"sep=;\r\n" + with_separator(";"),
    "a line that names the comma": b"sep=,\n" + UTF8,
}


@pytest.mark.parametrize("content", READ.values(), ids=READ)
def test_case_12_is_read_as_the_same_rows(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    assert [(row.row_id, row.prompt, row.answer) for row in read_rows(tmp_path / "train.csv")] == ROWS


def test_case_12_a_quoted_text_may_begin_with_blanks_and_a_quote(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('id,prompt,answer\n1," ""x"", ""y"" is",\'6"\n2,"a, "" b",c\n')
    rows = [(row.prompt, row.answer) for row in read_rows(tmp_path / "train.csv")]
    assert rows == [(' "x", "y" is', "'6\""), ('a, " b', "c")]


def workbook() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return content.getvalue()


HEADER = b"id,prompt,answer\n"
REFUSED = {
    "nothing": (b"", "is empty", "header must be id,prompt,answer"),
    "blank lines alone": (b"\n \r\n", "is empty", "header must be id,prompt,answer"),
    "a header alone": (HEADER, "no rows below its header", "rows of id,prompt,answer are needed"),
    "no header": (b"1,p,a\n2,p,a\n", r"line 1: '1,p,a' is no header", "first line must be the header id,prompt,answer"),
    "a column is missing": (b"id,question,answer\n1,p,a\n", "line 1: .* has no column prompt", "must be the header"),
    "a column is there twice": (b"id,prompt,answer,Answer\n1,p,a,b\n", "line 1: the header names answer more than once", "remove or rename"),
    "an empty answer": (HEADER + b"1,p,a\n2,p,\n", "line 3: no answer", "fill the column answer in, or remove the row"),
    "an answer of blanks": (HEADER + b"1,p,  \n", "line 2: no answer", "remove the row"),
    "an id twice": (HEADER + b"7,p,a\n\n7,q,a\n", "line 4: id 7 came before, on line 2", "keep one"),
    "a NUL": (HEADER + b"1,p,a\n2,p\0q,a\n", "line 3: column 'prompt' holds a NUL", "save the file as UTF-8"),
    "NULs at the end": (HEADER + b"1,p,a\n\0\0\0", "line 3: column 'id' holds a NUL", "get it again"),
    "Latin-1": (HEADER + "1,p,caf\xe9\n".encode("latin-1"), "line 2: column 'answer' holds the byte 0xE9, .* not UTF-8", "iconv|CSV UTF-8"),
    "Latin-1 after lines in quotes": (HEADER + b'1,"a\nb",c\n2,\x93x\x94,d\n', "line 4: column 'prompt' holds the byte 0x93", "UTF-8"),
    "UTF-16 without its mark": (PLAIN.encode("utf-16-le"), "without a byte order mark", "save it as UTF-8"),
    "UTF-16 that is cut": (codecs.BOM_UTF16_LE + PLAIN.encode("utf-16-le")[:-1], "is not UTF-16-LE", "save it as UTF-8"),
    "a long field": (HEADER + b"1,p,a\n2," + b"x" * (LONGEST_FIELD + 1) + b",a\n", "line 3: column 'prompt' has 131,073 char", "closing quote"),
    "a long field of several lines": (HEADER + b'1,"' + b"x\n" * LONGEST_FIELD + b'",a\n', "column 'prompt' has 262,144 char", "remove the row"),
    "a quote that never closes": (HEADER + b'1,p,a\n2,"p,a\n3,p,a\n', "line 4: .*row that begins on line 3", "close every quote"),
    "a quote inside a field": (HEADER + b'1,"p"x,a\n', "line 2: .*begins on line 2", "in quotes"),
    "a comma that is not quoted": (HEADER + b"1,p, and q,a\n", "line 2: 4 fields, but the header names 3", "in quotes"),
    "a comma that is not quoted, before an empty field": (HEADER + b"1,p with, comma,\n2,q,b\n", "line 2: 4 fields, .* names 3", "in quotes"),
    "one row with a comma that is not quoted": (HEADER + b"1,p with, comma,\n", "line 2: 4 fields, .* names 3", "in quotes"),
    "more separators at the end than other rows": (HEADER + b"1,p,a,\n2,p, q,,\n", "line 2: 4 fields", "separators at the end"),
    "a last row with a separator too many": (HEADER + b"1,p,a\n\n2,p,a, \n", "line 4: 4 fields", "separators at the end"),
    "a header again": (HEADER + b"1,p,a\n" + HEADER + b"2,p,a\n", "line 3: the header comes again", "remove this line"),
    "a header again, in another order": (HEADER + b'1,p,a\n"Answer",id ,PROMPT\n', "line 3: the header comes again", "remove this line"),
    "blanks before a quote": (HEADER + b'1,p,a\n2, "ab",q\n', "line 3: a field has blanks before its opening quote", "remove the blanks"),
    "blanks before a quote with a comma": (HEADER + b'1,p,a\n2, "a,b",q\n', "line 3: a field has blanks before", "remove the blanks"),
    "blanks before the first quote": (HEADER + b' "1",p,a\n', "line 2: a field has blanks before", "remove the blanks"),
    "a tab before a quote": (HEADER + b'1,"p\n",\t"a"\n', "line 3: a field has blanks before", "remove the blanks"),
    "a row that is cut": (HEADER + b"1,p,a\n2,p", "line 3: 2 fields", "complete rows"),
    "gzip": (gzip.compress(UTF8), "is compressed by gzip", "gunzip"),
    "a workbook": (workbook(), "Excel workbook", "CSV UTF-8"),
    "an old workbook": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "Excel workbook", "CSV UTF-8"),
    "a login page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html>Sign in</html>", "is a web page", "log in"),
    "JSON lines": (b'{"id": 1, "prompt": "p", "answer": "a"}\n', "is JSON", "save it as CSV"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS", "git lfs pull"),
    "Parquet": (b"PAR1" + bytes(20), "Parquet", "CSV"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "what", "cure"), REFUSED.values(), ids=REFUSED)
def test_case_12_is_refused_in_one_sentence_with_place_and_cure(
    tmp_path: Path, content: bytes, what: str, cure: str
) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(path)
    said = str(error.value)
    assert said.startswith(str(path)) and re.search(f"{what}.*; .*({cure})", said), said
    assert said.isascii() and said.isprintable() and len(said) < len(str(path)) + 300
    assert r"\ufeff" not in said and r"\x00" not in said


def test_case_12_a_folder_or_a_file_that_is_away_is_refused(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "absent.csv", "No such file or directory")):
        with pytest.raises(DataError, match=f"cannot read .*{why}; give the path"):
            read_rows(path)


def test_case_12_is_told_before_a_campaign_has_a_folder_and_by_doctor(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(HEADER + b"1,p,a\n2,p,\n")
    chosen = settings.compose([f"tasks.train_csv={path}"])
    with pytest.raises(ConfigError, match="tasks.train_csv: .* line 3: no answer. Fill the column answer in"):
        init.check_can_be_planned(chosen, init.load_constitution(), is_draft=False)
    [check] = [check for check in doctor.examine(chosen) if check.name == "real rows"]
    assert (check.verdict, "line 3: no answer" in check.found, "remove the row" in check.cure) == ("bad", True, True)
    path.write_bytes(HEADER + b"".join(b"id%d,What is it?,7\n" % number for number in range(500)))
    with pytest.raises(ConfigError) as error:
        init.check_can_be_planned(chosen, init.load_constitution(), is_draft=False)
    assert (
        "none of the rows can be trained on: 500 because its prompt begins as no family's does (id id0, id1, id2 ...). "
        in str(error.value)
    )
    assert "families show NAME" in error.value.cure and len(str(error.value)) < 450
    [check] = [check for check in doctor.examine(chosen) if check.name == "real rows"]
    assert check.verdict == "bad" and "500 because" in check.found


def test_doctor_says_how_many_rows_are_used_and_why_others_are_not(tmp_path: Path) -> None:
    rules = FAMILIES["roman"]
    puzzles = [rules.generate(random.Random(seed), "small") for seed in range(30)]
    rows = [f'r{n},"{rules.render(puzzle)}",{rules.solve(puzzle).answer}' for n, puzzle in enumerate(puzzles)]
    path = tmp_path / "train.csv"
    path.write_text("id,prompt,answer\n" + "\n".join([*rows, f'cut,"{rules.PHRASES[0]}",7', "odd,What?,7"]) + "\n")
    families = ["roman", "gravity"]
    assert entries.describe_real_rows(os.path.relpath(path), families) == "32 rows: 1 of no family, 31 roman"
    said = entries.describe_real_rows(str(path), families, whole=True)
    assert re.fullmatch(
        r"32 rows: (\d+) to train on \(\1 roman\), (\d+) held out, \d+ left out.*"
        r"; 1 because its family cannot read the prompt to its end \(id cut\); 1 because its prompt begins as no family's does \(id odd\).*",
        said,
    ), said
