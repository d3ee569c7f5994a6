"""Play the whole sandbox once, as an arm uses it, and say which stage fails on this machine. `doctor` shows it.

    namespace   the private mount namespace of a worker                 limits      sizes of files, processes, wall time
    image       pack a small payload, verify it and mount it            isolation   the probe that precedes every training
    fork        a writable view of it
    bubblewrap  it starts, with the machine's network
    network     the same with a network of its own: two processes meet over its loopback
    output      what is written inside to the fork and to /out is read outside

`rehearse` starts this module as a process in a private mount namespace. It prints one line of JSON for each stage that it has played and
ends at the first that fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.campaign.errors import PipelineError, WorkFailed
from pipeline.campaign.layout import CODE_ROOT
from pipeline.sandbox import bubblewrap, image, namespace
from pipeline.sandbox.bubblewrap import Limits, Sandbox, open_output

STAGES = ("namespace", "image", "fork", "bubblewrap", "network", "output", "limits", "isolation")
TIMEOUT_SECONDS = 120.0
FILE_BYTES = 2**20
LIMITS = Limits(
    wall_seconds=30.0, num_processes=64, file_size_bytes=FILE_BYTES, tmp_size_bytes=2**24, shm_size_bytes=2**24
)
MEET = """
import os, socket
assert [name for _, name in socket.if_nameindex()] == ["lo"], socket.if_nameindex()
with socket.create_server(("127.0.0.1", 0)) as server:
    if os.fork() == 0:
        with socket.create_connection(server.getsockname(), timeout=10) as other:
            other.sendall(b"hello")
        os._exit(0)
    server.settimeout(10)
    with server.accept()[0] as one:
        assert one.recv(5) == b"hello"
assert os.wait()[1] == 0
"""
WRITE = """
text = open("/substrate/payload.txt").read()
for path in ("/out/made.txt", "/substrate/payload.txt"):
    with open(path, "w") as file:
        file.write(text + "changed")
"""
EXCEED = f"""
import resource
assert resource.getrlimit(resource.RLIMIT_NPROC)[1] == {LIMITS.num_processes}, resource.getrlimit(resource.RLIMIT_NPROC)
try:
    with open("/out/large", "wb") as file:
        file.write(bytes({2 * FILE_BYTES}))
except OSError as error:
    print(error)
else:
    raise SystemExit("a file grew beyond its limit")
"""


@dataclass(frozen=True)
class Stage:
    """What happened in one stage. found: how it works here, or why it failed. cure: of the failure, where the error names one."""

    name: str
    holds: bool
    found: str
    cure: str = ""


def rehearse(scratch_dir: str | None = None) -> list[Stage]:
    """Play every stage, up to the first that fails. scratch_dir: as cluster.scratch_dir; None or empty for TMPDIR."""
    command = namespace.privately([sys.executable, "-P", "-m", "pipeline.sandbox.rehearsal", scratch_dir or ""])
    env = {**os.environ, "PYTHONPATH": str(CODE_ROOT)}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, errors="replace"
        )
        output, said = done.stdout, done.stderr
    except OSError as error:
        output, said = "", str(error)
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        said = f"it did not end within {TIMEOUT_SECONDS:.0f} s"
    stages = [Stage(**json.loads(line)) for line in output.splitlines() if line.startswith('{"name":')]
    if all(stage.holds for stage in stages) and len(stages) < len(STAGES):
        last_words = " ".join(said.strip().splitlines()[-1:]) or "it ended without a word"
        stages.append(Stage(STAGES[len(stages)], False, last_words))
    return stages


def play(scratch_dir: str | None) -> Iterator[Stage]:
    """Play the stages in this process, which is in a private mount namespace. What a stage raises is its failure."""
    uid, is_root = namespace.trial_uid(), namespace.is_machine_root()
    namespace.require_private_namespace()
    yield Stage(
        "namespace", True, "root's own mounts" if is_root else "mounts of an ordinary user, in a user namespace"
    )
    with ExitStack() as stack:
        scratch = stack.enter_context(namespace.scratch_folder(scratch_dir, "rehearsal-"))
        payload, out = scratch / "payload", scratch / "out"
        for folder in (payload, out):
            folder.mkdir(mode=0o755)
        (payload / "payload.txt").write_text("packed, ")
        info = image.build(payload, scratch / "substrate.sqsh")
        mount = stack.enter_context(image.mounted(scratch / "substrate.sqsh", info.tree_digest, scratch))
        yield Stage("image", True, f"mounted by {mount.backend}")
        fork = stack.enter_context(image.forked(mount, scratch, uid))
        yield Stage("fork", True, f"forked by {fork.backend}")
        sandbox = Sandbox({}, {"/substrate": fork.root, "/out": out}, limits=LIMITS)
        log = scratch / "log"
        run(replace(sandbox, network="fabric"), "pass", log)
        yield Stage("bubblewrap", True, f"it starts, as uid {sandbox.uid}")
        run(sandbox, MEET, log)
        yield Stage("network", True, "two processes met over loopback, and there is no other interface")
        run(sandbox, WRITE, log)
        for folder, name in ((out, "made.txt"), (fork.root, "payload.txt")):
            with open_output(folder, name) as file:
                if file.read() != b"packed, changed":
                    raise WorkFailed(f"{name} was written inside, and something else is read outside")
        mount.verify()
        yield Stage("output", True, "what was written inside is read outside, and the image is unchanged")
        run(sandbox, EXCEED, log)
        run(
            replace(sandbox, limits=replace(LIMITS, wall_seconds=0.2)),
            "import time; time.sleep(60)",
            log,
            in_time=False,
        )
        yield Stage(
            "limits", True, "a file that grows too large is refused, and a process that runs too long is killed"
        )
        report = bubblewrap.probe(
            sandbox, {"payload": payload, "pipeline": CODE_ROOT / "pipeline"}, "6", scratch / "probe.json"
        )
        yield Stage("isolation", True, f"{len(report)} checks of the probe, nothing was reached")


def run(sandbox: Sandbox, code: str, log: Path, in_time: bool = True) -> None:
    """Run Python code in the sandbox. Raises WorkFailed with its last words unless it ends well, or at its time limit if not `in_time`."""
    log.unlink(missing_ok=True)
    with sandbox.start(["python", "-I", "-c", code], log) as process:
        code_of_end = process.wait()
    if process.timed_out == in_time or (in_time and code_of_end):
        words = " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])
        raise WorkFailed(f"exit code {code_of_end}{' at the time limit' if process.timed_out else ''}: {words}")


def main() -> int:
    played = 0
    try:
        for stage in play(sys.argv[1] or None):
            print(json.dumps(asdict(stage)), flush=True)
            played += 1
    except (PipelineError, OSError) as error:
        what, cure = (error.what, error.cure) if isinstance(error, PipelineError) else (str(error), "")
        print(json.dumps(asdict(Stage(STAGES[played], False, " ".join(what.split()), cure))), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
