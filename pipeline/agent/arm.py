"""An arm that an agent trains: the loop's sandbox, the relay to its model, the tools in its fork, and the report of what it did.

    worker (holds the key, starts every sandbox)
      loop:  pristine image + one socket  ->  relay  ->  the endpoint, a scripted model, or a transcript that is replayed
      tools: the fork, without a socket   <-  the worker's main thread

Nothing that the loop, the model or the fork says is believed. The worker compares the fork with the image, writes the task files, keeps the
clock, and records every byte; afterwards the arm is judged as any other. `train` is what `execution.worker.work` is handed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.agent import fork_diff, leak_check, report
from pipeline.agent.relay import SOCKET, Relay
from pipeline.agent.scripted_model import scenario
from pipeline.agent.scripted_model.server import ScriptedModel
from pipeline.agent.tool_queue import ToolAnswer
from pipeline.agent.tool_runner import GpuMeter, ToolRunner
from pipeline.agent.trainings import Trainings
from pipeline.campaign.errors import ConfigError, Interrupted, TrialFailed
from pipeline.campaign.facts import load_constitution
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import Attempt
from pipeline.config.fit import unit_of
from pipeline.config.policy_schema import Worker
from pipeline.config.settings import Settings
from pipeline.execution import image_process, multinode, trial, worker
from pipeline.execution.attempt import Work
from pipeline.model_calls import chat_request, endpoint, transcript
from pipeline.model_calls.budget import MILLION, Budget, Limits
from pipeline.model_calls.endpoint import Ask, Endpoint
from pipeline.model_calls.failures import EndpointFailed
from pipeline.model_calls.manifest import BadManifest, read_manifest
from pipeline.model_calls.replay import Replay
from pipeline.model_calls.served import Served
from pipeline.sandbox import bubblewrap
from pipeline.sandbox.bubblewrap import Limits as SandboxLimits
from pipeline.sandbox.bubblewrap import Sandbox
from pipeline.sandbox.image import Fork, Mount
from pipeline.sandbox.kernel_cache import Kernels
from pipeline.sandbox.namespace import trial_uid

ENTRY = ("python", "-P", "-m", "substrate.agent")
INSIDE = f"/relay/{SOCKET}"
LATE_SECONDS = 60.0  # after the wall time, in which a loop may say how it ended
LOOP_LIMITS = SandboxLimits(num_processes=64, file_size_bytes=2**20, tmp_size_bytes=2**24, shm_size_bytes=2**20,
                            disk_size_bytes=2**24, log_size_bytes=2**24)  # fmt: skip


def train(
    job: Work, mount: Mount, fork: Fork, bound: Mapping[str, Path], out_dir: Path, scratch: Path, kernels: Kernels | None,
    replayed: Replay | None = None,
) -> None:  # fmt: skip
    """Let the arm's agent train it, and leave its full run's outputs in `out_dir`.

    bound: path inside a sandbox -> folder of base weights. replayed: answers of a transcript in place of a model.

    Raises TrialFailed with the agent's typed outcome where it left no adapter, Interrupted where the worker is to stop, Refused where a
    sandbox is not closed. The report is written in each of these cases but the last.
    """
    job.attempt.agent_dir.mkdir(parents=True)
    # First, because the clock of a session does not run while its server waits in the queue.
    with asked(job, replayed) as (model, ask):
        session = Session(job, mount, fork, bound, out_dir, scratch, kernels)
        session.probe()
        loop_log = session.talk(model, ask)
    outcome, why = session.report()
    job.coverage["agent"] = outcome
    if outcome != "completed":
        raise TrialFailed(outcome, f"the agent ended without a full run that counts: {why}{loop_log}")


def resume(job: Work, trained: Attempt, mount: Mount) -> None:
    """Take over the report of an earlier attempt, whose sealed adapter this one judges."""
    report.resume(job, trained, mount.root)


def check(chosen: Settings) -> None:
    """Check what answers the agents of a configuration, before any job starts.

    Raises ConfigError for a scenario, an endpoint, or a place that holds no key. A variable is looked for where arms are children of this
    process; jobs of Slurm have an environment of their own.
    """
    worker = chosen.worker
    for name in worker.scenarios:
        scenario.load(name)
    if not worker.scenarios and not worker.is_served:
        model = _endpoint(worker)
        model.check_settings()
        if model.api_key_file or chosen.cluster.kind == "local":
            try:
                model.read_key()
            except EndpointFailed as failed:
                raise ConfigError(failed.what, failed.cure) from None


def _endpoint(chosen: Worker) -> Endpoint:
    at = chosen.endpoint
    return Endpoint(
        at.url, at.model, chat_request.USE, at.timeout_seconds, at.api_key_env, at.api_key_file, at.leave_out, at.add
    )


@contextmanager
def asked(job: Work, replayed: Replay | None) -> Iterator[tuple[Endpoint, Ask]]:
    """The endpoint that requests are composed for, and what answers them: itself, the round's server, a scripted model, or a transcript."""
    chosen, arm_index = job.chosen.worker, job.arm.index
    model = _endpoint(chosen)
    if replayed is not None:
        yield model, replayed.ask
    elif chosen.scenarios:
        with ScriptedModel(chosen.scenarios[arm_index % len(chosen.scenarios)]) as scripted:
            served = replace(model, url=scripted.url)
            yield served, partial(endpoint.post_chat, served)
    elif chosen.is_served:
        of_round = Served(job.folder, model, chosen.server.wait_seconds, job.stop_wanted)
        job.mark("agent_server")
        of_round.wait_first()
        yield model, of_round.ask
    else:
        yield model, partial(endpoint.post_chat, model)


@dataclass
class Session:
    """One agent's session with its arm. Only the worker's main thread calls it."""

    job: Work
    mount: Mount
    fork: Fork
    bound: Mapping[str, Path]
    out_dir: Path
    scratch: Path
    kernels: Kernels | None
    trainings: Trainings = field(init=False)
    budget: Budget = field(init=False)
    seen: leak_check.Look = field(
        init=False
    )  # what was found in the edits, and the texts that judged prompts are sought in
    written: dict[str, Any] = field(init=False)  # the report

    def __post_init__(self) -> None:
        job, chosen = self.job, self.job.chosen
        rules, gpus = load_constitution(job.plan.constitution_digest), chosen.cluster.gpus
        self.open_paths = rules.open_paths if job.arm.role == "axis" else ()  # who repeats a recipe changes nothing
        self.budget = Budget(limits_of(chosen.worker), before=report.spent_before(job))
        devices = gpus or chosen.parallelism.world_size
        meter = GpuMeter(chosen.worker.budget.gpu_seconds, devices, self.budget.seconds_left, unit_of(chosen))
        base, _ = image_process.base_of(self.mount.root, chosen)
        self.trainings = Trainings(
            job,
            self.mount,
            self.fork.root,
            self.bound,
            base,
            self.out_dir,
            self.scratch,
            self.kernels,
            meter,
            self.open_paths,
        )
        self.tools = ToolRunner(
            partial(image_process.sandbox_of, chosen), self.fork.root, self.open_paths, meter, self.scratch,
            read_only={"/task": job.attempt.task_dir, **self.bound}, gpus=gpus, stop_wanted=job.stop_wanted,
            own=lambda folder: image_process.kernel_bind(chosen, self.kernels, folder, trial_uid()),
        )  # fmt: skip

    def probe(self) -> None:
        """Probe the sandbox in which the edited code will run. Raises Refused by article 6."""
        job = self.job
        job.mark("probe")
        confined = multinode.training_sandbox(job.chosen, job.attempt, self.bound, self.fork.root, self.out_dir, {}, {})
        rules = load_constitution(job.plan.constitution_digest)
        job.coverage["probe"] = multinode.probe(confined, worker.forbidden_paths(job), rules, 1, job.attempt.probe)

    def talk(self, model: Endpoint, ask: Ask) -> str:
        """Run the loop to its end, and answer its tools meanwhile. Returns the end of its log where it broke off, else ""."""
        job, task_dir = self.job, self.scratch / "agent_task"
        write_file(task_dir / "task.json", self.task())
        task_dir.chmod(0o755)
        log = job.attempt.agent_dir / "loop.log"
        writer = transcript.Writer(job.attempt.transcript)
        with Relay(self.scratch / "r", trial_uid(), model, ask, self.budget, writer) as relay:
            confined = Sandbox(
                {"/substrate": self.mount.root, "/task": task_dir, "/relay": relay.path.parent},
                env=image_process.SUBSTRATE_ENV, limits=LOOP_LIMITS,
            )  # fmt: skip
            report = job.attempt.agent_dir / "probe.json"
            bubblewrap.probe(confined, worker.forbidden_paths(job), multinode.ISOLATION_ARTICLE, report, [INSIDE])
            job.mark("agent")
            relay.tools.on_trouble = job.stop.set
            with confined.start(ENTRY, log) as process:
                relay.tools.serve(self.answer, self._over(process))
                is_late = process.poll() is None and not job.stop_wanted()
            if is_late:
                writer.append("end", outcome="budget_wall", what=str(self.budget.wall_is_over()))
        # Asked once the relay's threads have ended. What is finished is sealed even where the worker is to stop, and judged by the next attempt.
        if job.stop_wanted() and not relay.is_finished:
            raise Interrupted("the agent's session was stopped", "Start the arm again; its agent begins anew")
        return "" if relay.ending or relay.is_finished or is_late else f": {trial.log_tail(log)[-500:]}"

    def _over(self, process: bubblewrap.Confined) -> Callable[[], bool]:
        return lambda: (
            process.poll() is not None or self.job.stop_wanted() or self.budget.seconds_left() < -LATE_SECONDS
        )

    def task(self) -> str:
        """The loop's task file (docs/contract.md, kind `agent`). It names no round, arm, host, time or path of the site."""
        job, chosen = self.job, self.job.chosen
        arm, asked_for, at = job.arm, asdict(chosen.worker.budget), chosen.worker.endpoint
        config = {
            "arm": {
                "role": arm.role,
                "axis": arm.axis,
                "settings": [list(setting) for setting in arm.overrides],
                "moves": [arm.overrides[-1][0]] if arm.role == "axis" else [],
                "seed": arm.seed,
            },
            **{name: asdict(getattr(chosen, name)) for name in ("recipe", "model", "parallelism")},
            "budget": {name: value for name, value in asked_for.items() if name != "money"},
            "open_paths": list(self.open_paths),
            "temperature": 0,
            "seed": at.seed,
        }
        return json.dumps({"schema": 1, "kind": "agent", "config": config, "paths": {"socket": INSIDE}}, indent=1)

    def answer(self, name: str, arguments: Mapping[str, Any]) -> ToolAnswer:
        """Carry out a tool of the loop. Raises Interrupted where the worker is to stop."""
        used = self.trainings.meter.used
        if name == "finish":
            answer = self._finish(arguments)
        elif name == "train":
            answer = self.trainings.train(arguments)
        else:
            answer = ToolAnswer.of(self.tools.call(name, dict(arguments)))
        spent = math.ceil(self.trainings.meter.used - used)
        return replace(answer, facts={**answer.facts, "gpu_seconds": spent}) if spent else answer

    def _finish(self, arguments: Mapping[str, Any]) -> ToolAnswer:
        try:
            read_manifest(dict(arguments), self.job.arm.axis)
        except BadManifest as bad:
            return ToolAnswer(failure=bad.kind, what=str(bad))
        return ToolAnswer(
            "the manifest is accepted" + ("" if self.trainings.done else "; without a full run, the arm has no score")
        )

    def report(self) -> tuple[str, str]:
        """Write the report and the patch. Returns the agent's typed outcome and, for people, why no adapter of it counts."""
        if self.trainings.diff is None:
            with suppress(TrialFailed):  # nobody can review it, and nothing was trained in it
                self.trainings.look()
        diff, seen = self.trainings.diff or fork_diff.ForkDiff((), ""), self.trainings.seen or leak_check.Look([], {})
        self.job.look = partial(report.look_in, self.job, self.mount.root)
        return report.write(self.job, diff, seen, self.budget, self.trainings.meter)


def limits_of(chosen: Worker) -> Limits:
    """The budget of an arm in the whole numbers that it is counted in."""
    budget = chosen.budget
    prices = (chosen.price_per_million_prompt_tokens, chosen.price_per_million_answer_tokens)
    return Limits(
        budget.steps, budget.tokens, budget.answer_tokens, budget.wall_seconds,
        math.ceil(budget.money * MILLION), *(math.ceil(price * MILLION) for price in prices),
    )  # fmt: skip
