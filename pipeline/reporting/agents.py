"""What the agents of a round did, from the `agent` records of the log: why each ended, what it edited, what it used of its budget.

Only typed fields are shown, and sentences of the worker and the loop from the sealed transcript. What an agent wrote in words is in its
arm's folder, for a person who wants to read it.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.layout import Attempt, Round
from pipeline.config.fit import unit_of
from pipeline.config.settings import Settings
from pipeline.model_calls import derive_run, transcript
from pipeline.model_calls.budget import MILLION
from pipeline.reporting.document import Section

Record = Mapping[str, Any]
ANCHOR = "a0"
MOST_TIMES = 2  # as long as the reference recipe, before the page warns


def section(
    records: Sequence[Record], round_name: str, folder: Round | None = None, chosen: Settings | None = None,
    is_decided: bool = True, open_keys: Collection[str] = (),
) -> Section | None:  # fmt: skip
    """The section of a round, or None where no agent ran. The newest attempt of each arm counts.

    records: of the whole log. folder, chosen: of the round, for what the log does not have: the transcripts, budgets and prices. Without
    them the section has the log's part alone. is_decided: whether the round is, so that a patch may be used. open_keys: of article 2.
    """
    newest: dict[str, Record] = {}
    ended: dict[str, Record] = {}
    for record in records:
        if record["event"] == "agent" and record["round"] == round_name:
            newest[record["arm"]] = record
        elif record["event"] == "attempt" and record["round"] == round_name:
            ended[record["arm"]] = record
    if not newest:
        return None
    trained = {arm: record for arm, record in ended.items() if record["status"] == "completed"}
    unit = unit_of(chosen) if chosen else "GPU-seconds"
    edited = [arm for arm, record in sorted(newest.items()) if record["report"]["diff"]["files"]]
    which = f"These edited their fork: {', '.join(edited)}" if edited else "None of them edited its fork"
    lines = [
        f"Agents ran {len(newest)} arms. {which}. An agent sees its own fork, and nothing of other arms or rounds."
    ]
    if done := [arm for arm, record in sorted(newest.items()) if record["report"]["outcome"] == "completed"]:
        lines.append(f"These made their full run and handed in a manifest: {', '.join(done)}.")
    if ANCHOR in trained:
        steps, seconds = trained[ANCHOR]["train_steps"], trained[ANCHOR]["train_gpu_seconds"]
        lines.append(f"{ANCHOR}, the reference recipe, trained {steps:,} steps in {seconds:,} {unit}.")
    for arm, record in sorted(newest.items()):
        lines += _why(record, ended.get(arm), folder, chosen, unit)
        lines += _lines(record, folder, is_decided, arm in trained, open_keys)
        lines += _longer(arm, trained, unit)
    # The prices decide whether money is counted; without the configuration, whether any was.
    worker = chosen.worker if chosen else None
    has_prices = (
        worker.price_per_million_prompt_tokens + worker.price_per_million_answer_tokens > 0
        if worker
        else any(record["report"]["usage"]["money_millionths"] for record in newest.values())
    )
    rows = [_row(arm, record["report"], trained.get(arm), chosen, unit) for arm, record in sorted(newest.items())]
    names = [name for name in rows[0] if has_prices or name != "money"]
    return Section("Agents", lines, [names, *([row[name] for name in names] for row in rows)])


def _why(record: Record, attempt: Record | None, folder: Round | None, chosen: Settings | None, unit: str) -> list[str]:
    """Why an agent ended that left no adapter, in a sentence; empty where it left one."""
    report, arm = record["report"], record["arm"]
    if report["outcome"] == "completed":
        return []
    used = _of(report["usage"]["gpu_seconds"], chosen.worker.budget.gpu_seconds if chosen else None)
    why = f"its transcript says why ({_agent_folder(record, None)}/transcript.jsonl)"
    if folder is not None:
        kept = Attempt(folder.folder / arm / f"attempt_{record['attempt']:02d}").transcript
        # A campaign may have been passed on without its transcripts; an audit finds one that was changed.
        with suppress(IntegrityError, OSError):
            events = transcript.verify(kept, report["transcript_head"], report["transcript_sha256"]).records
            run = derive_run.of_transcript(events, (report["manifest"] or {}).get("axis"))
            names = [file["path"] for file in report["diff"]["files"]]
            why = derive_run.why_ended(events, run, f"{used} {unit}", names)
    lines = [f"{arm} ended as {report['outcome']}: {why}."]
    steps = attempt["train_steps"] if attempt else 0
    if "cut off" in why and steps:
        planned = f", and the recipe has {chosen.recipe.num_steps:,}" if chosen else ""
        lines.append(f"{arm}'s run was at step {steps:,} then, by its own word{planned}.")
    return lines


def _longer(arm: str, trained: Mapping[str, Record], unit: str) -> list[str]:
    """A warning about a full run that took much longer than the reference recipe, because the steps that a run tells of are its own word."""
    if arm == ANCHOR or arm not in trained or ANCHOR not in trained:
        return []
    own, anchor = (trained[each]["train_gpu_seconds"] for each in (arm, ANCHOR))
    if own <= MOST_TIMES * max(1, anchor):
        return []
    return [
        f"{arm}'s full run took {own:,} {unit}, and {ANCHOR}'s training {anchor:,}. Steps are a run's own word, so its score may come "
        "from a longer training; read the patch before you believe it."
    ]


def _row(arm: str, report: Record, trained: Record | None, chosen: Settings | None, unit: str) -> dict[str, str]:
    """Column -> what an arm has in it. What was used stands beside what the budget allows."""
    manifest, usage, diff = report["manifest"] or {}, report["usage"], report["diff"]
    budget = chosen.worker.budget if chosen else None
    added, removed = (sum(file[name] for file in diff["files"]) for name in ("added_lines", "removed_lines"))
    most_money = f" of {budget.money:,.2f}" if budget and budget.money else ""
    return {
        "arm": arm,
        "ended": report["outcome"],
        "change": manifest.get("change", ""),
        "files": str(diff["num_files"]),
        "lines": f"+{added} -{removed}",
        "answers": _of(usage["steps"], budget.steps if budget else None),
        "tokens": _of(usage["prompt_tokens"] + usage["answer_tokens"], budget.tokens if budget else None),
        "money": f"{usage['money_millionths'] / MILLION:,.2f}{most_money}",
        "seconds": _of(usage["wall_seconds"], budget.wall_seconds if budget else None),
        f"{unit} of runs": _of(usage["gpu_seconds"], budget.gpu_seconds if budget else None),
        "full runs": _of(usage["full_runs"], budget.attempts if budget else None),
        "short runs": str(usage["smoke_runs"]),
        "steps of the full run": f"{trained['train_steps']:,}" if trained else "",
        f"{unit} of the full run": f"{trained['train_gpu_seconds']:,}" if trained else "",
        "expected": manifest.get("expected_effect", ""),
        "canaries": str(len(diff["canaries"])),
    }


def _of(used: int, allowed: int | None) -> str:
    return f"{used:,}" if allowed is None else f"{used:,} of {allowed:,}"


def _agent_folder(record: Record, folder: Round | None) -> str:
    """The folder of an agent's files: as a command takes it where the campaign's folder is known, else inside of the campaign."""
    inside = f"{record['arm']}/attempt_{record['attempt']:02d}/agent"
    if folder is None:
        return f"rounds/{record['round']}/{inside}"
    path, here = (folder.folder / inside).resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _lines(
    record: Record, folder: Round | None, is_decided: bool, has_score: bool, open_keys: Collection[str]
) -> list[str]:
    """What a person may want to do about one arm: look at its patch, put it into an image, try a setting."""
    report, arm, found = record["report"], record["arm"], []
    patch = f"{_agent_folder(record, folder)}/fork.diff"
    manifest = report["manifest"] or {}
    if report["diff"]["files"] and report["outcome"] != "completed":
        found.append(
            f"{arm}'s fork was edited when it ended, and nothing that it trained counts. Its patch is {patch}."
        )
    elif report["diff"]["files"]:
        names = ", ".join(file["path"] for file in report["diff"]["files"])
        found.append(
            f"{arm} trained edited code ({names}). No setting says what it did, so nothing of it is kept as policy, but it may be submitted "
            f"and go out at the end (article 16). Its patch is {patch}."
        )
        if is_decided:
            found.append(
                f"To train every arm of another campaign with {arm}'s code, read the patch, then type in the checkout: "
                f"git apply {shlex.quote(patch)} && python -m pipeline image build"
            )
    if settings := manifest.get("equivalent_settings"):
        words = " ".join(f"{key}={value}" for key, value in settings)
        # The agent chose these words, so a person is told to type them only where they are settings of a recipe.
        is_open = all(key in open_keys for key, _ in settings)
        found.append(
            f"{arm}'s agent says that {words} would do the same without an edit. Nobody has tried that. "
            + (f"To try it, start another campaign with OVERRIDES={shlex.quote(words)}." if is_open else "")
        )
    if tries := report["usage"]["failed_tries"]:
        found.append(
            f"{tries} calls of {arm}'s agent got no answer. They are not charged here; an endpoint may charge some."
        )
    failed = [f"{each['kind']}{' (repaired)' if each['repaired'] else ''}" for each in manifest.get("failed", [])]
    if failed:
        found.append(f"{arm}'s agent says that these failed: {', '.join(failed)}.")
    for canary in report["diff"]["canaries"]:
        sign = f"Canary: {arm}'s edit shows {canary['kind']} in {canary['path']}, line {canary['line']} ({canary['detail']})."
        found.append(
            f"{sign} It drops nothing; read the patch before you believe the score."
            if has_score
            else f"{sign} {arm} has no score."
        )
    return found
