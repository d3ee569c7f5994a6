"""The tool `train`: short runs that are thrown away, and the one full run whose adapter counts.

A full run starts only from a fork that article 16 allows. The worker writes its task file and keeps its clock, so the edited code chooses
neither its settings nor its seed nor its time. What a run says of itself is for the agent and proves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.agent import fork_diff, leak_check
from pipeline.agent.tool_queue import ToolAnswer
from pipeline.agent.tool_runner import NO_BYTECODE, GpuMeter
from pipeline.campaign.errors import NotFound, TrialFailed
from pipeline.campaign.layout import Attempt
from pipeline.execution import image_process, multinode, trial
from pipeline.execution.attempt import Work, mark_training, trained_steps, write_task
from pipeline.sandbox import image
from pipeline.sandbox.bubblewrap import open_output
from pipeline.sandbox.image import Mount
from pipeline.sandbox.kernel_cache import Kernels
from pipeline.sandbox.namespace import remove_tree, scratch_folder, trial_uid

ADAPTER = "adapter/adapter_model.safetensors"
MOST_STEPS_SHOWN = 12
SHOWN = ("candidate", "samples", "rollout")
"""Phases of a run's progress, beside its steps, that help an agent to choose."""


@dataclass
class Trainings:
    """All trainings of one arm. `done` says that a full run has completed, `diff` and `seen` what the fork was when the last one began."""

    job: Work
    mount: Mount
    fork_root: Path
    bound: Mapping[str, Path]
    base: str
    out_dir: Path
    scratch: Path
    kernels: Kernels | None
    meter: GpuMeter
    open_paths: tuple[str, ...]
    done: bool = False
    diff: fork_diff.ForkDiff | None = None
    seen: leak_check.Look | None = None
    num_full: int = field(default=0)

    def train(self, arguments: Mapping[str, Any]) -> ToolAnswer:
        """Carry out the tool. Raises Interrupted where the worker is to stop."""
        if set(arguments) - {"why"} != {"num_steps"} or not isinstance(arguments.get("why", ""), str):
            return _refused("bad_arguments", "train takes num_steps (a whole number, or null for the full run) and why")
        num_steps, most = arguments["num_steps"], self.job.chosen.recipe.num_steps
        if num_steps is None:
            return self._full()
        if type(num_steps) is not int or not 1 <= num_steps <= most:
            return _refused("bad_arguments", f"num_steps is not null or a whole number from 1 to {most}; give one")
        return self._smoke(num_steps)

    def _full(self) -> ToolAnswer:
        attempts = self.job.chosen.worker.budget.attempts
        if self.done:
            return _refused(
                "budget_attempts", "the full run has completed, and an arm has one; call finish with its manifest"
            )
        if self.num_full >= attempts:
            return _refused("budget_attempts", f"all {attempts} starts of the full run are used up; call finish")
        if self.meter.wall_limit(1.0) <= 0:  # before anything of the last start is removed, and this one counts
            return _refused(*self.meter.spent())
        try:
            self.look()
        except TrialFailed as error:
            return _refused("trial_failed", f"{error.what}; undo what cannot be reviewed", error.kind)
        assert self.diff is not None
        if found := fork_diff.closed(self.diff, self.open_paths):
            return _refused("closed_path", fork_diff.refusal(found, self.open_paths))
        self.num_full += 1
        self.job.edited_files = len(self.diff.changes)
        # Another start is another run: its code is other code, so nothing of the last one may be in it.
        remove_tree(self.out_dir)
        self.out_dir.mkdir()
        # In a fork that holds the reviewed changes and nothing else: no extended attribute, no time of a file, nothing that came since.
        with image.forked(self.mount, self.scratch, trial_uid()) as fresh:
            try:
                fork_diff.apply(self.diff, self.fork_root, fresh.root, trial_uid())
                is_same = fork_diff.difference(self.mount.root, fresh.root).digest == self.diff.digest
            except TrialFailed as error:
                return _refused("trial_failed", error.what, error.kind)
            if not is_same:
                return _refused("trial_failed", "the changes of the fork cannot be made again; write plain files only")
            self.job.mark("train_start")
            try:
                answer = self._run(self.job.attempt, self.out_dir, fresh.root)
            finally:
                mark_training(self.job)
                self.job.mark("agent")
        if answer.is_ok and (longer := _more_steps(self.job)):
            return _refused("trial_failed", longer, "more_steps")
        if answer.is_ok:
            try:
                open_output(self.out_dir, ADAPTER).close()
            except (NotFound, TrialFailed) as error:
                return _refused("nothing_trained", f"the run ended with code 0 and left no adapter: {error.what}")
            self.done = True
        return answer

    def look(self) -> None:
        """Keep what the fork is now: its difference from the image, and the signs of leaks in it. Raises TrialFailed where nobody can review it."""
        self.diff = fork_diff.difference(self.mount.root, self.fork_root)
        self.seen = leak_check.look_at(self.mount.root, self.fork_root, self.diff)

    def _smoke(self, num_steps: int) -> ToolAnswer:
        recipe = asdict(self.job.chosen.recipe)
        warmup_steps = min(recipe["warmup_steps"], num_steps - 1)
        with scratch_folder(self.scratch, "smoke-") as folder:
            (folder / "out").mkdir()
            attempt = Attempt(folder)
            write_task(self.job, attempt, self.base, recipe | {"num_steps": num_steps, "warmup_steps": warmup_steps})
            return self._run(attempt, folder / "out", self.fork_root)

    def _run(self, attempt: Attempt, out_dir: Path, fork_root: Path) -> ToolAnswer:
        """Train with the task file of `attempt`, and say how it went; a failure is told with the end of its log."""
        chosen = self.job.chosen
        if self.meter.wall_limit(1.0) <= 0:
            return _refused(*self.meter.spent())
        with scratch_folder(self.scratch, "kernels-") as folder:
            # Each run has a copy of its own, because what an earlier run left there would be code that no diff shows.
            own = image_process.kernel_bind(chosen, self.kernels, folder / "own", trial_uid())
            return self._run_confined(attempt, out_dir, fork_root, own)

    def _run_confined(self, attempt: Attempt, out_dir: Path, fork_root: Path, own: Mapping[str, Path]) -> ToolAnswer:
        chosen = self.job.chosen
        confined = multinode.training_sandbox(chosen, attempt, self.bound, fork_root, out_dir, NO_BYTECODE, own)
        limit = self.meter.wall_limit(confined.limits.wall_seconds)
        confined = replace(confined, limits=replace(confined.limits, wall_seconds=limit))
        began = time.monotonic()
        try:
            trial.train(confined, attempt, out_dir, 60.0 * chosen.cluster.stall_minutes, self.job.stop_wanted)
        except TrialFailed as error:
            self.meter.charge(time.monotonic() - began)
            if error.kind == "timeout" and self.meter.wall_limit(1.0) < 1.0:
                return _refused(*self.meter.spent(), error.kind)
            return _refused("trial_failed", f"{error.kind}: {error.what}\n{error.cure}", error.kind)
        self.meter.charge(time.monotonic() - began)
        return ToolAnswer(_summary(attempt))


def _more_steps(job: Work) -> str:
    """What is wrong with the length of a run, by its own word; empty if nothing is. Who hides steps is bounded by seconds alone."""
    planned = job.chosen.recipe.num_steps
    if (made := trained_steps(job.attempt)) <= planned:
        return ""
    return f"the run made {made} steps, and every arm makes {planned}, so that all train on as many tokens; take the steps back"


def _refused(failure: str, what: str, kind: str = "") -> ToolAnswer:
    """An answer that is a failure. kind: that of the trial's end, for the transcript."""
    return ToolAnswer(failure=failure, what=trial.printable(what), facts={"kind": kind} if kind else {})


def _summary(attempt: Attempt) -> str:
    """What a run said of its progress: some steps, evenly spread, and what it tried on a holdout. Without times, so that a replay reads the same."""
    steps = [
        (int(step), loss)
        for line in trial.progress_lines(attempt, "train")
        if (step := trial.number(line.get("step"))) is not None and (loss := trial.number(line.get("loss"))) is not None
    ]
    lines = [f"the run completed {len(steps)} steps"]
    apart = max(1, -(-len(steps) // MOST_STEPS_SHOWN))
    lines += [f"step {step}: loss {loss:.4f}" for step, loss in [*steps[::apart], *steps[-1:]]]
    for phase in SHOWN:
        for line in trial.progress_lines(attempt, phase)[-MOST_STEPS_SHOWN:]:
            numbers = {name: trial.number(value) for name, value in sorted(line.items()) if name != "seconds"}
            told = [f"{name} {value:g}" for name, value in numbers.items() if value is not None]
            lines.append(f"{phase}: {', '.join(told)}")
    return "\n".join(lines)
