"""Test that the documents are right: their commands run, their make targets and variables exist, and so do the files that they link.

Commands run here on a small campaign; tests/slurm runs those that start jobs.
"""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.__main__ import main, parse
from tests.support.campaigns import frozen_campaign, publish
from tests.support.paths import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [
    path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"
]  # a log keeps what was typed then
MAKEFILE = (ROOT / "Makefile").read_text()


def code(document: Path) -> list[str]:
    """Every piece of code in a document: indented lines without their comment, and `spans`."""
    text = document.read_text()
    lines = [line.strip().split(" # ")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return lines + re.findall(r"`([^`\n]+)`", text)


PIECES = sorted({piece for document in DOCUMENTS for piece in code(document)})
MAKE = [shlex.split(piece) for piece in PIECES if piece.startswith("make ")]
NEW = ("runs/nano", "runs/mine")  # campaigns that the documents make, and do not go on with
PIPELINE = [shlex.split(piece)[3:] for piece in PIECES if piece.startswith("python -m pipeline ")]


@pytest.mark.parametrize("words", MAKE, ids=" ".join)
def test_make_targets_and_variables_exist(words: list[str]) -> None:
    for word in words[1:]:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} [?:]=" if is_variable else rf"^{name}:.*## "
        assert re.search(pattern, MAKEFILE, re.MULTILINE), f"{word}: the Makefile has no such thing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the campaigns that the documents speak of; rounds run in tests/slurm, so their arms are made up here."""
    place = tmp_path_factory.mktemp("documents")
    for name in {word for words in PIPELINE for word in words if word.startswith("runs/") and word not in NEW}:
        campaign = frozen_campaign(place / name)
        campaign.folder.rename(place / "moved")
        campaign.folder.parent.rmdir()
        (place / "moved").rename(place / name)
        for number in range(8):
            publish(campaign.at(place / name).round("r0001"), f"a{number}")
    return place


@pytest.mark.parametrize("words", [words for words in PIPELINE if "ARM" not in words], ids=" ".join)
def test_commands_run(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    takes_long = words[0] in ("round", "meta", "worker") and not {"--dry-run", "--no-submit"} & set(words)
    if takes_long or words[0] == "logs" or words[:2] in (["evidence", "simulate"], ["evidence", "campaigns"]):
        parse(
            words
        )  # it takes minutes, or becomes another process: test_flow.py, studies/test_main.py and tests/slurm run it
    else:
        assert main(words) == 0


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_commands_of_a_page_are_spelled_as_the_parser_has_them(document: Path) -> None:
    for line in code(document):
        if line.startswith("python -m pipeline ") and "[" not in line and "COMMAND" not in line:
            parse(shlex.split(re.split(r"\s{2,}", line)[0])[3:])


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, *PAGES, ROOT / "constitution" / "README.md"], ids=lambda path: path.name
)
def test_linked_files_and_headings_exist(document: Path) -> None:
    for link in re.findall(r"\]\(([^):\s]+)\)", document.read_text()):
        name, _, heading = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(document: Path) -> set[str]:
    """The anchors that the headings of a page have: small letters, hyphens for blanks, no other signs; a second one of a name has a number."""
    found: list[str] = []
    for text in re.findall(r"^#+ (.*)$", document.read_text(), re.M):
        found.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return set(found) | {f"{each}-{number}" for each in found for number in range(1, found.count(each))}


def test_something_was_found() -> None:
    assert len(MAKE) > 5 and len(PIPELINE) > 3


def test_contributing_names_every_module() -> None:
    """A stranger finds the room of a change there: a module that is missing, or gone, would lead him astray."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for package in [path.parent for path in sorted((ROOT / "pipeline").glob("*/__init__.py"))] + [ROOT / "studies"]:
        place = package.relative_to(ROOT).as_posix()
        section = re.search(rf"^### `{place}/`.*?(?=^### )", text, re.M | re.S)
        assert section, place
        named = set(re.findall(r"`(\w+\.py)`", "".join(re.findall(r"^- .*?:", section[0], re.M))))
        assert named == {path.name for path in package.glob("*.py")} - {"__init__.py"}, place


def test_contributing_names_every_module_of_the_substrate() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = re.search(r"^### `substrate/`.*?(?=^### )", text, re.M | re.S)
    assert section
    named = set(re.findall(r"[`/](\w+\.py)`", section[0]))
    families = {
        path.name for path in (ROOT / "substrate" / "tasks").glob("*.py")
    }  # each is a puzzle family, and found by itself
    methods = {path.name for path in (ROOT / "substrate" / "recipes").glob("*.py")}
    modules = {path.name for path in (ROOT / "substrate").rglob("*.py")} - {"__init__.py"}
    assert modules - named <= families | methods
    assert named - modules == {"__init__.py"}


def test_files_and_packages_stay_small() -> None:
    """A reader holds a file in the head, and sees what a package has at one look (CONTRIBUTING.md, "The layers")."""
    for folder in ("pipeline", "studies", "substrate", "slurm", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 300, path
            assert len([other for other in path.parent.glob("*.py") if other.name != "__init__.py"]) <= 13, path.parent
