"""The private mount namespace of a worker: every mount that the pipeline makes goes into one.

A mount made on the host outlives a worker that is killed. One made in a private namespace goes when the last process in
it ends, whichever way that happens. So a worker re-executes itself once, right at its start:

    enter_private_namespace([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])

Root of the machine unshares only its mounts. An ordinary user unshares the user namespace with them and is root in
there: kernel overlays, bind mounts and FUSE work, kernel squashfs does not.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ConfigError, NotFound, WorkFailed

NOBODY = 65534
MARK = "PIPELINE_PRIVATE_NAMESPACE"


def enter_private_namespace(argv: Sequence[str]) -> None:
    """Replace this process by `argv` in a private mount namespace; return at once where it is already in one.

    The process keeps its pid, so the scheduler's signals still find it. For an ordinary user `os.getuid()` is 0 from
    then on: commands that tell a daemon who is calling, such as sbatch, must run outside.

    Raises FileNotFoundError without util-linux. Where user namespaces are switched off, unshare says so and exits 1.
    """
    if in_private_namespace():
        return
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    # Slave, not private: what the host mounts later (automounted homes) still appears, and ours never goes out.
    command = ["unshare", *as_user, "--mount", "--propagation", "slave", "--", *argv]
    os.execvpe(command[0], command, {**os.environ, MARK: f"{os.getpid()} {_mount_namespace()}"})


def in_private_namespace() -> bool:
    """Whether `enter_private_namespace` has brought this very process into a namespace of its own."""
    # The mark names a pid and the namespace outside, so that one inherited by another process means nothing.
    pid, _, outside = os.environ.get(MARK, "").partition(" ")
    return pid == str(os.getpid()) and outside != _mount_namespace()


def require_private_namespace() -> None:
    """Raises ConfigError where a mount would be seen by the host and outlive this process."""
    if not in_private_namespace():
        raise ConfigError("images and sandboxes need a private mount namespace", "call enter_private_namespace first")


def is_machine_root() -> bool:
    """Root of the initial user namespace, not a user who is mapped to root in a namespace of its own."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


def trial_uid() -> int:
    """The uid that confined processes get: nobody where this process may become it, else this process's own."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if os.geteuid() == 0 and first <= NOBODY < first + count:
            return NOBODY
    return os.geteuid()


def run_program(program: str, *arguments: str) -> str:
    """Run a system program and return its output. Raises NotFound where it is missing, WorkFailed when it fails."""
    # SOURCE_DATE_EPOCH would clash with the time flags of mksquashfs.
    env = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    command = [program, *arguments]
    try:
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NotFound(f"no program {program}", "doctor lists what a node needs and which package has it") from error
    if done.returncode != 0:
        raise WorkFailed(f"{' '.join(command)} exited {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _mount_namespace() -> str:
    return os.readlink("/proc/self/ns/mnt")
