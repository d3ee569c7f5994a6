"""The gates that a node answers: a forward pass, ten training steps, some twenty judged items, and one whole arm."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipeline.campaign.errors import PipelineError
from pipeline.campaign.files import read_json_lines, write_file
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.campaign.records import NUM_ARMS
from pipeline.campaign.shared_path import wait_until
from pipeline.cluster.site_check import Check
from pipeline.execution import results
from pipeline.execution.trial import number, progress_lines
from pipeline.first_contact import forward_pass, probe_speed, stages
from pipeline.first_contact.visit import PROBE_STEPS, Visit, paths_of
from pipeline.rounds import control, freeze, init, launch

REFERENCE = "a0"
"""The arm of r0000 that trains the reference recipe."""
CURES = {
    "out_of_memory": "Take parallelism=... with more ranks, parallelism.recompute=full or a smaller recipe.sequence_length; `plan-memory` shows "
    "what needs the memory",
    "diverged": "Lower recipe.learning_rate, or look whether the checkpoint is damaged (gates `checkpoint` and `forward`)",
    "stalled": "A collective hangs: look at NCCL's lines in the log, and whether the ranks see one another; cluster.stall_minutes is the patience",
    "judge_failed": "Read judge.log: engine, memory of decoding (tasks.decode_batch_size) or the weights",
    "disk_limit": "Set cluster.scratch_dir to a larger disk of the node",
}
"""Kind of failure -> what to do. The sentence of the failure itself stands before it."""


def one_job(visit: Visit) -> str:
    """What a gate on a node takes."""
    chosen = visit.chosen
    where = "a child process here" if chosen.cluster.kind == "local" else "one job with the resources of an arm"
    gpus = chosen.cluster.gpus_per_node and chosen.parallelism.world_size
    return f"{where}{f' ({gpus} GPUs)' if gpus else ''}: a few minutes, most of them for loading the weights"


def one_arm(visit: Visit) -> str:
    """What one arm takes, by the rates that the probe measured."""
    attempts = visit.probe_round.attempts(REFERENCE) if visit.probe_round.plan.exists() else []
    hours, source = probe_speed.expected_hours(visit.chosen, attempts[-1] if attempts else None, 1)
    return f"about {probe_speed.in_words(hours)} GPU-hours, {source}" if hours else f"unknown: {source}"


def forward(visit: Visit) -> Check:
    """One forward pass on a node, compared with stored log-probabilities where the person gave some."""
    rows, answer = paths_of(visit.probe)
    stored = forward_pass.read_stored(visit.log_probs) if visit.log_probs else None
    write_file(rows, "".join(json.dumps({"tokens": row["tokens"]}) + "\n" for row in stored or []))
    stages.run_stage(visit.probe_round, ("forward", str(visit.probe.folder), "r0000"), lambda: None)
    seconds = visit.chosen.cluster.file_wait_seconds  # the node wrote it, and this machine may not see it yet
    wait_until((answer / "summary.json").exists, seconds, [answer.parent, answer])
    return forward_pass.compare(answer, stored, visit.chosen.model.dtype)


def steps(visit: Visit) -> Check:
    """Ten training steps: the part of the probe's worker before its judging. A worker that failed is started again."""
    attempt, failure = work(visit, visit.probe, visit.probe_round)
    lines = progress_lines(attempt, "train")
    losses = [loss for line in lines if (loss := number(line.get("loss"))) is not None]
    if len(losses) < PROBE_STEPS:
        return failed("steps", attempt, failure, f"{len(losses)} of {PROBE_STEPS} steps were made")
    seconds, tokens = number(lines[-1].get("seconds")) or 0, number(lines[-1].get("tokens")) or 0
    rate = f", {tokens / seconds:,.0f} tokens/s over all ranks" if seconds else ""
    if not attempt.sealed.exists():
        return failed("steps", attempt, failure, "all steps were made, and then no adapter was sealed")
    return Check(
        "steps",
        "good",
        f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f} nats{rate}; the adapter is sealed{kernels(attempt)}",
    )


def kernels(attempt: Attempt) -> str:
    """What the trial's log says of its kernels, such as `; kernels on NVIDIA H200: scan triton, ...`; empty where it has no such line."""
    lines = attempt.trial_log.read_text("utf-8", errors="replace").splitlines() if attempt.trial_log.exists() else []
    return next((f"; {line}" for line in lines if line.startswith("kernels on ")), "")


def items(visit: Visit) -> Check:
    """The items that the probe's worker judged. Where no answer ended, the gate does not know whether one ever will."""
    attempt, failure = work(visit, visit.probe, visit.probe_round)
    if not results.has_score(attempt.result):
        return failed("items", attempt, failure, "no item was judged")
    marks = "".join(results.read_outcome(attempt.result, "").outcomes["dev"].values())
    lengths = results.lengths(attempt.result)["dev"]
    found = (
        f"{len(lengths)} items: {marks.count('1')} right, {marks.count('T')} truncated, {sum(lengths) / len(lengths):,.0f} tokens a completion; "
        f"{expected_round(visit, attempt)}"
    )
    if marks.count("T") < len(marks):
        return Check("items", "good", found)
    return Check(
        "items", "unknown", f"{found}. No completion ended before tasks.max_new_tokens = {visit.chosen.tasks.max_new_tokens}",
        "For a trained model look at the end ids (gate `tokenizer`) and raise tasks.max_new_tokens; an untrained one never ends",
    )  # fmt: skip


def expected_round(visit: Visit, attempt: Attempt) -> str:
    """What a round will take by the probe's speed, in words."""
    hours, source = probe_speed.expected_hours(visit.chosen, attempt, NUM_ARMS)
    return f"a round will take about {probe_speed.in_words(hours)} GPU-hours ({source})" if hours else source


def arm(visit: Visit) -> Check:
    """Train and judge the reference of the real campaign. Its first round finds the result and does not train it again."""
    if not visit.campaign.frozen.exists():
        init.init(visit.campaign, visit.overrides)
    freeze.freeze(visit.campaign, "r0001", visit.overrides)
    folder = visit.campaign.round("r0000")
    attempt, failure = work(visit, visit.campaign, folder)
    if not results.has_score(attempt.result):
        return failed("arm", attempt, failure, "the arm has no score")
    by_family = results.read_outcome(attempt.result, "").outcomes["dev"]
    right = sum(marks.count("1") for marks in by_family.values()) / sum(map(len, by_family.values()))
    hours = results.read_attributes(attempt.result)["gpu_seconds"] / 3600
    told = f", {hours:.2f} GPU-hours" if hours else ""
    return Check(
        "arm", "good", f"the reference is right on {100 * right:.1f} % of dev{told}; its result is {attempt.result}"
    )


def work(visit: Visit, campaign: Campaign, folder: Round) -> tuple[Attempt, str]:
    """Run the worker of the reference unless it has a score. Returns its newest attempt, and the sentence of the stage's failure.

    Raises what starting the stage raises, where no attempt was made.
    """
    failure = ""
    if not results.has_score(folder.published(REFERENCE)):
        (stage,) = launch.worker_stages(campaign, folder, [REFERENCE], freeze.read_plan(folder)[1])
        try:
            stages.run_stage(folder, stage, phases_of(folder, visit.say))
        except PipelineError as error:
            if not folder.attempts(REFERENCE):  # else the attempt says more than the exit code of its process
                raise
            failure = str(error)
        control.await_results(folder, [(folder, REFERENCE)], visit.chosen.cluster.file_wait_seconds)
    return folder.attempts(REFERENCE)[-1], failure


def phases_of(folder: Round, say: Callable[[str], None]) -> Callable[[], None]:
    """A function that says each phase of the reference's attempts from now on once, when called again and again."""
    said: set[tuple[int, str]] = set()
    before = len(folder.attempts(REFERENCE))

    def watch() -> None:
        for attempt in folder.attempts(REFERENCE)[before:]:
            for mark in read_json_lines(attempt.phases) if attempt.phases.exists() else []:
                if (attempt.number, mark["phase"]) not in said:
                    said.add((attempt.number, mark["phase"]))
                    say(f"  {folder.name}/{REFERENCE}: {mark['phase']}")

    return watch


def failed(name: str, attempt: Attempt, failure: str, what: str) -> Check:
    """A bad check that says how the attempt ended, with the cure for that kind of end."""
    kind, trace = "", ""
    if attempt.result.exists():
        told: dict[str, Any] = results.read_attributes(attempt.result)
        kind, trace = told["exit_class"], (told["traceback"].strip().splitlines() or [""])[-1]
    logs = [str(path) for path in (attempt.trial_log, attempt.judge_log) if path.exists()] or [str(attempt.folder)]
    cure = "; ".join(filter(None, [CURES.get(kind, ""), f"Read {' and '.join(logs)}"]))
    return Check(name, "bad", f"{what}: {kind or 'it ended without a result'}: {trace or failure}", cure)
