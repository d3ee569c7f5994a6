"""Test that a campaign under other rules is answered with the code that judges it, and never with findings or a KeyError."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.audit import bundle, examine
from pipeline.campaign import canonical, facts, other_rules
from pipeline.campaign.errors import OtherRules
from pipeline.stats import critical_values
from tests.support.campaigns import changed_byte, frozen_campaign
from tests.support.paths import ROOT
from tests.support.sealed import SealedCampaign, gains, played, rechained

LEVELS = {"roman": 0.8, "text_cipher": 0.7}


def copied(folder: Path, *edits: tuple[str, str, str]) -> Path:
    """A checkout like ours with edits: (file, what stands there, what comes in its place)."""
    for name in ("pipeline", "constitution", "hydra_conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in edits:
        path = folder / name
        assert old in path.read_text(), name
        path.write_text(path.read_text().replace(old, new, 1))
    return folder


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A later checkout: another constitution, code that reads a key which ours lacks, and one more field of a policy."""
    checkout = copied(
        tmp_path_factory.mktemp("newer"),
        ("constitution/constitution.yaml", "scored_arms:", "arms_with_a_score:"),
        ("pipeline/campaign/constitution.py", '["scored_arms"]', '["arms_with_a_score"]'),
        ("pipeline/campaign/records.py", 'fields = dict(data)', 'fields = dict(data); data["of_a_later_version"]'),
    )  # fmt: skip
    rules = checkout / "constitution"
    content = (rules / "constitution.yaml").read_bytes()
    (rules / "DIGEST").write_text(hashlib.sha256(content).hexdigest() + "\n")
    (rules / "articles.json").write_text(json.dumps(facts.parse_yaml(content)["articles"]))
    return checkout


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> SealedCampaign:
    """A campaign of our version with two decided rounds, which carries our code."""
    key = tmp_path_factory.mktemp("older") / "key"
    campaign = SealedCampaign(gains, levels=LEVELS, num_items=20, campaign="older-0001", key=key, has_code=True)
    for _ in range(2):
        campaign.play()
    return campaign


def run(checkout: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A command line in a shell in a checkout; `python` is ours."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(["sh", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True)


def command_in(answer: str) -> str:
    """The command that judges the campaign."""
    found = re.search(r"with the code of [0-9a-f]{16}: `(.+?)` runs the copy that it carries", answer)
    assert found, answer
    return found[1]


@pytest.mark.parametrize("is_bundle", [False, True])
def test_a_later_checkout_says_which_command_judges_the_campaign_and_that_command_does(
    is_bundle: bool, newer: Path, older: SealedCampaign, tmp_path: Path
) -> None:
    path = older.write(tmp_path / "an older one")
    if is_bundle:
        bundle.export(path, tmp_path / "older.zip")
        path = shutil.rmtree(path) or tmp_path / "older.zip"
    for words, verb in (("audit '{}' --json", "Audit it"), ("evidence combine '{}'", "Run `evidence`")):
        done = run(newer, f"python -m pipeline {words.format(path)}")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith(
            f"OtherRules: {path} cannot be judged by this code, because it was frozen under constitution "
        )
        assert f"{verb} with the code of {older.code_digest[:16]}: `" in done.stderr and "Traceback" not in done.stderr
        judged = run(newer, command_in(done.stderr))
        assert judged.returncode == 0, judged.stderr
        assert ("verified" if verb == "Audit it" else "E ") in judged.stdout


def test_our_code_judges_it_though_it_carries_the_same_code(older: SealedCampaign, tmp_path: Path) -> None:
    report = examine.examine(older.write(tmp_path / "older"))
    assert report.ok, report.findings


def test_a_plan_of_another_form_is_answered_with_the_command_that_reads_it(newer: Path, tmp_path: Path) -> None:
    campaign = frozen_campaign(tmp_path)
    done = run(newer, f"python -m pipeline status {campaign.folder}")
    assert done.returncode == 2 and done.stderr.startswith("OtherRules: "), done.stderr
    shown = run(newer, command_in(done.stderr))
    assert shown.returncode == 0 and "anchor" in shown.stdout, shown.stderr


@pytest.mark.parametrize("words", ["report {}", "round {} --dry-run", "close {} --dry-run", "end {} --dry-run"])
def test_commands_that_act_or_derive_run_as_the_frozen_code(words: str, newer: Path, tmp_path: Path) -> None:
    campaign = frozen_campaign(tmp_path)
    done = run(newer, f"python -m pipeline {words.format(campaign.folder)}")
    assert "so the frozen code runs" in done.stderr and "OtherRules" not in done.stderr
    assert done.returncode == 0 or words.startswith("end"), done.stderr  # whose round is open
    assert "Traceback" not in done.stderr


def test_doctor_does_not_call_the_plans_of_another_version_bad(newer: Path, tmp_path: Path) -> None:
    campaign = frozen_campaign(tmp_path)
    done = run(newer, f"python -m pipeline doctor {campaign.folder} --json")
    (plans,) = (check for check in json.loads(done.stdout) if check["name"] == "frozen plans")
    assert plans["verdict"] == "unknown" and command_in(plans["cure"]).endswith(f"doctor {campaign.folder}")


def test_a_damaged_plan_of_our_own_version_is_still_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    campaign = frozen_campaign(tmp_path)
    plan = json.loads(campaign.round("r0001").plan.read_text())
    del plan["policy"]["retired"]
    campaign.round("r0001").plan.write_text(json.dumps(plan))
    assert main(["status", str(campaign.folder)]) == 4
    assert capsys.readouterr().err.startswith("OtherVersion: ")


Edit = Callable[[dict[str, Any]], object]


def resealed(campaign: SealedCampaign, folder: Path, edit: Edit, key: Path | None = None) -> Path:
    """A campaign whose records were changed and chained and signed anew."""
    records = [json.loads(line) for line in campaign.lines]
    for record in records:
        edit(record)
    campaign.write(folder)
    lines = rechained(records, key or campaign.key)
    (folder / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


def rename_articles(record: dict[str, Any]) -> None:
    """An older constitution: a key of each of these articles has another name, and a policy lacks a field."""
    if record["event"] == "init":
        record["facts"]["constitution_digest"] = "1" * 64
        for number in ("5", "7", "8", "9", "11"):
            article = record["facts"]["articles"][number]
            article["old"] = article.pop(max(article, key=lambda name: name not in ("title", "text")))
    for holder in (record.get("plan"), record.get("decision")):
        if holder:
            holder["policy"].pop(min(holder["policy"]))


def test_articles_and_records_that_lack_what_we_read_are_no_findings(tmp_path: Path) -> None:
    folder = resealed(played(rounds=2, num_items=20, num_families=2), tmp_path / "older", rename_articles)
    with pytest.raises(
        OtherRules,
        match=r"under constitution 1111111111111111, and this code has [0-9a-f]{16}\. Audit it with the code of",
    ):
        examine.examine(folder)


def test_a_broken_seal_is_a_finding_under_any_constitution(tmp_path: Path) -> None:
    campaign = played(rounds=2, num_items=20, num_families=2)
    folder = resealed(campaign, tmp_path / "older", rename_articles, key=played(campaign="sealed-0002").key)
    report = examine.examine(folder)
    assert {finding.what for finding in report.findings} == {
        "the signed head does not hold: the signature is not that of the campaign's key"
    }
    assert any("Audit it with the code of" in what for what in report.not_verifiable)


def test_a_constitution_that_is_no_digest_is_a_finding(tmp_path: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        if record["event"] == "init":
            record["facts"]["constitution_digest"] = "ours"

    report = examine.examine(resealed(played(rounds=2, num_items=20, num_families=2), tmp_path / "x", edit))
    assert "init names no constitution that this code has" in [finding.what for finding in report.findings]


def test_code_that_decides_otherwise_is_named_and_code_that_decides_alike_is_not_in_the_way(
    older: SealedCampaign, tmp_path: Path
) -> None:
    """A checkout whose decisions have other words cannot judge ours; one that has other comments can."""
    folder = older.write(tmp_path / "older")
    worded = copied(tmp_path / "worded", ("pipeline/decision/decide.py", 'f"article 3: {len', 'f"by article 3: {len'))
    done = run(worded, f"python -m pipeline audit {folder}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        "because this code derives something else than the code that it was frozen with. Audit it with" in done.stderr
    )
    assert run(worded, command_in(done.stderr)).returncode == 0
    noted = copied(tmp_path / "noted", ("pipeline/decision/decide.py", '"""', '"""Noted: '))
    assert run(noted, f"python -m pipeline audit {folder}").returncode == 0


def test_critical_values_that_do_not_ship_are_named_and_the_rest_is_judged_by_them(
    older: SealedCampaign, tmp_path: Path
) -> None:
    folder = older.write(tmp_path / "older")
    stricter = copied(
        tmp_path / "stricter", ("pipeline/stats/critical_values.py", "Fraction(44, 1000)", "Fraction(22, 1000)")
    )
    done = run(stricter, f"python -m pipeline audit {folder} --json")
    assert done.returncode == 4, done.stderr
    report = json.loads(done.stdout)
    (finding,) = report["findings"]
    frozen, ships = (critical_values.bounds(older.design, Fraction(alpha, 1000))["gap_level"] for alpha in (44, 22))
    assert f"gap_level is {frozen}, and {ships} ships" in finding["what"] and "board_suspect" not in finding["what"]
    assert any("2 decisions" in what for what in report["verified"])
    (told,) = (what for what in report["not_verifiable"] if what.startswith("whether the critical values ship with"))
    assert run(stricter, command_in(told)).returncode == 0


def test_findings_stay_findings_where_the_code_is_ours_or_was_changed(older: SealedCampaign, tmp_path: Path) -> None:
    def rig(record: dict[str, Any]) -> None:
        if record["event"] == "decision" and record["round"] == "r0002":
            record["decision"]["kept"] = "a4"

    folder = resealed(older, tmp_path / "rigged", rig)
    what = "the decision of r0002 does not follow from its evidence"
    assert what in [finding.what for finding in examine.examine(folder).findings]
    with changed_byte(folder / f"code/{older.code_digest[:16]}/pipeline/decision/decide.py"):
        assert what in [finding.what for finding in examine.examine(folder).findings]


def test_what_a_log_says_of_its_revision_is_told_only_if_it_is_one(tmp_path: Path) -> None:
    named = {"constitution_digest": "1" * 64, "code_digest": "2" * 64}
    for revision, told in (
        ("a" * 40, True),
        ("a" * 40 + "+changes", False),
        ("unknown", False),
        ("\x1b[2J", False),
        (None, False),
    ):
        answer = str(other_rules.error(tmp_path, tmp_path, {**named, "revision": revision}, "x", ("audit", "y")))
        assert ("takes revision" in answer) is told and "\x1b" not in answer
        assert "These files do not hold that code" in answer
    assert (
        canonical.sha256((ROOT / "constitution" / "constitution.yaml").read_bytes()) == other_rules.own_constitution()
    )
