"""Test the audit of agents: a report that does not follow from its transcript, its plan or its score is a finding."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit.check_agents import check_agents
from pipeline.audit.findings import Report
from pipeline.campaign.files import file_digest
from pipeline.model_calls import derive_run, transcript
from tests.support.relays import MANIFEST, REQUEST

ATTEMPT = "rounds/r0001/a1/attempt_00"
PATH, PATCH, SEAL = f"{ATTEMPT}/agent/transcript.jsonl", f"{ATTEMPT}/agent/fork.diff", f"{ATTEMPT}/sealed.json"
CONFIG = "rounds/r0001/config.yaml"
USAGE = {"prompt_tokens": 40, "completion_tokens": 10, "total_tokens": 50}
FILE = {"path": "substrate/data/rows.py", "kind": "changed", "added_lines": 1, "removed_lines": 1, "sha256": "ab"}
TEXT = """diff --git a/substrate/data/rows.py b/substrate/data/rows.py
--- a/substrate/data/rows.py
+++ b/substrate/data/rows.py
@@ -1,2 +1,2 @@
 import json
--- b
+++ b
"""  # its hunk removes the line "-- b" and adds "++ b"


def write(path: Path) -> None:
    """A session of one answer: a full run, then a manifest."""
    path.parent.mkdir(parents=True)
    writer = transcript.Writer(path)
    manifest = {**MANIFEST, "axis": "clip"}
    body = json.dumps({**REQUEST, "max_tokens": 100}).encode()
    answer = json.dumps({"choices": [{"message": {"content": "I train."}}], "usage": USAGE}).encode()
    writer.append("request", body, call=0, prompt_bound=900)
    writer.append("answer", answer, call=0, tries=1, prompt_tokens=40, answer_tokens=10)
    edit = {"path": FILE["path"], "content": "++ b\n"}
    calls = [("write", edit), ("train", {"num_steps": None, "why": ""}), ("finish", manifest)]
    for number, (name, arguments) in enumerate(calls):
        writer.append("tool", json.dumps(arguments).encode(), tool=number, name=name)
        told = {"ok": True, "failure": "", "what": "", "truncated": False, "facts": {}}
        writer.append("tool_result", b"done", tool=number, **told)
    writer.close()


def records(folder: Path) -> list[dict[str, Any]]:
    """The log of a round with one agent, as the meta stage writes it."""
    write(folder / PATH)
    (folder / PATCH).write_text(TEXT)
    (folder / SEAL).write_text('{"edited_files": 1}')
    (folder / CONFIG).write_text("worker:\n  agent: llm\n  roles:\n  - anchor\n  - axis\n")
    found = transcript.load(folder / PATH)
    run = derive_run.of_transcript(found.records, "clip")
    assert run.manifest is not None and run.outcome == "completed"
    about = {"round": "r0001", "arm": "a1"}
    report = {
        "schema": 1, "outcome": run.outcome, "manifest": dict(run.manifest.typed), "texts_sha256": run.manifest.texts_sha256,
        "diff": {"files": [FILE], "num_files": 1, "digest": "ab", "canaries": []},
        "usage": {**asdict(run.usage), "money_millionths": 0, "gpu_seconds": 1, "wall_seconds": 1},
        "transcript_sha256": file_digest(folder / PATH), "transcript_head": found.head,
    }  # fmt: skip
    arm = {"index": 1, "role": "axis", "axis": "clip"}
    return [
        {
            "seq": 0,
            "event": "init",
            "facts": {"articles": {"16": {"open_paths": ["substrate/recipes/*.py", "substrate/data/rows.py"]}}},
        },
        {"seq": 1, "event": "plan", "round": "r0001", "plan": {"arms": [arm]}},
        {"seq": 2, "event": "attempt", **about, "attempt": 0, "status": "completed", "exit_class": "completed"},
        {"seq": 3, "event": "agent", **about, "attempt": 0, "report": report},
        {"seq": 4, "event": "outcome", **about, "outcome": {"status": "completed", "edited": True}},
    ]


def audited(log: list[dict[str, Any]], folder: Path) -> Report:
    report = Report()
    check_agents(log, folder, lambda path: (folder / path).is_file(), report)
    return report


def test_an_honest_report_is_clean(tmp_path: Path) -> None:
    report = audited(records(tmp_path), tmp_path)
    assert report.ok and "the agents' reports" in report.verified


def set_at(path: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(log: list[dict[str, Any]]) -> None:
        *parts, last = path.split(".")
        place: Any = log
        for part in parts:
            place = place[int(part) if isinstance(place, list) else part]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_at("3.report.usage.steps", 2), "usage"),
        (set_at("3.report.usage.answer_tokens", 9), "usage"),
        (set_at("3.report.usage.failed_tries", 9), "usage"),
        (set_at("3.report.manifest.expected_effect", "large_gain"), "manifest"),
        (set_at("3.report.texts_sha256", "0" * 64), "texts_sha256"),
        (set_at("3.report.outcome", "agent_budget"), "its attempt has a score"),
        (set_at("3.report.transcript_head", "0" * 64), "not the transcript that was sealed"),
        (set_at("3.report.diff.files", []), "scored as edited code, and was not"),
        (set_at("3.report.diff", {"files": [], "num_files": 0}), "which the report leaves out"),
        (set_at("3.report.diff.num_files", 2), "counts 0 changes"),
        (set_at("3.report.diff.files", []), "lists 0 of 1 changes"),
        (
            set_at("3.report.diff", {"files": [FILE, {**FILE, "path": "substrate/recipes/a.py"}], "num_files": 2}),
            "leaves out substrate/recipes/a.py",
        ),
        (set_at("3.report.diff.files.0.added_lines", 2), "otherwise than the report says"),
        (set_at("0.facts.articles.16.open_paths", ["substrate/recipes/**"]), "article 16 closes"),
        (set_at("4.outcome.edited", False), "scored as unedited code, and was not"),
        (set_at("1.plan", {"arms": [{"index": 1, "role": "replicate", "axis": "clip"}]}), "article 16"),
        (set_at("2.arm", "a2"), "without its arm's plan and attempt"),
    ],
)
def test_what_does_not_follow_is_a_finding(
    change: Callable[[list[dict[str, Any]]], None], words: str, tmp_path: Path
) -> None:
    log = copy.deepcopy(records(tmp_path))
    change(log)
    report = audited(log, tmp_path)
    assert not report.ok and any(words in finding.what for finding in report.findings), report.findings


def test_what_the_patch_does_not_show_is_a_finding_where_it_is_code(tmp_path: Path) -> None:
    log = records(tmp_path)
    (tmp_path / PATCH).write_text(f"{TEXT}# 1 changes are not shown, because a diff has at most 1048576 bytes\n")
    assert not audited(log, tmp_path).ok
    log[3]["report"]["diff"] = {"files": [FILE, {**FILE, "path": "substrate/recipes/a.py"}], "num_files": 2}
    (tmp_path / SEAL).write_text('{"edited_files": 2}')
    assert any("whose code was trained" in each.what for each in audited(log, tmp_path).findings)
    log[0]["facts"]["articles"]["16"]["open_paths"].append("data/train.jsonl")
    log[3]["report"]["diff"]["files"][1]["path"] = "data/train.jsonl"
    assert audited(log, tmp_path).ok


@pytest.mark.parametrize("text", ["+1\n", f"{TEXT}{TEXT}", f"{TEXT}fork\n", "# a.py: added file\n"])
def test_what_is_no_patch_is_a_finding(text: str, tmp_path: Path) -> None:
    log = records(tmp_path)
    (tmp_path / PATCH).write_text(text)
    assert any("is not the patch" in each.what for each in audited(log, tmp_path).findings)


def test_a_seal_that_counts_other_files_is_a_finding(tmp_path: Path) -> None:
    log = records(tmp_path)
    (tmp_path / SEAL).write_text('{"edited_files": 0}')
    assert any("counts 0 edited files" in each.what for each in audited(log, tmp_path).findings)


def test_a_score_of_an_agents_arm_without_a_report_is_a_finding(tmp_path: Path) -> None:
    log = [record for record in records(tmp_path) if record["event"] != "agent"]
    log[-1]["outcome"]["edited"] = False
    (tmp_path / SEAL).write_text('{"edited_files": 0}')
    assert any("no report says what it did" in each.what for each in audited(log, tmp_path).findings)
    (tmp_path / CONFIG).write_text("worker:\n  agent: none\n  roles:\n  - axis\n")
    assert audited(log, tmp_path).ok


def test_edits_that_left_nothing_are_told(tmp_path: Path) -> None:
    log = records(tmp_path)
    log[3]["report"]["diff"], log[4]["outcome"]["edited"] = {"files": [], "num_files": 0}, False
    (tmp_path / SEAL).write_text('{"edited_files": 0}')
    (tmp_path / PATCH).write_text("")
    report = audited(log, tmp_path)
    assert report.ok and any("said to be unedited, although 1 tool calls" in each for each in report.not_verifiable)


def test_edited_code_without_a_report_is_a_finding(tmp_path: Path) -> None:
    log = [record for record in records(tmp_path) if record["event"] != "agent"]
    report = audited(log, tmp_path)
    assert any("no agent's report says so" in finding.what for finding in report.findings)


def test_a_changed_byte_of_the_transcript_is_a_finding(tmp_path: Path) -> None:
    log = records(tmp_path)
    path = tmp_path / PATH
    path.write_bytes(path.read_bytes().replace(b"I train.", b"I cheat."))
    assert not audited(log, tmp_path).ok


def test_a_missing_transcript_is_told_and_is_no_finding(tmp_path: Path) -> None:
    log = records(tmp_path)
    (tmp_path / PATH).unlink()
    report = audited(log, tmp_path)
    assert report.ok and any("1 transcripts" in each for each in report.not_verifiable)
