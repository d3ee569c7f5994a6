"""An arm over several nodes: on each the same image, a fork and a probed sandbox of its own; the ranks meet over the fabric.

Slurm starts one task a node. Task 0 is the worker, the only one that writes an outcome; the others help:

    worker     nodes/00/order.json     train, with this /out, and meet there        (nodes/01 after a stall)
    helper 1   mount, fork, probe -> nodes/00/1.probe.json -> ranks -> nodes/00/1.json    {"code": 0}
    worker     nodes/00/end            whoever still trains is to be killed
    worker     the attempt's outcome, or `nodes/over`    helpers go home

They speak through files of the attempt's folder, which every node sees, and so does /out: ranks of all nodes write checkpoints there.
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
from pipeline.config import settings
from pipeline.config.settings import Settings
from pipeline.execution import image_process
from pipeline.sandbox import bubblewrap, image, namespace
from pipeline.sandbox.bubblewrap import Confined, Limits, Sandbox

GRACE_SECONDS = 30.0  # between the first node that ended and the last; what still trains then is killed
POLL_SECONDS = 0.2
ISOLATION_ARTICLE = "6"
FIRST_PORT, NUM_PORTS = 20000, 10000


def task_number() -> int:
    """Which of the job's tasks this process is: 0 is the worker, and the only one outside Slurm."""
    return int(os.environ.get("POSTRAIN_TASK") or os.environ.get("SLURM_PROCID", "0"))


def confine(
    chosen: Settings,
    attempt: Attempt,
    bound: Mapping[str, Path],
    fork_root: Path,
    out_dir: Path,
    env: Mapping[str, str],
) -> Sandbox:
    """The sandbox in which this node's ranks train."""
    made = image_process.sandbox_of(
        chosen,
        {"/task": attempt.task_dir, **bound},
        {"/substrate": fork_root, "/out": out_dir},
        network=chosen.cluster.network,
    )
    limits = replace(made.limits, wall_seconds=60.0 * chosen.cluster.time_limit_minutes)
    return replace(made, limits=limits, env={**made.env, **env})


def probe(confined: Sandbox, forbidden: Mapping[str, Path], rules: Constitution, num_nodes: int, report: Path) -> str:
    """Run the probe; says in a word how much was closed. Raises Refused where something was not, or was not tried."""
    found = bubblewrap.probe(confined, forbidden, ISOLATION_ARTICLE, report)
    rules.check_coverage(found, num_nodes)
    return f"{sum(not check['reached'] for check in found.values())}/{len(found)} closed"


def meeting(num_nodes: int, rank: int, address: str, port: int) -> dict[str, str]:
    """What the image's launcher reads to start this node's ranks; nothing for a node alone."""
    if num_nodes == 1:
        return {}
    return {"NUM_NODES": str(num_nodes), "NODE_RANK": str(rank), "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def here() -> tuple[str, int]:
    """Address and port at which rank 0 will listen: an address, for no sandbox can look a name up."""
    job = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    try:
        address = socket.gethostbyname(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    except OSError:
        address = "127.0.0.1"  # a node without a name in DNS; nodes of the testbed are one host
    return address, FIRST_PORT + int(job) % NUM_PORTS


@dataclass(frozen=True)
class Spread:
    """This node's sandbox and those of the helpers, started and ended as one."""

    local: Sandbox
    folder: Path  # `nodes` of the attempt
    num_nodes: int
    order: Mapping[str, Any]

    @property
    def limits(self) -> Limits:
        return self.local.limits

    @contextmanager
    def start(self, command: Sequence[str], log_path: Path) -> Iterator[Together]:
        """As `Sandbox.start`, on every node."""
        turn = self.folder / f"{len(list(self.folder.glob('[0-9][0-9]'))):02d}"
        write_file(turn / "order.json", json.dumps({**self.order, "command": list(command)}))
        with self.local.start(command, log_path) as process:
            together = Together(process, turn, self.num_nodes - 1)
            try:
                yield together
            finally:
                together.kill()


class Together:
    """The processes of all nodes. `returncode` is the first that is not 0, a signal's before others."""

    def __init__(self, local: Confined, turn: Path, num_others: int) -> None:
        self._local, self._turn, self._num_others = local, turn, num_others
        self._ending: float | None = None
        self.returncode: int | None = None

    @property
    def timed_out(self) -> bool:
        return self._local.timed_out

    @property
    def overspent(self) -> str:
        return self._local.overspent

    def poll(self) -> int | None:
        """The exit code once every node has ended."""
        if self.returncode is not None:
            return self.returncode
        codes = {path.stem: int(read_json(path)["code"]) for path in self._turn.glob("[0-9].json")}
        local = self._local.poll()
        if local is not None and len(codes) == self._num_others:
            every = [local, *codes.values()]
            self.returncode = next((code for code in every if code > 128), None) or next((c for c in every if c), 0)
        elif local is not None or any(codes.values()):
            self._ending = time.monotonic() if self._ending is None else self._ending
            if time.monotonic() - self._ending > GRACE_SECONDS:
                self.kill()
        return self.returncode

    def kill(self) -> None:
        """Kill what still trains, on every node."""
        if self.returncode is None:
            write_file(self._turn / "end", "")
            self._local.kill()
            self.returncode = self._local.returncode if self._local.returncode else 137


def help_with(campaign: Campaign, folder: Round, arm_name: str) -> None:
    """What the tasks beside the worker's do: wait for its orders, train as they say, until the attempt is over.

    The caller has entered a private mount namespace. Raises nothing that the worker would not see from `N.json`.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the worker is told too, and tells the trial of every node
    rank, job = task_number(), (os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0"))
    while (attempt := _attempt_of(folder, arm_name, job)) is None:
        time.sleep(POLL_SECONDS)
    shared = attempt.folder / "nodes"
    frozen, _ = read_plan(folder)
    rules = facts.load_constitution(frozen.constitution_digest)
    arm = next(arm for arm in frozen.arms if arm.name == arm_name)
    chosen = settings.with_overrides(settings.load(folder.config), arm.overrides)
    with namespace.scratch_folder(chosen.cluster.scratch_dir or None, "arm-") as scratch:
        with image.mounted(campaign.image, frozen.image_digest, scratch) as mount:
            with image.forked(mount, scratch, namespace.trial_uid()) as fork:
                turn = 0
                while not _over(attempt, shared):
                    folder_of_turn = shared / f"{turn:02d}"
                    if (folder_of_turn / "order.json").exists():
                        _serve(chosen, rules, attempt, mount, fork, folder_of_turn, rank)
                        turn += 1
                    time.sleep(POLL_SECONDS)


def _attempt_of(folder: Round, arm: str, job: tuple[str, str]) -> Attempt | None:
    """The attempt that this job's worker claimed in this start."""
    for attempt in reversed(folder.attempts(arm)):
        claim = read_json(attempt.claim) if attempt.claim.exists() else {}
        if (claim.get("slurm_job_id"), claim.get("restart")) == job:
            return attempt
    return None


def _over(attempt: Attempt, shared: Path) -> bool:
    return (shared / "over").exists() or attempt.result.exists() or attempt.interrupted.exists()


def _serve(
    chosen: Settings,
    rules: Constitution,
    attempt: Attempt,
    mount: image.Mount,
    fork: image.Fork,
    turn: Path,
    rank: int,
) -> None:
    """One order: probe, train, say how it ended."""
    order = read_json(turn / "order.json")
    code = 1
    try:
        _, bound = image_process.base_of(mount.root, chosen)
        env = meeting(order["num_nodes"], rank, order["address"], order["port"])
        confined = confine(chosen, attempt, bound, fork.root, Path(order["out_dir"]), env)
        forbidden = {name: Path(path) for name, path in order["forbidden"].items()}
        probe(confined, forbidden, rules, order["num_nodes"], turn / f"{rank}.probe.json")
        with confined.start(order["command"], attempt.folder / f"trial.{rank}.log") as process:
            while process.poll() is None and not (turn / "end").exists():
                time.sleep(POLL_SECONDS)
            code = process.returncode if process.returncode is not None else 137
    except PipelineError as error:
        (attempt.folder / f"trial.{rank}.log").open("a").write(f"{type(error).__name__}: {error}\n")
        code = error.exit_code
    finally:
        write_file(turn / f"{rank}.json", json.dumps({"code": code}))


def check_probes(shared: Path, num_nodes: int) -> str:
    """How many helpers' probes came, and that none reached anything; raises TrialFailed otherwise."""
    reports = sorted(shared.glob("00/*.probe.json"))
    if len(reports) != num_nodes - 1:
        raise TrialFailed("bad_output", f"{len(reports)} of {num_nodes - 1} other nodes wrote a probe", "")
    return f"{num_nodes} nodes"
