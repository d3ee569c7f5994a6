"""The victim's side: a worker that mounts, forks and runs one attack after another, each in a sandbox of its own.

    python arena.py WORLD TERMINAL     then one JSON request a line on stdin, one JSON answer a line on stdout

A request has `do` (attack, plain, probe or outside), and `arguments`; the world is laid out by test_sandbox.py. Only
the walls of the sandbox stand between an attack and the world: both belong to the same uid where that is not root.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import image
from pipeline.errors import PipelineError
from pipeline.namespace import enter_private_namespace, trial_uid
from pipeline.sandbox import Confined, Limits, Sandbox, open_output, probe

MIB = 2**20
LIMITS = Limits(60, num_processes=64, file_size_bytes=8 * MIB, tmp_size_bytes=4 * MIB, shm_size_bytes=4 * MIB)
PYTHON = [sys.executable, "-I", "/task/inside.py"]


def answer(process: Confined, log: Path) -> dict[str, Any]:
    code = process.wait()
    lines = log.read_text().splitlines()
    return {"code": code, "timed_out": process.timed_out, "got": lines[-1] if lines else "", "log": lines}


def handle(world: Path, pristine: image.Mount, fork: image.Fork, sandbox: Sandbox, request: dict[str, Any]) -> Any:
    log = world / "log"
    log.unlink(missing_ok=True)
    if request["do"] == "attack":
        with sandbox.start([*PYTHON, *request["arguments"]], log) as process:
            answered = answer(process, log)
        answered["got"] = json.loads(answered["got"]) if answered["code"] == 0 else None
    elif request["do"] == "plain":
        limits = replace(LIMITS, **request.get("limits", {}))
        changed = replace(sandbox, limits=limits, devices=tuple(request.get("devices", ())))
        with changed.start(request["arguments"], log) as process:
            answered = answer(process, log)
    elif request["do"] == "probe":
        forbidden = {name: Path(path) for name, path in request["forbidden"].items()}
        shown = {inside: Path(path) for inside, path in request.get("show", {}).items()}
        changed = replace(sandbox, read_only={**sandbox.read_only, **shown}, network=request.get("network", "loopback"))
        answered = {"report": probe(changed, forbidden, "7", world / "probe.json")}
    elif request["do"] == "read":
        with open_output(world / "out", request["arguments"][0]) as file:
            answered = {"got": file.read().decode()}
    elif request["do"] == "outside":
        done = subprocess.run(request["arguments"], capture_output=True, text=True)
        answered = {"code": done.returncode, "log": done.stdout + done.stderr}
    else:
        raise ValueError(f"no request {request['do']!r}")
    pristine.verify()
    return {**answered, "backends": [pristine.backend, fork.backend], "uid": sandbox.uid}


def main(world: Path, terminal: str) -> None:
    # The first terminal that the leader of a session opens becomes the session's own.
    os.close(os.open(terminal, os.O_RDWR))
    enter_private_namespace([sys.executable, "-W", "error", *sys.argv])
    with ExitStack() as stack:
        digest = image.show(world / "image.sqsh").tree_digest
        pristine = stack.enter_context(image.mounted(world / "image.sqsh", digest, world / "scratch"))
        fork = stack.enter_context(image.forked(pristine, world / "scratch", trial_uid()))
        shown = {"/substrate": pristine.root, "/task": world / "task"}
        sandbox = Sandbox(shown, {"/fork": fork.root, "/out": world / "out"}, limits=LIMITS)
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            try:
                answered = handle(world, pristine, fork, sandbox, json.loads(line))
            except PipelineError as error:
                answered = {"error": type(error).__name__, "what": str(error), "kind": error.kind}
            print(json.dumps(answered), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
