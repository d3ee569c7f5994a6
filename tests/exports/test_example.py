"""Test that the example of docs/exports.md runs on an export as its page says, and prints what the arms really won."""

import subprocess
import sys
import textwrap
from itertools import takewhile

from pipeline.__main__ import main
from pipeline.exports import tables
from tests.support.decided import decided_campaign
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "exports.md"


def example() -> str:
    """The block of code below the heading "An example": lines with four spaces, and empty ones between them."""
    _, _, below = PAGE.read_text().partition("## An example\n")
    lines = below[below.index("    import") :].splitlines()
    return textwrap.dedent("\n".join(takewhile(lambda line: not line or line.startswith("    "), lines)))


def test_the_example_of_the_page_runs_on_csv_alone(tmp_path):
    campaign = decided_campaign(tmp_path)
    assert main(["export", str(campaign.folder), "--to", str(tmp_path / "exports" / "demo"), "--as", "csv"]) == 0
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", example()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Every run has the first so many items right: a2 38 of 40, the others and the reference 20.
    won = {"a2": 18}
    expected = [
        f"r0001 {arm:9} roman            won {won.get(arm, 0):3}  lost   0"
        for arm in ("a0", "a2", "a3", "a4", "a5", "a7", "reference")
    ]
    assert done.stdout.splitlines() == expected


def test_the_page_explains_every_column():
    text = PAGE.read_text()
    assert "`dev_right`, `dev_items`, `dev_accuracy`, and the same for `fresh`" in text
    text += "`fresh_right` `fresh_items` `fresh_accuracy`"
    for columns in (tables.ITEM_COLUMNS, tables.ARM_COLUMNS):
        assert [name for name in columns if f"`{name}`" not in text] == []
