"""Run a command confined: it sees the runtime and the paths it was given, and nothing else of the machine.

Two walls, each in namespaces that die with their processes, so that a SIGKILL of the worker leaves no mount behind:

    enter_private_namespace   the worker re-executes itself in a private mount namespace and mounts image and fork there
    Sandbox.start             bubblewrap builds a new root from listed binds and starts the command in it

The listed sources are first bound under a staging folder that everybody may enter. So root of the machine can drop to
an unprivileged uid *before* bubblewrap (limits on processes do not bind root, and root's files stay unreadable) and
still show the trial a runtime below /root. An ordinary user takes the same way inside a user namespace.

Covered, each by an attack in tests/test_sandbox.py and most by `probe` before every trial: files outside the list, by
path or through /proc; writing, remounting or unmounting what is bound read-only; capabilities, set-uid programs and new
user namespaces; other processes (signals, ptrace, /proc); shared memory and System V IPC; the network including the
host's loopback and abstract sockets (level `loopback`); the caller's environment and descriptors; the terminal; the
number of processes, the size of each file, of /tmp and /dev/shm; processes left behind by a command that has ended.

Not covered: bugs of the kernel (there is no system call filter) and of device drivers; total memory, CPU time and
total disk space (the scheduler's cgroup and the file system's quota are for that); timing and other side channels; the
*names* of bound paths in /proc/self/mountinfo; kernel-wide facts in /proc. Level `fabric` shares the host's network:
its loopback services, abstract sockets and every other host are open then, and only multi-node trials should have it.
What a trial writes to /out is its own word: read it with `read_output`, which follows no link.
"""

import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from pipeline.errors import ConfigError, NotFound, Refused, TrialFailed, WorkFailed

NOBODY = 65534
INSIDE_ID = 1000  # the trial's uid and gid as the trial sees them
NETWORKS = ("loopback", "fabric")
NAMESPACES = ("user", "mnt", "pid", "ipc", "uts", "net")
PROBE_SECONDS = 60.0
MARK = "PIPELINE_PRIVATE_NAMESPACE"

ETC = {
    "passwd": f"trial:x:{INSIDE_ID}:{INSIDE_ID}:trial:/tmp:/bin/sh\n",
    "group": f"trial:x:{INSIDE_ID}:\n",
    "hosts": "127.0.0.1 localhost trial\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


def enter_private_namespace(argv: Sequence[str]) -> None:
    """Replace this process by `argv` in a private mount namespace; return at once where it is already in one.

    The process keeps its pid, so the scheduler's signals still find it. An ordinary user is root of a user namespace
    from then on (`os.getuid() == 0`): commands that tell a daemon who is calling, such as sbatch, must run outside.

    Raises NotFound without util-linux. Where user namespaces are switched off, unshare itself says so and exits.
    """
    here = os.readlink("/proc/self/ns/mnt")
    # The mark names this pid, so that one inherited by a later process means nothing.
    pid, _, outside = os.environ.get(MARK, "").partition(" ")
    if pid == str(os.getpid()) and outside != here:
        return
    _require_program("unshare")
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    env = {**os.environ, MARK: f"{os.getpid()} {here}"}
    os.execvpe("unshare", ["unshare", *as_user, "--mount", "--propagation", "private", "--", *argv], env)


def trial_uid() -> int:
    """The uid that confined processes get: nobody where this process may become it, else this process's own."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if os.geteuid() == 0 and first <= NOBODY < first + count:
            return NOBODY
    return os.geteuid()


@dataclass(frozen=True)
class Limits:
    """What a sandbox may use. `num_processes` counts threads too; the wall limit holds while somebody polls or waits."""

    wall_seconds: float = 24 * 3600.0
    num_processes: int = 4096
    file_size_bytes: int = 256 * 2**30
    address_space_bytes: int | None = None
    tmp_size_bytes: int = 4 * 2**30
    shm_size_bytes: int = 4 * 2**30


@dataclass(frozen=True)
class Sandbox:
    """What a confined command sees. `read_only` and `read_write` map a path inside to the path outside.

    `env` is added to PATH, HOME, TMPDIR and LANG; nothing is inherited. `devices` are nodes or folders of /dev.
    """

    read_only: Mapping[str, Path] = field(default_factory=dict)
    read_write: Mapping[str, Path] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/tmp"
    network: str = "loopback"
    devices: tuple[str, ...] = ()
    limits: Limits = Limits()
    uid: int = field(default_factory=trial_uid)

    def start(self, command: Sequence[str], log_path: Path) -> "Confined":
        """Start `command`, its output appended to `log_path`. Call from the main thread: the sandbox dies with it.

        Where uid changes, the folders of `read_write` are given to it.

        Raises ConfigError for a bind that cannot work, NotFound without bubblewrap, WorkFailed when it does not start.
        """
        _require_program("bwrap")
        self._check()
        limits = [f"--nproc={self.limits.num_processes}", f"--fsize={self.limits.file_size_bytes}", "--core=0"]
        if self.limits.address_space_bytes is not None:
            limits.append(f"--as={self.limits.address_space_bytes}")
        identity: dict[str, Any] = {}
        if self.uid != os.geteuid():
            identity = {"user": self.uid, "group": self.uid, "extra_groups": []}
            for folder in self.read_write.values():
                os.chown(folder, self.uid, self.uid)
        staging = _Staging()
        try:
            # The limits are set inside, where processes are counted per sandbox and nobody may raise them again.
            argv = ["bwrap", *self._arguments(staging), "--", "/usr/bin/prlimit", *limits, "--", *command]
            process, init = _launch(argv, log_path, identity)
        except BaseException:
            staging.remove()
            raise
        return Confined(process, init, staging, time.monotonic() + self.limits.wall_seconds)

    def _check(self) -> None:
        if self.network not in NETWORKS:
            raise ConfigError(f"no network level {self.network!r}", f"valid: {', '.join(NETWORKS)}")
        for inside, source in {**self.read_only, **self.read_write}.items():
            if not inside.startswith("/") or inside == "/" or source.resolve() == Path("/"):
                raise ConfigError(f"cannot bind {source} at {inside!r}", "bind a file or folder, never the whole root")
            if not source.exists():
                raise ConfigError(f"{source}, to be seen at {inside}, does not exist")
        if self.uid != os.geteuid():
            for inside, source in self.read_only.items():
                status = source.stat()
                needed = 0o005 if stat.S_ISDIR(status.st_mode) else 0o004
                if status.st_uid != self.uid and status.st_mode & needed != needed:
                    raise ConfigError(f"uid {self.uid} cannot read {source}, seen at {inside}", f"chmod o+rX {source}")

    def _arguments(self, staging: "_Staging") -> list[str]:
        """bubblewrap's arguments, in the order in which it acts on them: a later mount covers an earlier one."""
        arguments = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL", "--new-session"]
        arguments += ["--die-with-parent", "--uid", str(INSIDE_ID), "--gid", str(INSIDE_ID), "--hostname", "trial"]
        arguments += ["--share-net"] if self.network == "fabric" else []
        arguments += ["--proc", "/proc", "--dev", "/dev", "--size", str(self.limits.tmp_size_bytes), "--tmpfs", "/tmp"]
        arguments += ["--size", str(self.limits.shm_size_bytes), "--tmpfs", "/dev/shm"]
        for path in _runtime():
            link = ["--symlink", os.readlink(path), path] if os.path.islink(path) else []
            arguments += link or ["--ro-bind", staging.bind(Path(path)), path]
        for name, text in ETC.items():
            arguments += ["--ro-bind", staging.write(text), f"/etc/{name}"]
        for device in self.devices:
            arguments += ["--dev-bind", staging.bind(Path(device)), device]
        binds = {**dict.fromkeys(self.read_only, "--ro-bind"), **dict.fromkeys(self.read_write, "--bind")}
        for inside, source in sorted({**self.read_only, **self.read_write}.items()):
            arguments += [binds[inside], staging.bind(source), inside]
        # bubblewrap's own root and /dev are tmpfs without a size, and the trial would own them.
        arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", self.cwd, "--clearenv"]
        for name, value in self._environment().items():
            arguments += ["--setenv", name, value]
        return arguments

    def _environment(self) -> dict[str, str]:
        path = f"{sys.prefix}/bin:/usr/bin:/bin"
        sockets = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if self.network == "loopback" else {}
        return {"PATH": path, "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", **sockets, **self.env}


class Confined:
    """A running sandbox. `poll` and `wait` enforce its wall limit; leaving a `with` block kills what still runs.

    `returncode` is the command's, 128 + n when signal n ended it; `timed_out` tells that the wall limit did.
    """

    def __init__(self, process: subprocess.Popen[bytes], init: int, staging: "_Staging", deadline: float) -> None:
        self.returncode: int | None = None
        self.timed_out = False
        self._process = process
        self._init = init  # a pidfd of the sandbox's pid 1: readable when that, and so every process inside, is gone
        self._staging = staging
        self._deadline = deadline

    def poll(self) -> int | None:
        """The exit code, or None while anything inside still runs."""
        if self.returncode is None:
            if self._is_over(0):
                self._finish()
            elif time.monotonic() > self._deadline:
                self.timed_out = True
                self.kill()
        return self.returncode

    def wait(self) -> int:
        """Wait for the end, or kill at the wall limit."""
        while self.returncode is None:
            self._is_over(max(0.0, self._deadline - time.monotonic()))
            self.poll()
        return self.returncode

    def kill(self) -> None:
        """Kill every process inside and return when none is left."""
        if self.returncode is None:
            try:
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended by itself just now
            self._finish()

    def __enter__(self) -> "Confined":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _is_over(self, seconds: float | None) -> bool:
        return bool(select.select([self._init], [], [], seconds)[0])

    def _finish(self) -> None:
        # bubblewrap returns when the command does; what the command left behind dies with pid 1 a moment later.
        self._is_over(None)
        os.close(self._init)
        self.returncode = self._process.wait()
        self._staging.remove()


def probe(sandbox: Sandbox, forbidden: Mapping[str, Path], article: str, report_path: Path) -> dict[str, dict[str, Any]]:
    """Attack from inside `sandbox` (see probe.py) and return what each check reached; the report stays at `report_path`.

    `forbidden` names paths that must not exist inside: vault, ledger, answers, constitution, sibling attempts.

    Raises Refused naming `article` when anything leaked, WorkFailed when the sandbox or the probe did not work.
    """
    script = Path(__file__).with_name("probe.py")
    asked = {
        "forbidden": {name: str(path) for name, path in forbidden.items()},
        "read_only": ["/", *_runtime(), *sandbox.read_only],
        "environment": [*sandbox._environment(), "PWD"],
        "network": sandbox.network,
        "namespaces": {
            kind: os.readlink(f"/proc/self/ns/{kind}")
            for kind in NAMESPACES
            if kind != "net" or sandbox.network == "loopback"
        },
    }
    confined = replace(
        sandbox,
        read_only={**sandbox.read_only, "/probe.py": script},
        limits=replace(sandbox.limits, wall_seconds=PROBE_SECONDS),
    )
    report_path.unlink(missing_ok=True)
    with confined.start([sys.executable, "-I", "/probe.py", json.dumps(asked)], report_path) as process:
        code = process.wait()
    try:
        report = json.loads(report_path.read_text())
    except ValueError as error:
        raise WorkFailed(f"the probe ended with {code} and no report: {report_path.read_text()[-2000:]}") from error
    leaks = [f"{name} ({check['detail']})" for name, check in report.items() if check["reached"]]
    if leaks:
        raise Refused(article, "isolation", f"the sandbox leaks: {'; '.join(leaks)}", f"all checks: {report_path}")
    return report


def open_output(folder: Path, name: str) -> IO[bytes]:
    """Open the regular file `name` below a folder that a trial wrote, without following a link or waiting for a fifo.

    Raises NotFound when it is not there, TrialFailed (`bad_output`) when it is anything else.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for part in Path(name).parts:
        try:
            below = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
        except FileNotFoundError as error:
            raise NotFound(f"no {name} in {folder}") from error
        except OSError as error:
            raise TrialFailed("bad_output", f"{name} in {folder} is not a plain file: {error}") from error
        finally:
            os.close(descriptor)
        descriptor = below
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TrialFailed("bad_output", f"{name} in {folder} is not a plain file")
    return open(descriptor, "rb")


class _Staging:
    """A tmpfs that everybody may enter, where the sources of binds appear under numbers.

    In /tmp and not in TMPDIR, because the trial's uid must be able to walk to it.
    """

    def __init__(self) -> None:
        self.root = tempfile.mkdtemp(prefix="sandbox-", dir="/tmp")
        self._count = 0
        _mount("-t", "tmpfs", "-o", "mode=0755,size=1m", "sandbox", self.root)

    def bind(self, source: Path) -> str:
        target = self._next()
        if source.is_dir():
            os.mkdir(target)
        else:
            Path(target).touch()
        _mount("--rbind", str(source), target)
        return target

    def write(self, text: str) -> str:
        target = self._next()
        Path(target).write_text(text)
        os.chmod(target, 0o644)
        return target

    def remove(self) -> None:
        # Lazy, to take the binds along; a running sandbox has its own copy of them.
        subprocess.run(["umount", "--lazy", self.root], check=True)
        os.rmdir(self.root)

    def _next(self) -> str:
        self._count += 1
        return f"{self.root}/{self._count}"


def _launch(argv: list[str], log_path: Path, identity: Mapping[str, Any]) -> tuple[subprocess.Popen[bytes], int]:
    """Start bubblewrap and return it with a pidfd of the sandbox's pid 1."""
    reader, writer = os.pipe()
    with open(reader, "rb") as told, open(log_path, "ab") as log:
        try:
            # An empty environment: what bubblewrap is started with stays readable inside, in /proc/1/environ.
            process = subprocess.Popen(
                [argv[0], "--info-fd", str(writer), *argv[1:]],
                executable=shutil.which(argv[0]), env={}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(writer,), **identity,
            )  # fmt: skip
        finally:
            os.close(writer)
        try:
            return process, os.pidfd_open(json.loads(told.read())["child-pid"])
        except (ValueError, ProcessLookupError) as error:
            process.wait()
            raise WorkFailed(f"the sandbox did not start: {log_path.read_text()[-2000:]}") from error


def _runtime() -> list[str]:
    """Python, its packages and the system's libraries, each once and at the path it has outside."""
    system = [path for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache") if os.path.exists(path)]
    python = [path for path in dict.fromkeys((sys.base_prefix, sys.prefix)) if not path.startswith("/usr")]
    return ["/usr", *system, *python]


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise WorkFailed(f"mount {' '.join(arguments)}: {done.stderr.strip()}", "enter_private_namespace first")


def _require_program(name: str) -> None:
    if shutil.which(name) is None:
        raise NotFound(f"no program {name}", "install bubblewrap 0.8 or newer and util-linux")
