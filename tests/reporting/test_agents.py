"""Test the page's section on agents."""

from typing import Any

from pipeline.reporting import agents
from pipeline.reporting.document import as_html, as_text

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
        "seconds of runs": "40", "runs": "1 full, 2 short", "steps of the full run": "30",
        "GPU-seconds of the full run": "40", "expected": "small_gain", "canaries": "1",
    }  # fmt: skip
    assert second[:4] == ["a2", "agent_closed_path", "", "0"]
    text = as_text([page])
    for words in (
        "rounds/r0001/a1/attempt_00/agent/fork.diff",
        "a0, the reference recipe, trained 30 steps in 38 GPU-seconds",
        "nothing of it is kept as policy",
        "recipe.curriculum=short_first would do the same",
        "smoke (repaired)",
        "5 calls of a1's agent got no answer",
        "scorer_import in substrate/data/rows.py, line 4 (substrate.score)",
    ):
        assert words in text, words
    assert "a2 trained edited code" not in text and "longer training" not in text
    assert "<table>" in as_html([page])
