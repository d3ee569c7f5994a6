"""Train one arm on several nodes. Each node mounts the same image and has its own fork and probed sandbox; ranks talk over the fabric.

Slurm starts one task per node. Task 0 is the worker, which alone writes an outcome; the other tasks are its helpers. They communicate
through files in the attempt's folder, which every node can see:

    helper 1   writes nodes/1.cores.json       on how many cores it may run, and nodes/1.kernels.json, with which kernels
    worker     writes nodes/00/order.json      what to run, where /out is, and where rank 0 listens (nodes/01 after a stall)
    helper 1   mounts, forks and probes, writes nodes/00/1.probe.json, starts its ranks, writes nodes/00/1.json {"code": 0}
    worker     writes nodes/00/end             helpers kill the ranks that still train
    worker     writes the attempt's outcome, or nodes/over: helpers end

/out is in the attempt's folder too, because ranks of all nodes write checkpoints there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.campaign import facts
from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import PipelineError, TrialFailed
from pipeline.campaign.facts import read_plan
from pipeline.campaign.files import read_json, write_file
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.campaign.shared_path import wait_until
from pipeline.config import corrections, settings
from pipeline.config.settings import Settings
from pipeline.execution import image_process
from pipeline.execution.cores import cores
from pipeline.sandbox import bubblewrap, image, namespace
from pipeline.sandbox.bubblewrap import Confined, Limits, Sandbox

# Once a node has ended with an error, or the worker's ranks have ended, the others have so long; and cluster.file_wait_seconds, if longer,
# because this node may see their exit codes so much later.
GRACE_SECONDS = 30.0
POLL_SECONDS = 0.2
ISOLATION_ARTICLE = "6"
FIRST_PORT, NUM_PORTS = 20000, 10000


def task_number() -> int:
    """Return this process's number among the job's tasks. 0 is the worker; outside Slurm there is no other."""
    return int(os.environ.get("POSTRAIN_TASK") or os.environ.get("SLURM_PROCID", "0"))


def training_sandbox(
    chosen: Settings,
    attempt: Attempt,
    bound: Mapping[str, Path],
    fork_root: Path,
    out_dir: Path,
    env: Mapping[str, str],
    own: Mapping[str, Path],
) -> Sandbox:
    """Return the sandbox in which this node's ranks train.

    bound: path inside -> folder of base weights that lie outside the image. env: variables beside the substrate's. own: path inside ->
    folder that is this sandbox's alone, which it may write.
    """
    sandbox = image_process.sandbox_of(
        chosen,
        {"/task": attempt.task_dir, **bound},
        {"/substrate": fork_root, "/out": out_dir, **own},
        chosen.cluster.gpus,
        network=chosen.cluster.network,
    )
    limits = replace(sandbox.limits, wall_seconds=60.0 * chosen.cluster.time_limit_minutes)
    clock = {"SUBSTRATE_CHECKPOINT_SECONDS": f"{60.0 * chosen.cluster.checkpoint_minutes:g}"}
    return replace(sandbox, limits=limits, env={**sandbox.env, **clock, **env})


def probe(confined: Sandbox, forbidden: Mapping[str, Path], rules: Constitution, num_nodes: int, report: Path) -> str:
    """Run the probe and return how many of its checks held, such as "24/24 closed".

    report: where the probe's result is written. Raises Refused by article 6 where a check failed or was not made.
    """
    checks = bubblewrap.probe(confined, forbidden, ISOLATION_ARTICLE, report)
    rules.check_coverage(checks, num_nodes)
    return f"{sum(not check['reached'] for check in checks.values())}/{len(checks)} closed"


def rendezvous_env(num_nodes: int, rank: int, address: str, port: int) -> dict[str, str]:
    """Return the variables from which the image's launcher learns its node and where rank 0 listens; none for a single node."""
    if num_nodes == 1:
        return {}
    return {"NUM_NODES": str(num_nodes), "NODE_RANK": str(rank), "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def rendezvous_address() -> tuple[str, int]:
    """Return the IP address and port at which rank 0 will listen; a sandbox cannot look up a host name."""
    job = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    try:
        address = socket.gethostbyname(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    except OSError:
        address = "127.0.0.1"  # the nodes of the testbed have no DNS name and are one host
    return address, FIRST_PORT + int(job) % NUM_PORTS


@dataclass(frozen=True)
class MultiNodeSandbox:
    """This node's sandbox and those of the helpers, which start and end together.

    `order` holds what helpers need besides the command: num_nodes, address, port, out_dir and forbidden paths. file_wait_seconds: how
    long a helper's file may stay unseen on this node.
    """

    local: Sandbox
    folder: Path  # `nodes` of the attempt
    num_nodes: int
    order: Mapping[str, Any]
    file_wait_seconds: float = 0.0

    @property
    def limits(self) -> Limits:
        return self.local.limits

    @contextmanager
    def start(self, command: Sequence[str], log_path: Path) -> Iterator[MultiNodeProcess]:
        """Start the command on every node, as `Sandbox.start` does on one, and kill what still runs at the end of the block."""
        order_dir = self.folder / f"{len(list(self.folder.glob('[0-9][0-9]'))):02d}"
        write_file(order_dir / "order.json", json.dumps({**self.order, "command": list(command)}))
        with self.local.start(command, log_path) as process:
            processes = MultiNodeProcess(process, order_dir, self.num_nodes - 1, self.file_wait_seconds)
            try:
                yield processes
            finally:
                processes.kill()


class MultiNodeProcess:
    """The processes of all nodes as one. `returncode` is the first exit code above 128 (a signal), else the first that is not 0."""

    def __init__(self, local: Confined, order_dir: Path, num_others: int, file_wait_seconds: float = 0.0) -> None:
        self._local, self._order_dir, self._num_others = local, order_dir, num_others
        self._grace_seconds = max(GRACE_SECONDS, file_wait_seconds)
        self._first_end: float | None = None  # monotonic seconds
        self.returncode: int | None = None

    @property
    def timed_out(self) -> bool:
        return self._local.timed_out

    @property
    def overspent(self) -> str:
        return self._local.overspent

    def poll(self) -> int | None:
        """Return the exit code once every node has ended, else None. Kills the rest after the grace time."""
        if self.returncode is not None:
            return self.returncode
        codes = {path.stem: int(read_json(path)["code"]) for path in self._order_dir.glob("[0-9].json")}
        local = self._local.poll()
        if local is not None and len(codes) == self._num_others:
            ended = [local, *codes.values()]
            self.returncode = next((code for code in ended if code > 128), None) or next((c for c in ended if c), 0)
        elif local is not None or any(codes.values()):
            self._first_end = time.monotonic() if self._first_end is None else self._first_end
            if time.monotonic() - self._first_end > self._grace_seconds:
                self.kill()
        return self.returncode

    def kill(self) -> None:
        """Kill the ranks that still train, on every node."""
        if self.returncode is None:
            write_file(self._order_dir / "end", "")
            self._local.kill()
            self.returncode = self._local.returncode if self._local.returncode else 137


def help_with(campaign: Campaign, folder: Round, arm_name: str) -> None:
    """Be a helper: wait for the worker's orders and train as they say, until the attempt is over.

    The caller has entered a private mount namespace. An order that fails does not raise: the worker reads its exit code from `N.json`.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the worker gets the signal too, and stops the trial on every node
    rank, job = task_number(), (os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0"))
    while (attempt := _attempt_of(folder, arm_name, job)) is None:
        time.sleep(POLL_SECONDS)
    shared = attempt.folder / "nodes"
    frozen, _ = read_plan(folder)
    rules = facts.load_constitution(frozen.constitution_digest)
    arm = next(arm for arm in frozen.arms if arm.name == arm_name)
    chosen = settings.with_overrides(corrections.of_round(folder), arm.overrides)
    write_file(shared / f"{rank}.cores.json", json.dumps(cores(chosen)))
    with namespace.scratch_folder(chosen.cluster.scratch_dir or None, "arm-") as scratch:
        with image.mounted(campaign.image, frozen.image_digest, scratch) as mount:
            kernels = image_process.warm_kernels(mount, chosen, scratch, attempt.folder / f"warm_up.{rank}.log")
            if kernels:
                write_file(shared / f"{rank}.kernels.json", json.dumps({"kernels": kernels.said}))
            with image.forked(mount, scratch, namespace.trial_uid()) as fork:
                num_orders = 0
                while not _is_over(attempt, shared):
                    order_dir = shared / f"{num_orders:02d}"
                    if (order_dir / "order.json").exists():
                        own = image_process.kernel_bind(
                            chosen, kernels, scratch / f"kernels-{num_orders}", namespace.trial_uid()
                        )
                        _carry_out(chosen, rules, attempt, mount, fork, order_dir, rank, own)
                        num_orders += 1
                    time.sleep(POLL_SECONDS)


def _attempt_of(folder: Round, arm: str, job: tuple[str, str]) -> Attempt | None:
    """Return the attempt that the worker of this start of the job claimed, or None before it has. job: (id, restart count)."""
    for attempt in reversed(folder.attempts(arm)):
        claim = read_json(attempt.claim) if attempt.claim.exists() else {}
        if (claim.get("slurm_job_id"), claim.get("restart")) == job:
            return attempt
    return None


def _is_over(attempt: Attempt, shared: Path) -> bool:
    return (shared / "over").exists() or attempt.result.exists() or attempt.interrupted.exists()


def _carry_out(
    chosen: Settings,
    rules: Constitution,
    attempt: Attempt,
    mount: image.Mount,
    fork: image.Fork,
    order_dir: Path,
    rank: int,
    own: Mapping[str, Path],
) -> None:
    """Carry out one order: probe, train, and write the exit code."""
    order = read_json(order_dir / "order.json")
    code = 1
    try:
        _, bound = image_process.base_of(mount.root, chosen)
        env = rendezvous_env(order["num_nodes"], rank, order["address"], order["port"])
        confined = training_sandbox(chosen, attempt, bound, fork.root, Path(order["out_dir"]), env, own)
        forbidden = {name: Path(path) for name, path in order["forbidden"].items()}
        probe(confined, forbidden, rules, order["num_nodes"], order_dir / f"{rank}.probe.json")
        with confined.start(order["command"], attempt.folder / f"trial.{rank}.log") as process:
            while process.poll() is None and not (order_dir / "end").exists():
                time.sleep(POLL_SECONDS)
            code = process.returncode if process.returncode is not None else 137
    except PipelineError as error:
        (attempt.folder / f"trial.{rank}.log").open("a").write(f"{type(error).__name__}: {error}\n")
        code = error.exit_code
    finally:
        write_file(order_dir / f"{rank}.json", json.dumps({"code": code}))


def check_probes(shared: Path, num_nodes: int, file_wait_seconds: float = 0.0) -> str:
    """Return how many nodes trained, such as "2 nodes". Raises TrialFailed where a helper's probe report is absent."""

    def reports() -> list[Path]:
        return sorted(shared.glob("00/*.probe.json"))

    if not wait_until(lambda: len(reports()) == num_nodes - 1, file_wait_seconds, [shared / "00"]):
        raise TrialFailed(
            "bad_output",
            f"{len(reports())} of {num_nodes - 1} other nodes wrote a probe's report",
            "The log of each node says why",
        )
    return f"{num_nodes} nodes"
