"""Test the page's section on agents."""

import json
from typing import Any

import pytest

from pipeline.campaign.files import file_digest
from pipeline.campaign.layout import Campaign, Round
from pipeline.config import settings
from pipeline.model_calls.transcript import Writer
from pipeline.reporting import agents
from pipeline.reporting.document import as_text
from tests.support.paths import ROOT
from tests.support.relays import MANIFEST

CANARY = {"kind": "scorer_import", "path": "substrate/data/rows.py", "line": 4, "detail": "substrate.score"}
FILE = {"path": "substrate/data/rows.py", "kind": "changed", "added_lines": 3, "removed_lines": 1, "sha256": "ab"}


def record(arm: str, **changes: Any) -> dict[str, Any]:
    manifest = {
        "axis": "clip", "change": "data", "checkpoint": "last", "equivalent_settings": [["recipe.curriculum", "short_first"]],
        "expected_effect": "small_gain", "failed": [{"kind": "smoke", "repaired": True}], "tried": ["better"],
    }  # fmt: skip
    usage = {
        "steps": 7, "prompt_tokens": 60_000, "answer_tokens": 306, "tool_calls": 7, "full_runs": 1, "smoke_runs": 2, "failed_tries": 5,
        "money_millionths": 1_250_000, "gpu_seconds": 40, "wall_seconds": 50,
    }  # fmt: skip
    report = {
        "outcome": "completed", "manifest": manifest, "usage": usage,
        "diff": {"files": [FILE], "num_files": 1, "digest": "", "canaries": [CANARY]},
        **changes,
    }  # fmt: skip
    return {"event": "agent", "round": "r0001", "arm": arm, "attempt": 0, "report": report}


def attempt(arm: str, seconds: int, status: str = "completed") -> dict[str, Any]:
    trained = {"train_steps": 30, "train_gpu_seconds": seconds}
    return {"event": "attempt", "round": "r0001", "arm": arm, "attempt": 0, "status": status, **trained}


def test_a_full_run_that_took_much_longer_than_the_reference_is_told():
    page = agents.section([attempt("a0", 38), attempt("a1", 114), record("a1")], "r0001")
    assert page is not None
    assert "a1's full run took 114 GPU-seconds, and a0's training 38" in as_text([page])


def test_a_round_without_agents_has_no_section():
    assert agents.section([], "r0001") is None
    assert agents.section([record("a1")], "r0002") is None


def test_the_section_says_what_each_agent_did_and_where_its_patch_is():
    nothing = {"files": [], "num_files": 0, "digest": "", "canaries": []}
    refused = record("a2", outcome="agent_closed_path", manifest=None, diff=nothing)
    ran = [attempt("a0", 38), attempt("a1", 40), attempt("a2", 900, status="failed")]
    page = agents.section([*ran, record("a1", outcome="crashed"), record("a1"), refused], "r0001")
    assert page is not None
    header, first, second = page.table
    assert dict(zip(header, first, strict=True)) == {
        "arm": "a1", "ended": "completed", "change": "data", "files": "1", "lines": "+3 -1", "answers": "7", "tokens": "60,306", "money": "1.25",
        "seconds": "50",
        "GPU-seconds of runs": "40", "full runs": "1", "short runs": "2", "steps of the full run": "30", "GPU-seconds of the full run": "40",
        "expected": "small_gain", "canaries": "1",
    }  # fmt: skip
    assert second[:4] == ["a2", "agent_closed_path", "", "0"]
    text = as_text([page])
    for words in (
        "rounds/r0001/a1/attempt_00/agent/fork.diff",
        "a0, the reference recipe, trained 30 steps in 38 GPU-seconds",
        "nothing of it is kept as policy",
        "recipe.curriculum=short_first would do the same",
        "Agents ran 2 arms. These edited their fork: a1.",
        "git apply rounds/r0001/a1/attempt_00/agent/fork.diff && python -m pipeline image build",
        "a2 ended as agent_closed_path: its transcript says why",
        "smoke (repaired)",
        "5 calls of a1's agent got no answer",
        "scorer_import in substrate/data/rows.py, line 4 (substrate.score)",
    ):
        assert words in text, words
    assert "a2 trained edited code" not in text and "longer training" not in text


def with_transcript(folder: Round, arm: str, *events: tuple[str, bytes | None, dict[str, Any]], **changes: Any):
    """The record of an agent whose sealed transcript has these events."""
    attempt = folder.claim_attempt(arm)
    attempt.agent_dir.mkdir()
    writer = Writer(attempt.transcript)
    for kind, content, fields in events:
        writer.append(kind, content, **fields)
    writer.close()
    sealed = {"transcript_head": writer.head, "transcript_sha256": file_digest(attempt.transcript)}
    return record(arm, **sealed, **changes)


def called(number: int, name: str, arguments: Any, failure: str = "", **facts: Any) -> list[Any]:
    """The events of one tool call."""
    result = {"tool": number, "ok": not failure, "failure": failure, "what": "", "truncated": False, "facts": facts}
    return [("tool", json.dumps(arguments).encode(), {"tool": number, "name": name}), ("tool_result", b"", result)]


@pytest.fixture
def folder(tmp_path) -> Round:
    made = Campaign(tmp_path / "runs/agents").round("r0001")
    made.folder.mkdir(parents=True)
    return made


DEMO = ["experiment=agents", "worker.budget.gpu_seconds=300"]
REPEATS = (
    "end",
    None,
    {"outcome": "watchdog_repeats", "what": "the same call with the same arguments gave the same result 5 times"},
)
EMPTY = {"files": [], "num_files": 0, "digest": "", "canaries": []}


def test_the_reason_stands_beside_the_outcome_and_the_budget_beside_what_was_used(folder):
    ended = with_transcript(folder, "a4", REPEATS, outcome="agent_watchdog", manifest=None, diff=EMPTY)
    chosen = settings.compose(DEMO)
    page = agents.section([ended, attempt("a4", 0, "failed")], "r0001", folder, chosen)
    assert page is not None
    text = as_text([page])
    assert (
        "a4 ended as agent_watchdog: watchdog_repeats: the same call with the same arguments gave the same result 5 times."
        in text
    )
    assert "Agents ran 1 arms. None of them edited its fork." in text and "Canary" not in text
    row = dict(zip(*page.table, strict=True))
    assert (row["answers"], row["tokens"], row["rank-seconds of runs"]) == ("7 of 30", "60,306 of 600,000", "40 of 300")
    assert "money" not in row, "nothing is paid by this configuration's prices"
    paid = settings.compose([*DEMO, "worker.price_per_million_answer_tokens=3", "worker.budget.money=5"])
    page = agents.section([ended], "r0001", folder, paid)
    assert page is not None and dict(zip(*page.table, strict=True))["money"] == "1.25 of 5.00"


def test_a_transcript_that_was_changed_or_is_gone_is_not_repeated(folder):
    ended = with_transcript(folder, "a4", REPEATS, outcome="agent_watchdog", manifest=None, diff=EMPTY)
    path = folder.attempts("a4")[0].transcript
    path.write_bytes(path.read_bytes().replace(b"5 times", b"9 times"))
    for _ in range(2):
        page = agents.section([ended], "r0001", folder)
        assert page is not None and "its transcript says why" in as_text([page]) and "times" not in as_text([page])
        path.unlink(missing_ok=True)


def test_an_edit_without_a_score_and_a_round_that_is_not_decided_promise_nothing(folder):
    failed = record("a3", outcome="agent_closed_path")
    text = as_text(list(filter(None, [agents.section([failed, attempt("a3", 1, "failed")], "r0001")])))
    assert "believe the score" not in text and "a3 has no score." in text
    edited = [record("a1"), attempt("a1", 40)]
    texts = [as_text(list(filter(None, [agents.section(edited, "r0001", is_decided=each)]))) for each in (True, False)]
    assert ["git apply" in each for each in texts] == [True, False]


def test_only_a_setting_that_a_round_may_move_is_a_command_to_type():
    for open_keys, is_told in ((("recipe.curriculum",), True), ((), False)):
        page = agents.section([record("a1")], "r0001", open_keys=open_keys)
        assert page is not None
        assert ("start another campaign with OVERRIDES=recipe.curriculum=short_first" in as_text([page])) == is_told


def test_the_lines_that_are_explained_are_those_that_the_code_makes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish = called(1, "finish", dict(MANIFEST) | {"axis": None})
    full = {"num_steps": None}
    closed = {**EMPTY, "files": [FILE | {"path": "substrate/answers.py"}]}
    cut = {"steps": 4, "gpu_seconds": 302}
    plain = record("a5")["report"]
    manifest = plain["manifest"] | {"axis": None, "failed": [], "equivalent_settings": []}
    edited = {**EMPTY, "files": [FILE]}
    first = record("a1", diff=edited)
    first["report"]["usage"] = plain["usage"] | {"failed_tries": 0}
    first["report"]["manifest"] = plain["manifest"] | {"failed": []}
    other = {"manifest": manifest, "usage": plain["usage"] | {"failed_tries": 0} | cut}
    records = [
        first,
        with_transcript(folder, "a3", *called(0, "train", full, "closed_path"), *finish, outcome="agent_closed_path", diff=closed, **other),
        with_transcript(folder, "a4", REPEATS, outcome="agent_watchdog", diff=EMPTY, **other | {"manifest": None}),
        with_transcript(
            folder, "a5", *called(0, "train", full, "budget_gpu_seconds", kind="timeout"), *finish, outcome="agent_gpu_seconds",
            diff=edited, **other,
        ),
        attempt("a1", 40),
        attempt("a5", 302, "failed") | {"train_steps": 1101},
    ]  # fmt: skip
    page = agents.section(records, "r0001", folder, settings.compose(DEMO), True, ["recipe.curriculum"])
    assert page is not None
    text = (ROOT / "docs/report.md").read_text()
    shown = text.split("## Agents")[1].split("```")[1].strip().splitlines()
    assert len(shown) == 9 and [line for line in shown if line not in page.lines] == []
    # Every column of the table is explained.
    explained = " ".join(
        line.split("|")[1] for line in text.split("## Agents")[1].split("## ")[0].splitlines() if line[:2] == "| "
    )
    assert [
        name
        for name in page.table[0]
        if name not in (*explained.split(), "arm") and name.replace("rank", "GPU") not in explained
    ] == []
