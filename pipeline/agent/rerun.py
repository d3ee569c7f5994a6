"""Replay: run an agent's arm again with the answers of its transcript in place of a model, and compare what comes out.

A replay works in scratch and writes nothing into the campaign. It mounts and forks the image, probes, runs the loop and the tools, and checks
the adapter, as the worker did. It judges nothing, because the same adapter has the same score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.agent import arm as agents_arm
from pipeline.campaign.errors import ConfigError, NotFound, TrialFailed
from pipeline.campaign.facts import facts_of, read_plan, verified_code
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.config import corrections, settings
from pipeline.execution import worker
from pipeline.execution.attempt import Work
from pipeline.model_calls import transcript
from pipeline.model_calls.replay import Replay
from pipeline.sandbox import image, namespace
from pipeline.sandbox.kernel_cache import Kernels


@dataclass(frozen=True)
class Replayed:
    """What a replay gave. `recorded_outcome` and `recorded`, a digest or "", are those of the transcript's own attempt.

    differs: where a request first differed from the recorded one, in words; "" where every byte was the same.
    """

    outcome: str
    recorded_outcome: str
    adapter_digest: str
    recorded: str
    differs: str

    @property
    def is_same(self) -> bool:
        """Whether it ended as the attempt did, with the same adapter or equally without one."""
        return (self.outcome, self.adapter_digest) == (self.recorded_outcome, self.recorded)


@dataclass(frozen=True)
class Replaying:
    """As `agent.arm`, with recorded answers in place of a model."""

    answers: Replay

    def train(
        self, job: Work, mount: image.Mount, fork: image.Fork, bound: Mapping[str, Path], out_dir: Path, scratch: Path,
        kernels: Kernels | None,
    ) -> None:  # fmt: skip
        agents_arm.train(job, mount, fork, bound, out_dir, scratch, kernels, self.answers)

    def resume(self, job: Work, trained: Attempt, mount: image.Mount) -> None:
        raise AssertionError("a replay has no earlier attempt")


def replay(campaign: Campaign, folder: Round, arm_name: str, path: Path) -> Replayed:
    """Run an arm again from a transcript. The caller has entered a private mount namespace (sandbox/namespace.py).

    Raises ConfigError for an arm that no agent runs, IntegrityError for a damaged transcript or frozen files that were changed, NotFound
    where a file is missing, and as `worker.work` where the sandbox does not work.
    """
    facts = facts_of(campaign)
    verified_code(campaign, facts)
    frozen, digest = read_plan(folder)
    arm = next((arm for arm in frozen.arms if arm.name == arm_name), None)
    chosen = settings.with_overrides(corrections.of_round(folder), arm.overrides if arm else ())
    if arm is None or not chosen.worker.runs(arm.role):
        run_by = ", ".join(arm.name for arm in frozen.arms if chosen.worker.runs(arm.role)) or "none"
        raise ConfigError(f"no agent runs {folder.name}/{arm_name}", f"Arms of agents in this round: {run_by}")
    if not path.is_file():
        raise NotFound(f"{path} is no file", "Name an attempt's agent/transcript.jsonl")
    records = transcript.load(path).records
    if not records:
        raise ConfigError(f"{path} has no event of a transcript", "Name an attempt's agent/transcript.jsonl")
    answers = Replay(records)
    sealed = Attempt(path.parent.parent).sealed
    recorded = read_json(sealed)["adapter_digest"] if sealed.exists() else ""
    report = read_json(
        path.parent / "report.json"
    )  # NotFound where the attempt was interrupted: nothing is recorded that could be the same
    with namespace.scratch_folder(chosen.cluster.scratch_dir or None, "arm-") as scratch:
        attempt = Attempt(scratch / "attempt_00")
        attempt.folder.mkdir()
        job = Work(campaign, folder, facts, frozen, digest, arm, chosen, attempt, by_agent=Replaying(answers))
        outcome = "completed"
        with image.mounted(campaign.image, frozen.image_digest, scratch) as mount:
            try:
                worker.train(job, mount, scratch, worker.warm_kernels(job, mount, scratch))
            except TrialFailed as error:
                outcome = error.kind
    at = answers.difference
    differs = f"request {at.call} differs from byte {at.offset} on" if at else ""
    return Replayed(outcome, report["outcome"], job.adapter_digest, recorded, differs)
