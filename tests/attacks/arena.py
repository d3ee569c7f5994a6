"""The victim of the attacks: a worker that mounts, forks and runs one attack after another, each in a sandbox of its own.

    python arena.py WORLD TERMINAL     reads a JSON request a line from stdin, writes a JSON answer a line to stdout

A request has `do` (a method of Stage) and `arguments`. host.py makes the world. Only the sandbox protects the world from an attack: without
root both belong to the same uid.
"""

import ctypes
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.agent import fork_diff, tool_runner
from pipeline.campaign.errors import PipelineError, TrialFailed
from pipeline.campaign.files import tree_digest
from pipeline.campaign.layout import Attempt
from pipeline.execution import adapter, image_process, resume, trial
from pipeline.sandbox import image, kernel_cache
from pipeline.sandbox.bubblewrap import Confined, Limits, Sandbox, open_output, probe
from pipeline.sandbox.namespace import enter_private_namespace, remove_tree, scratch_folder, trial_uid

MIB = 2**20
LIMITS = Limits(60, num_processes=64, file_size_bytes=8 * MIB, tmp_size_bytes=4 * MIB, shm_size_bytes=4 * MIB)
SHAPES = {"w": (2, 2)}
LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj"]}
OPEN_PATHS = ("substrate/open/**",)  # of an agent
PYTHON = [sys.executable, "-sE", "/task/inside.py"]


def answer(process: Confined, log: Path) -> dict[str, Any]:
    code = process.wait()
    lines = log.read_text().splitlines()
    return {"code": code, "timed_out": process.timed_out, "got": lines[-1] if lines else "", "log": lines}


@dataclass
class Stage:
    """What is there for every request."""

    world: Path
    pristine: image.Mount
    fork: image.Fork
    sandbox: Sandbox

    @property
    def log(self) -> Path:
        return self.world / "log"

    def attack(self, *arguments: str, **more: Any) -> dict[str, Any]:
        with replace(self.sandbox, **more).start([*PYTHON, *arguments], self.log) as process:
            answered = answer(process, self.log)
        told = json.loads(answered["got"]) if answered["code"] == 0 else {"got": None, "refused": []}
        return answered | told

    def plain(self, *arguments: str, limits: dict[str, Any] | None = None, devices: tuple[str, ...] = ()) -> Any:
        changed = replace(self.sandbox, limits=replace(LIMITS, **(limits or {})), devices=tuple(devices))
        with changed.start(arguments, self.log) as process:
            return answer(process, self.log)

    def probe(
        self, forbidden: dict[str, str], show: dict[str, str] | None = None, network: str = "loopback",
        sockets: tuple[str, ...] = (),
    ) -> Any:  # fmt: skip
        shown = {inside: Path(path) for inside, path in (show or {}).items()}
        changed = replace(self.sandbox, read_only={**self.sandbox.read_only, **shown}, network=network)
        closed = {name: Path(path) for name, path in forbidden.items()}
        return {"report": probe(changed, closed, "7", self.world / "probe.json", sockets)}

    def read(self, name: str) -> dict[str, Any]:
        with open_output(self.world / "out", name) as file:
            return {"got": file.read().decode()}

    def outside(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(arguments, capture_output=True, text=True)
        return {"code": done.returncode, "log": done.stdout + done.stderr}

    def train(self, code: str, limits: dict[str, Any] | None = None, stall_seconds: float = 60.0) -> dict[str, Any]:
        """The worker's own way through a training; the trial has changed its fork's code to `code`."""
        shutil.rmtree(
            self.fork.root / "substrate/__pycache__", ignore_errors=True
        )  # an attack before may have poisoned it
        (self.fork.root / "substrate/train.py").write_text(code)
        attempt = self._attempt()
        shown = {"/task": self.world / "task"}
        written = {"/substrate": self.fork.root, "/out": self.world / "out"}
        confined = Sandbox(shown, written, image_process.SUBSTRATE_ENV, limits=replace(LIMITS, **(limits or {})))
        trial.train(confined, attempt, self.world / "out", stall_seconds, lambda: False)
        return {"log": trial.log_tail(attempt.trial_log), "progress": trial.progress_lines(attempt, "train")}

    def judge(self) -> dict[str, Any]:
        """The image's train.py as the judge starts its processes, and as the trial's fork would run it."""
        work = self._attempt().folder
        out = image_process.start(self.pristine.root, "train", [], {}, work, self.log)
        forked = Sandbox({"/substrate": self.fork.root}, env=image_process.SUBSTRATE_ENV)
        with forked.start(["python", "-P", "-m", "substrate.train"], work / "fork.log") as process:
            process.wait()
        return {"got": self.log.read_text(), "out": os.listdir(out), "fork": (work / "fork.log").read_text()}

    def kernels(self) -> dict[str, Any]:
        """A trial that changes every compiled kernel that it can reach, and what pristine processes get after it."""
        with scratch_folder(self.world / "scratch", "kernels-") as scratch:
            return self._kernels_in(scratch)

    def _kernels_in(self, scratch: Path) -> dict[str, Any]:
        sys.stderr = io.StringIO()  # the cache says what it does

        def fill() -> tuple[Path, dict[str, str]]:
            (scratch / "made/inductor").mkdir(parents=True)
            (scratch / "made/inductor/kernel.so").write_text("honest")
            return scratch / "made", {"kernels": "elementwise compiled"}

        kernels = kernel_cache.obtain(str(scratch), "image-gpu-1", scratch / "worker", fill)
        given = {"/kernels": kernels.private_copy(scratch / "trial", self.sandbox.uid)}
        store = kernel_cache.store_of(str(scratch)) / "image-gpu-1" / "tree"
        answered = self.attack(
            *("poison_kernels", str(store), str(scratch / "worker"), str(scratch / "trial")),
            read_write={**self.sandbox.read_write, **given},
        )
        later = kernel_cache.obtain(str(scratch), "image-gpu-1", scratch / "later", None)
        sys.stderr = sys.__stderr__
        return {
            **answered,
            "trial": sorted(path.read_text() for path in given["/kernels"].rglob("*.so")),
            "later": [(scratch / name / "inductor/kernel.so").read_text() for name in ("later", "worker")],
            "digests": [kernels.digest, later.digest, tree_digest(scratch / "worker"), tree_digest(store)],
        }

    def take(self) -> dict[str, Any]:
        """What the worker takes of /out after a training: the files that are then in the attempt."""
        attempt = self._attempt()
        found: dict[str, Any] = {}
        try:
            found["digest"] = adapter.check_and_keep(self.world / "out", SHAPES, LORA, attempt.adapter_dir)
        finally:
            found["kept"] = sorted(str(p.relative_to(attempt.folder)) for p in attempt.folder.rglob("*"))
            (self.world / "kept.json").write_text(json.dumps(found["kept"]))
        return found

    def keep(self) -> dict[str, Any]:
        """Keep the trial's state, as the worker does at each checkpoint, and list it."""
        saved = self._attempt().saved_dir
        try:
            resume.keep_state(self.world / "out", saved)
        except OSError as error:
            return {"kept": [], "why": str(error)}
        kept = [path for path in saved.rglob("*")]
        return {
            "kept": sorted(path.name for path in kept),
            "modes": sorted({path.stat().st_mode & 0o7000 for path in kept}),
        }

    def agent(
        self, calls: list[list[Any]], gpu_seconds: float = 300.0, stop_after: float = math.inf, most_files: int = 20_000
    ) -> dict[str, Any]:
        """The worker's way through an agent's tools in a fork as it was at first, and what a training would then be refused for."""
        for path in self.fork.root.iterdir():
            remove_tree(path)
        shutil.copytree(self.pristine.root, self.fork.root, dirs_exist_ok=True)
        for path in (self.fork.root, *self.fork.root.rglob("*")):
            os.chown(path, self.sandbox.uid, self.sandbox.uid)

        tool_runner.MOST_IN_FORK["--inodes"] = most_files

        def sandbox_of(shown: Any, written: Any, gpus: int, **more: Any) -> Sandbox:
            return Sandbox(shown, written, env=image_process.SUBSTRATE_ENV, limits=LIMITS, **more)

        with scratch_folder(self.world / "scratch", "arm-") as work:
            meter, began = tool_runner.GpuMeter(gpu_seconds, num_devices=2), time.monotonic()
            runner = tool_runner.ToolRunner(
                sandbox_of,
                self.fork.root,
                OPEN_PATHS,
                meter,
                work,
                stop_wanted=lambda: time.monotonic() - began > stop_after,
            )
            answers = [runner.call(*call) for call in calls]
            left = sorted(str(path.relative_to(work)) for path in work.rglob("*"))
        refused = [each["failure"] for each in answers if not each["ok"]]
        told = {"answers": answers, "left": left, "used": meter.used, "closed": [], "changed": []}
        try:
            diff = fork_diff.difference(self.pristine.root, self.fork.root)
            told["closed"] = fork_diff.closed(diff, OPEN_PATHS)
            told["changed"] = [each.path for each in diff.changes]
            refused += ["article 16 before the training"] if told["closed"] else []
        except TrialFailed as error:
            told["unreadable"] = error.what
            refused.append(error.kind)
        return told | {"refused": refused}

    def clean(self, name: str) -> dict[str, Any]:
        """Remove what a trial has left, as the worker removes its scratch."""
        with scratch_folder(self.world / "scratch", "arm-") as folder:
            (self.world / name).rename(folder / "out")
            mode = folder.stat().st_mode & 0o777
        (self.world / name).mkdir()
        return {"mode": mode, "left": sorted(path.name for path in (self.world / "scratch").iterdir())}

    def _attempt(self) -> Attempt:
        """A new and empty one."""
        folder = self.world / "attempt"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "task").mkdir(parents=True)
        return Attempt(folder)


def main(world: Path, terminal: str) -> None:
    # The first terminal that the leader of a session opens becomes the session's own.
    os.close(os.open(terminal, os.O_RDWR))
    # As a login does, so that there is a keyring of the session to steal from.
    ctypes.CDLL(None).syscall(250, 1, None)
    enter_private_namespace([sys.executable, "-W", "error", *sys.argv])
    with ExitStack() as stack:
        digest = image.show(world / "image.sqsh").tree_digest
        pristine_mount = stack.enter_context(image.mounted(world / "image.sqsh", digest, world / "scratch"))
        fork = stack.enter_context(image.forked(pristine_mount, world / "scratch", trial_uid()))
        shown = {"/substrate": pristine_mount.root, "/task": world / "task"}
        sandbox = Sandbox(shown, {"/fork": fork.root, "/out": world / "out"}, limits=LIMITS)
        stage = Stage(world, pristine_mount, fork, sandbox)
        backends = [pristine_mount.backend, fork.backend]
        print(json.dumps({"ready": True, "backends": backends, "uid": sandbox.uid}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            stage.log.unlink(missing_ok=True)
            try:
                answered = getattr(stage, request.pop("do"))(*request.pop("arguments"), **request)
                pristine_mount.verify()
            except PipelineError as error:
                answered = {"error": type(error).__name__, "what": str(error), "kind": error.kind}
            print(json.dumps(answered), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
