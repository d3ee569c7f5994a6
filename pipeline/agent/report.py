"""The report of an agent's arm, and what an attempt takes over that goes on after an earlier one sealed its adapter.

The report is written before the adapter is sealed, from the transcript and from what the fork was when the full run was asked for. Once
the judged items exist, the canaries that need them are added. The texts that they are sought in wait in a file, because an attempt that was
interrupted while it judged goes on in another process, on another node.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.agent import leak_check
from pipeline.agent.fork_diff import ForkDiff
from pipeline.agent.tool_runner import GpuMeter
from pipeline.campaign import canonical
from pipeline.campaign.errors import Interrupted, TrialFailed
from pipeline.campaign.files import copy_file, file_digest, read_json, write_file
from pipeline.campaign.layout import Attempt
from pipeline.execution.attempt import Work
from pipeline.model_calls import derive_run, transcript
from pipeline.model_calls.budget import MILLION, Budget, Spent

TEXTS, LEAKS = "texts.json", "leaks.log"  # in the attempt's agent folder


def spent_before(job: Work) -> Spent:
    """What earlier attempts at the arm spent of its model's budget, by their transcripts; a kill does not give it back.

    Seconds count for each attempt anew: a preempted arm begins again, and the scheduler bounds how often.
    """
    steps = prompt_tokens = answer_tokens = 0
    for earlier in job.before:
        if earlier.transcript.exists():
            answers = [each for each in transcript.load(earlier.transcript).records if each["kind"] == "answer"]
            steps += len(answers)
            prompt_tokens += sum(each["prompt_tokens"] for each in answers)
            answer_tokens += sum(each["answer_tokens"] for each in answers)
    return Spent(steps, prompt_tokens, answer_tokens, 0, 0.0)


def write(job: Work, diff: ForkDiff, seen: leak_check.Look, budget: Budget, meter: GpuMeter) -> tuple[str, str]:
    """Write report and patch. Returns the agent's typed outcome, by the transcript alone, and for people why no adapter of it counts.

    diff, seen: of the fork when the last full run was asked for. budget: of the session. meter: of all that ran in the fork.
    """
    attempt = job.attempt
    found = transcript.load(attempt.transcript)
    run = derive_run.of_transcript(found.records, job.arm.axis)
    write_file(attempt.fork_diff, diff.text)
    limits, tokens = budget.limits, run.usage
    price = tokens.prompt_tokens * limits.prompt_price + tokens.answer_tokens * limits.answer_price
    usage = asdict(tokens) | {
        "money_millionths": -(-price // MILLION),
        "gpu_seconds": math.ceil(meter.used),
        "wall_seconds": math.ceil(budget.spent().wall_seconds),
    }
    canaries = [each.record() for each in seen.canaries]
    report = {
        "schema": 1,
        "outcome": run.outcome,
        "manifest": run.manifest.typed if run.manifest else None,
        "texts_sha256": run.manifest.texts_sha256 if run.manifest else "",
        "diff": {"files": diff.records(), "num_files": len(diff.changes), "digest": diff.digest, "canaries": canaries},
        "usage": usage,
        "transcript_sha256": file_digest(attempt.transcript),
        "transcript_head": found.head,
    }
    write_file(attempt.agent_dir / TEXTS, json.dumps(seen.texts))
    write_file(attempt.agent_report, canonical.encoded(report))
    used = f"{usage['gpu_seconds']} of {meter.allowed:g} {meter.unit}"
    return run.outcome, derive_run.why_ended(found.records, run, used, [each["path"] for each in diff.records()])


def look_in(job: Work, root: Path, folders: Mapping[str, Path], work: Path) -> None:
    """Add the canaries of judged prompts in what was edited. root: of the mounted image. folders: set -> its prompts and answers.

    Raises Interrupted where the attempt is to stop.
    """
    texts = job.attempt.agent_dir / TEXTS
    if not texts.exists():
        return

    def watch() -> None:
        if job.stop_wanted():
            raise Interrupted(
                "the check of an agent's edits was stopped", "Start the arm again; its sealed adapter is judged"
            )

    try:
        found = leak_check.held_prompts(root, read_json(texts), folders, work, job.attempt.agent_dir / LEAKS, watch)
    except TrialFailed:  # a canary never drops a score: that it could not be asked is one itself
        found = [leak_check.Canary("unread_file", "fork.diff", 0, "nothing was compared with judged prompts")]
    report: dict[str, Any] = read_json(job.attempt.agent_report)
    canaries: list[Mapping[str, Any]] = report["diff"]["canaries"]
    canaries += [each for each in (canary.record() for canary in found) if each not in canaries]
    write_file(job.attempt.agent_report, canonical.encoded(report))


def resume(job: Work, trained: Attempt, root: Path) -> None:
    """Take over what an agent did in an earlier attempt, whose sealed adapter this one judges. Nothing where no agent ran there."""
    if not trained.agent_report.exists():
        return
    job.attempt.agent_dir.mkdir(exist_ok=True)
    for source in _files(trained):
        copy_file(source, job.attempt.agent_dir / source.name)
    job.edited_files = len(read_json(job.attempt.agent_report)["diff"]["files"])
    job.look = partial(look_in, job, root)


def _files(trained: Attempt) -> Sequence[Path]:
    paths = (trained.agent_report, trained.transcript, trained.fork_diff, trained.agent_dir / TEXTS)
    return [path for path in paths if path.exists()]
