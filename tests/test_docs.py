"""What the documents tell one to type exists: make targets and variables, commands of the pipeline, linked files."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.__main__ import parser

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
MAKEFILE = (ROOT / "Makefile").read_text()


def code(document: Path) -> list[str]:
    """Every piece of code in a document: indented lines without their comment, and `spans`."""
    text = document.read_text()
    lines = [line.strip().split(" # ")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return lines + re.findall(r"`([^`\n]+)`", text)


PIECES = sorted({piece for document in DOCUMENTS for piece in code(document)})
MAKE = [shlex.split(piece) for piece in PIECES if piece.startswith("make ")]
PIPELINE = [shlex.split(piece)[3:] for piece in PIECES if piece.startswith("python -m pipeline ")]


@pytest.mark.parametrize("words", MAKE, ids=" ".join)
def test_make_targets_and_variables_exist(words: list[str]) -> None:
    for word in words[1:]:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} [?:]=" if is_variable else rf"^{name}:.*## "
        assert re.search(pattern, MAKEFILE, re.MULTILINE), f"{word}: the Makefile has no such thing"


@pytest.mark.parametrize("words", PIPELINE, ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    parser().parse_args(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_linked_files_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_something_was_found() -> None:
    assert len(MAKE) > 5 and len(PIPELINE) > 3
