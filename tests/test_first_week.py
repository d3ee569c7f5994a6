"""Test docs/first-week.md: a new team's commands run in their order on a decided campaign, as far as they run on a laptop in seconds."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.__main__ import main, parse
from tests.support.campaigns import frozen_campaign, publish
from tests.support.decided import decided_campaign
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "first-week.md"
LINES = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    ")]
COMMANDS = [shlex.split(line)[3:] for line in LINES if line.startswith("python -m pipeline ")]
# Why a command of the page is parsed here and run elsewhere: its first word, or a word of it.
ELSEWHERE = {
    "logs": "the arms here have no logs: tests/rounds/test_control.py",
    "doctor": "what it finds is the machine's: tests/cli/test_doctor.py",
    "combine": "it takes bundles of decided rounds: tests/audit/test_combine.py",
    "first-contact": "it needs a checkpoint: tests/first_contact",
    "--rescore": "the arms here have no completions: tests/audit/test_rescore.py, tests/slurm",
}


OPEN = ("audit",)  # it runs on a round that is open, because the arms of the decided one have no logged attempts


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Working folders in which runs/demo has a decided round (False) and an open one with a score of each arm (True)."""
    made = {}
    for is_open in (False, True):
        made[is_open] = place = tmp_path_factory.mktemp("first-week")
        campaign = frozen_campaign(place) if is_open else decided_campaign(place)
        for number in range(8 if is_open else 0):
            publish(campaign.round("r0001"), f"a{number}")
        (place / "runs").mkdir()
        campaign.folder.rename(place / "runs" / "demo")
    return made


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_runs_after_those_before_it(words, homes, monkeypatch, capsys):
    monkeypatch.chdir(homes[words[0] in OPEN])
    parse(words)
    if not set(ELSEWHERE) & set(words):
        code = main(words)
        said = capsys.readouterr()
        assert code == 0 and "Traceback" not in said.err, said


def test_most_of_the_commands_were_run():
    run = [words for words in COMMANDS if not set(ELSEWHERE) & set(words)]
    assert len(run) >= 8 and {"status", "report", "export", "audit", "plan-memory", "end"} <= {
        words[0] for words in run
    }
    assert all(any(reason in words for words in COMMANDS) for reason in ELSEWHERE)


def test_make_lines_and_files_of_other_lines_exist():
    makefile = (ROOT / "Makefile").read_text()
    others = [shlex.split(line) for line in LINES if not line.startswith("python -m pipeline ")]
    for words in others:
        if words[0] == "make":
            for word in words[1:]:
                name, is_variable, _ = word.partition("=")
                assert re.search(rf"^{name} [?:]=" if is_variable else rf"^{name}:.*## ", makefile, re.MULTILINE), word
        else:
            assert (
                words[0] == "python"
                and (ROOT / words[-1].removesuffix("cluster=mine")).exists()
                or (ROOT / words[1]).exists()
            ), words
    assert len(others) > 5


def test_every_step_says_what_to_do_when_it_fails_and_where_more_is():
    steps = re.split(r"^## \d\. ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert len(steps) == 7
    for step in steps:
        assert "*When it fails:*" in step and "*More:*" in step, step[:40]
