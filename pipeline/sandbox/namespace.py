"""The private mount namespace of a worker: every mount that the pipeline makes goes into one.

A mount made on the host outlives a worker that is killed. One made in a private namespace goes when the last process in
it ends, whichever way that happens. So a worker re-executes itself once, right at its start:

    enter_private_namespace([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])

Root of the machine unshares only its mounts. An ordinary user unshares the user namespace with them and is root in
there: kernel overlays, bind mounts and FUSE work, kernel squashfs does not. A FUSE daemon is a process that would keep
the namespace alive; it gets SIGKILL when the thread that started it ends, so mount from the main thread.
"""

import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.campaign.errors import ConfigError, NotFound, WorkFailed

NOBODY = 65534
MARK = "PIPELINE_PRIVATE_NAMESPACE"
FUSE_START_SECONDS = 10.0
# Slurm signals every process of a job that is requeued or cancelled, a terminal every process in its foreground. Only the worker
# listens: it has the trial save its state. What is started with this goes on meanwhile, and ends by SIGKILL alone.
UNMOVED = ("/usr/bin/env", "--ignore-signal=TERM,INT,HUP,USR1,USR2")


def enter_private_namespace(argv: Sequence[str]) -> None:
    """Replace this process by `argv` in a private mount namespace; return at once where it is already in one.

    The process keeps its pid, so the scheduler's signals still find it. For an ordinary user `os.getuid()` is 0 from
    then on: commands that tell a daemon who is calling, such as sbatch, must run outside.

    Raises FileNotFoundError without util-linux. Where user namespaces are switched off, unshare says so and exits 1.
    """
    if in_private_namespace():
        return
    command = _unshare(argv)
    os.execvpe(command[0], command, {**os.environ, MARK: f"{os.getpid()} {_mount_namespace()}"})


def privately(argv: Sequence[str]) -> list[str]:
    """The command that starts a child in a private mount namespace at once, a Python's start sooner than if it went there itself."""
    return ["sh", "-c", f'export {MARK}="$$ {_mount_namespace()}"; exec "$@"', "sh", *_unshare(argv)]


def _unshare(argv: Sequence[str]) -> list[str]:
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    # Slave, not private: what the host mounts later (automounted homes) still appears, and ours never goes out.
    return ["unshare", *as_user, "--mount", "--propagation", "slave", "--", *argv]


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
        raise NotFound(
            f"no program {program}", "`make setup` installs it on this node, or says what to install"
        ) from error
    if done.returncode != 0:
        raise WorkFailed(f"{' '.join(command)} exited {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def mount(stack: ExitStack, root: Path, *arguments: str) -> None:
    """mount(8) on `root` until `stack` closes."""
    run_program("mount", *arguments, str(root))
    # Lazy: a mount in use leaves this namespace now, and the machine with its last user.
    stack.callback(run_program, "umount", "--lazy", str(root))


def serve_fuse(stack: ExitStack, root: Path, *command: str) -> None:
    """Run a FUSE daemon in the foreground on `root` until `stack` closes. Raises WorkFailed when it does not mount."""
    with tempfile.TemporaryFile() as log:
        dies_with_us = (*UNMOVED, "setpriv", "--pdeathsig", "KILL")
        daemon = subprocess.Popen([*dies_with_us, *command, root], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        stack.callback(daemon.wait)
        stack.callback(daemon.kill)
        deadline = time.monotonic() + FUSE_START_SECONDS
        while not os.path.ismount(root):
            if daemon.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise WorkFailed(f"{command[0]} did not mount {root}: {log.read().decode(errors='replace').strip()}")
            time.sleep(0.005)
    stack.callback(run_program, "umount", "--lazy", str(root))


@contextmanager
def scratch_folder(scratch_dir: Path | str | None, prefix: str) -> Iterator[Path]:
    """A new folder that only this process's user may enter, removed afterwards with all that a trial left there."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=scratch_dir))
    try:
        yield folder
    finally:
        remove_tree(folder)


def remove_tree(folder: Path) -> None:
    """Remove what a trial wrote. Not shutil.rmtree: it recurses, and a trial may nest folders deeper than Python's stack."""
    # Errors are ignored: left-overs in scratch cost space, and must not hide what became of the trial.
    subprocess.run(["rm", "-rf", "--", str(folder)], stdin=subprocess.DEVNULL, capture_output=True)


class Staging:
    """A tmpfs in which the sources of binds appear under numbers, for a process of another uid to bind them again.

    It lies in /tmp, because that uid must be able to walk there; of the sources it needs to reach only what they hold.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="sandbox-", dir="/tmp")
        self._targets = (Path(self._folder, str(number)) for number in itertools.count())
        run_program("mount", "-t", "tmpfs", "-o", "mode=0755,size=1m", "sandbox", self._folder)

    def bind(self, source: Path) -> str:
        target = next(self._targets)
        if source.is_dir():
            target.mkdir()
        else:
            target.touch()
        run_program("mount", "--rbind", str(source), str(target))
        return str(target)

    def write(self, text: str) -> str:
        target = next(self._targets)
        target.write_text(text)
        target.chmod(0o644)
        return str(target)

    def remove(self) -> None:
        # Lazy takes the binds along. A sandbox that runs has its own copy of them.
        run_program("umount", "--lazy", self._folder)
        os.rmdir(self._folder)


def _mount_namespace() -> str:
    return os.readlink("/proc/self/ns/mnt")
