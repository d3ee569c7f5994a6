"""What the agents of a round did, from the `agent` records of the log: how each ended, what it edited, what it cost, what failed.

Only typed fields are shown. What an agent wrote in words is in its arm's folder, for a person who wants to read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reporting.document import Section

Record = Mapping[str, Any]
MILLION = 1_000_000
ANCHOR = "a0"
MOST_TIMES = 2  # as long as the reference recipe, before the page warns


def section(records: Sequence[Record], round_name: str) -> Section | None:
    """The section of a round, or None where no agent ran. The newest attempt of each arm counts.

    records: of the whole log.
    """
    newest: dict[str, Record] = {}
    trained: dict[str, Record] = {}  # attempts with a score
    for record in records:
        if record["event"] == "agent" and record["round"] == round_name:
            newest[record["arm"]] = record
        elif record["event"] == "attempt" and record["round"] == round_name and record["status"] == "completed":
            trained[record["arm"]] = record
    if not newest:
        return None
    lines = [
        f"Agents ran {len(newest)} arms. Each read and edited a fork of its own, and nothing of other arms or rounds."
    ]
    if ANCHOR in trained:
        steps, seconds = trained[ANCHOR]["train_steps"], trained[ANCHOR]["train_gpu_seconds"]
        lines.append(f"{ANCHOR}, the reference recipe, trained {steps:,} steps in {seconds:,} GPU-seconds.")
    for arm, record in sorted(newest.items()):
        lines += _lines(arm, record)
        lines += _longer(arm, trained)
    rows = [_row(arm, record["report"], trained.get(arm)) for arm, record in sorted(newest.items())]
    return Section("Agents", lines, [list(_HEADER), *rows])


_HEADER = (
    *("arm", "ended", "change", "files", "lines", "answers", "tokens", "money", "seconds of runs", "runs"),
    *("steps of the full run", "GPU-seconds of the full run", "expected", "canaries"),
)


def _longer(arm: str, trained: Mapping[str, Record]) -> list[str]:
    """A warning about a full run that took much longer than the reference recipe, because the steps that a run tells of are its own word."""
    if arm == ANCHOR or arm not in trained or ANCHOR not in trained:
        return []
    own, anchor = (trained[each]["train_gpu_seconds"] for each in (arm, ANCHOR))
    if own <= MOST_TIMES * max(1, anchor):
        return []
    return [
        f"{arm}'s full run took {own:,} GPU-seconds, and {ANCHOR}'s training {anchor:,}. Steps are a run's own word, so its score may come "
        "from a longer training; read the patch before you believe it."
    ]


def _row(arm: str, report: Record, trained: Record | None) -> list[str]:
    manifest, usage, diff = report["manifest"] or {}, report["usage"], report["diff"]
    added, removed = (sum(file[name] for file in diff["files"]) for name in ("added_lines", "removed_lines"))
    return [
        arm,
        report["outcome"],
        manifest.get("change", ""),
        str(diff["num_files"]),
        f"+{added} -{removed}",
        str(usage["steps"]),
        f"{usage['prompt_tokens'] + usage['answer_tokens']:,}",
        f"{usage['money_millionths'] / MILLION:.2f}" if usage["money_millionths"] else "",
        str(usage["gpu_seconds"]),
        f"{usage['full_runs']} full, {usage['smoke_runs']} short",
        f"{trained['train_steps']:,}" if trained else "",
        f"{trained['train_gpu_seconds']:,}" if trained else "",
        manifest.get("expected_effect", ""),
        str(len(diff["canaries"])),
    ]


def _lines(arm: str, record: Record) -> list[str]:
    """What a person may want to do about one arm: look at its patch, or at what failed."""
    report, found = record["report"], []
    folder = f"rounds/{record['round']}/{arm}/attempt_{record['attempt']:02d}/agent"
    manifest = report["manifest"] or {}
    if report["diff"]["files"] and report["outcome"] != "completed":
        found.append(
            f"{arm}'s fork was edited when it ended, and nothing that it trained counts. Its patch is {folder}/fork.diff."
        )
    elif report["diff"]["files"]:
        names = ", ".join(file["path"] for file in report["diff"]["files"])
        found.append(
            f"{arm} trained edited code ({names}). No setting says what it did, so nothing of it is kept as policy. Its patch is "
            f"{folder}/fork.diff; a person may put it into the image of another campaign."
        )
    if settings := manifest.get("equivalent_settings"):
        words = ", ".join(f"{key}={value}" for key, value in settings)
        found.append(f"{arm}'s agent says that {words} would do the same without an edit. Nobody has tried that.")
    if tries := report["usage"]["failed_tries"]:
        found.append(
            f"{tries} calls of {arm}'s agent got no answer. They are not charged here; an endpoint may charge some."
        )
    failed = [f"{each['kind']}{' (repaired)' if each['repaired'] else ''}" for each in manifest.get("failed", [])]
    if failed:
        found.append(f"{arm}'s agent says that these failed: {', '.join(failed)}.")
    for canary in report["diff"]["canaries"]:
        found.append(
            f"Canary: {arm}'s edit shows {canary['kind']} in {canary['path']}, line {canary['line']} ({canary['detail']}). It drops nothing; "
            "read the patch before you believe the score."
        )
    return found
