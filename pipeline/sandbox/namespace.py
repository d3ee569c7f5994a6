"""The private mount namespace of a worker, in which the pipeline makes every mount.

A mount on the host outlives a worker that is killed. A mount in a private namespace vanishes when the last process in the namespace ends, in
whatever way that happens. A worker therefore executes itself again at its start:

    enter_private_namespace([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])

Root of the machine unshares only its mounts. An ordinary user also unshares the user namespace and is root inside it: kernel overlays, bind
mounts and FUSE work there, kernel squashfs does not. A FUSE daemon is a process that would keep the namespace alive. It gets SIGKILL
when the thread that started it ends, so mount from the main thread.
"""

import itertools
import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, WorkFailed

NOBODY = 65534
MARK = "PIPELINE_PRIVATE_NAMESPACE"
FUSE_START_SECONDS = 10.0
# Slurm signals every process of a job that is requeued or cancelled, and a terminal every process in its foreground. Only the worker may
# react, because it has the trial save its state. A program that is started with these words ignores such signals; only SIGKILL ends it.
UNMOVED = ("/usr/bin/env", "--ignore-signal=TERM,INT,HUP,USR1,USR2")


def enter_private_namespace(argv: Sequence[str]) -> None:
    """Replace this process by `argv` in a private mount namespace. Return at once where it is already in one.

    The process keeps its pid, so the scheduler's signals still reach it. For an ordinary user `os.getuid()` is 0 from then on, so
    commands that identify their caller to a daemon, such as sbatch, must run outside.

    Raises FileNotFoundError without util-linux. Where user namespaces are disabled, unshare says so and exits with code 1.
    """
    if in_private_namespace():
        return
    command = _unshare(argv)
    os.execvpe(command[0], command, {**os.environ, MARK: f"{os.getpid()} {_mount_namespace()}"})


def privately(argv: Sequence[str]) -> list[str]:
    """The command that starts `argv` in a private mount namespace. A Python child starts sooner than if it called
    `enter_private_namespace` itself, because it starts only once.
    """
    return ["sh", "-c", f'export {MARK}="$$ {_mount_namespace()}"; exec "$@"', "sh", *_unshare(argv)]


def _unshare(argv: Sequence[str]) -> list[str]:
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    # `slave` instead of `private`: later mounts of the host (automounted homes) still appear here, and ours never appear on the host.
    return ["unshare", *as_user, "--mount", "--propagation", "slave", "--", *argv]


def in_private_namespace() -> bool:
    """Whether `enter_private_namespace` has brought this process into a private namespace."""
    # The mark names a pid and the outer namespace, so a mark that another process inherited has no effect.
    pid, _, outside = os.environ.get(MARK, "").partition(" ")
    return pid == str(os.getpid()) and outside != _mount_namespace()


def require_private_namespace() -> None:
    """Raises ConfigError outside a private namespace, where a mount would appear on the host and outlive this process."""
    if not in_private_namespace():
        raise ConfigError("Images and sandboxes need a private mount namespace", "Call enter_private_namespace first")


def is_machine_root() -> bool:
    """Whether this process is root of the initial user namespace, and not a user who is mapped to root in another one."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


def trial_uid() -> int:
    """The uid of confined processes: that of nobody (65534) where this process may change to it, else its own."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if os.geteuid() == 0 and first <= NOBODY < first + count:
            return NOBODY
    return os.geteuid()


def run_program(program: str, *arguments: str) -> str:
    """Run a system program and return its output. Raises NotFound where it is not installed, WorkFailed where it fails."""
    # SOURCE_DATE_EPOCH would conflict with the time flags of mksquashfs.
    env = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    command = [program, *arguments]
    try:
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NotFound(
            f"There is no program {program} on this node", "`make setup` installs it, or names the package to install"
        ) from error
    if done.returncode != 0:
        raise WorkFailed(
            f"{' '.join(command)} exited with code {done.returncode}: {(done.stderr or done.stdout).strip()}"
        )
    return done.stdout


def mount(stack: ExitStack, root: Path, *arguments: str) -> None:
    """Call mount(8) on `root`; `stack` unmounts it. Raises as `run_program` does."""
    run_program("mount", *arguments, str(root))
    # A lazy unmount removes a mount in use from this namespace now, and frees it when its last user ends.
    stack.callback(run_program, "umount", "--lazy", str(root))


def serve_fuse(stack: ExitStack, root: Path, *command: str) -> None:
    """Run a FUSE daemon on `root` until `stack` closes. Raises WorkFailed where it has not mounted `root` after ten seconds."""
    with tempfile.TemporaryFile() as log:
        ends_with_thread = (*UNMOVED, "setpriv", "--pdeathsig", "KILL")
        daemon = subprocess.Popen([*ends_with_thread, *command, root], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        stack.callback(daemon.wait)
        stack.callback(daemon.kill)
        deadline = time.monotonic() + FUSE_START_SECONDS
        while not os.path.ismount(root):
            if daemon.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise WorkFailed(f"{command[0]} did not mount {root}: {log.read().decode(errors='replace').strip()}")
            time.sleep(0.005)
    stack.callback(run_program, "umount", "--lazy", str(root))


def scratch_place(scratch_dir: str | None) -> Path:
    """Where scratch folders are made: cluster.scratch_dir, else TMPDIR, /tmp or /var/tmp. Raises ConfigError where this user may not write there."""
    try:
        place = Path(scratch_dir or tempfile.gettempdir())
        wrong = "" if os.access(place, os.W_OK | os.X_OK) else f"you may not write in {place}"
    except FileNotFoundError:
        wrong = f"you may write in none of TMPDIR ({os.environ.get('TMPDIR') or 'not set'}), /tmp and /var/tmp"
    if wrong:
        raise ConfigError(
            wrong, "set cluster.scratch_dir (or TMPDIR) to a folder on a local disk in which you may write"
        )
    return place


def private_path(scratch_dir: str | None = None) -> Path:
    """The path of this user's own folder on the node's disk, which outlives a process. scratch_dir and errors: as for `scratch_place`."""
    # In a user namespace this process is root; outside it, it is the user by whose number two users' folders differ.
    inside = os.getuid()
    ranges = (map(int, line.split()) for line in Path("/proc/self/uid_map").read_text().splitlines())
    outside = next((out + inside - first for first, out, count in ranges if first <= inside < first + count), inside)
    return scratch_place(scratch_dir) / f"postrain-{outside}"


def private_folder(scratch_dir: str | None = None) -> Path:
    """Make that folder, which nobody else may enter. Raises IntegrityError where somebody else could have written there."""
    own = private_path(scratch_dir)
    own.mkdir(mode=0o700, exist_ok=True)
    status = own.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise IntegrityError(
            f"{own} is not this user's alone", "Remove it: others could write there what this user trusts"
        )
    return own


@contextmanager
def scratch_folder(scratch_dir: Path | str | None, prefix: str) -> Iterator[Path]:
    """A new folder that only this process's user may enter. It is removed afterwards, with everything that a trial left in it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=scratch_place(str(scratch_dir or ""))))
    try:
        yield folder
    finally:
        remove_tree(folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder that a trial wrote, with `rm`: shutil.rmtree recurses, and a trial may nest folders deeper than Python's stack."""
    # Errors are ignored: files left in scratch only cost space, and must not hide how the trial ended.
    subprocess.run(["rm", "-rf", "--", str(folder)], stdin=subprocess.DEVNULL, capture_output=True)


def staging_place(uid: int) -> Path:
    """The first of TMPDIR, /tmp and /var/tmp in which this process may write and whose folders `uid` may enter.

    Raises ConfigError, which says what is wrong with each, if there is none.
    """
    wrong = []
    for place in dict.fromkeys(Path(each) for each in (os.environ.get("TMPDIR") or "/tmp", "/tmp", "/var/tmp")):
        closed = [each for each in (place, *place.parents) if uid != os.geteuid() and not _may_enter(each, uid)]
        if not os.access(place, os.W_OK | os.X_OK):
            wrong.append(f"you may not write in {place}")
        elif closed:
            wrong.append(f"user {uid}, as whom the trial runs, may not enter {closed[-1]}")
        else:
            return place
    raise ConfigError(
        f"a sandbox needs a folder for its binds: {', '.join(wrong)}",
        "Set TMPDIR to a folder on a local disk in which you may write (in cluster.setup for jobs), or as root: chmod 1777 /tmp",
    )


def _may_enter(folder: Path, uid: int) -> bool:
    try:
        status = folder.stat()
    except OSError:
        return False
    return bool(status.st_mode & (0o100 if status.st_uid == uid else 0o001))


class Staging:
    """A tmpfs in which the sources of binds appear under numbers, so that a process with another uid can bind them again.

    That uid must be able to enter every folder on the way, which it cannot always do for the sources themselves: see `staging_place`.
    """

    def __init__(self, uid: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="sandbox-", dir=staging_place(uid))
        self._targets = (Path(self._folder, str(number)) for number in itertools.count())
        run_program("mount", "-t", "tmpfs", "-o", "mode=0755,size=1m", "sandbox", self._folder)

    def bind(self, source: Path) -> str:
        """Bind a file or folder. Returns its path in the staging folder."""
        target = next(self._targets)
        if source.is_dir():
            target.mkdir()
        else:
            target.touch()
        run_program("mount", "--rbind", str(source), str(target))
        return str(target)

    def write(self, text: str) -> str:
        """Write a file that everybody may read. Returns its path in the staging folder."""
        target = next(self._targets)
        target.write_text(text)
        target.chmod(0o644)
        return str(target)

    def remove(self) -> None:
        """Unmount and remove the folder. A running sandbox keeps its own copy of the binds."""
        # A lazy unmount includes the binds below.
        run_program("umount", "--lazy", self._folder)
        os.rmdir(self._folder)


def _mount_namespace() -> str:
    return os.readlink("/proc/self/ns/mnt")
