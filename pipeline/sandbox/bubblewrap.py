"""Run a command confined: it sees the runtime and the paths it was given, and nothing else of the machine.

From the worker's private mount namespace (namespace.py), bubblewrap builds a new root of listed binds and starts the
command in it. Their sources are first bound under a staging folder that everybody may enter. So root of the machine
drops to an unprivileged uid *before* bubblewrap (limits on processes do not bind root, and root's files stay
unreadable) and still shows the trial a runtime below /root. An ordinary user takes the same way in a user namespace.

Covered, each by an attack (`make attacks` prints them) and most by `probe` before every trial: files outside the list, by
path or through /proc; writing, remounting or unmounting what is bound read-only; capabilities, set-uid programs and
user namespaces; other processes (signals, ptrace, /proc); System V and shared memory; the network with the host's own
loopback and abstract sockets (level `loopback`); the caller's environment, descriptors, terminal and keyring; the
number of processes, the size of a file, of /tmp and of /dev/shm, by looks now and then (spending.py) that of all it
writes; processes left behind by a command that has ended.

Not covered: bugs of the kernel (no system call is filtered) and of device drivers; total memory and CPU time, which the
scheduler's cgroup bounds (where none does, the kernel takes the trial first); disk space between two looks and of files
without a name; timing and other side channels; the *names* of bound paths in /proc/self/mountinfo and kernel-wide facts
in /proc; AF_VSOCK, which no namespace divides. Level `fabric` shares the host's network: loopback services, abstract
sockets and every other host are open then, so only trials of several nodes should have it. What a trial writes is its
own word: `open_output` reads it without following a link.
"""

import json
import os
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from pipeline.campaign import strict_json
from pipeline.campaign.errors import ConfigError, NotFound, Refused, TrialFailed, WorkFailed
from pipeline.sandbox.disk_usage import Spending
from pipeline.sandbox.namespace import Staging, enter_private_namespace, require_private_namespace, trial_uid
from pipeline.sandbox.process import Confined, launch

# With the two names of namespace.py that whoever starts a sandbox needs as well.
__all__ = ["Confined", "Limits", "Sandbox", "enter_private_namespace", "open_output", "probe", "trial_uid"]
INSIDE_ID = 1000  # the trial's uid and gid as the trial sees them
NETWORKS = ("loopback", "fabric")
NAMESPACES = ("user", "mnt", "pid", "ipc", "uts", "net")
PROBE_SECONDS = 60.0
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
ETC = {
    "/etc/passwd": f"trial:x:{INSIDE_ID}:{INSIDE_ID}:trial:/tmp:/bin/sh\n",
    "/etc/group": f"trial:x:{INSIDE_ID}:\n",
    "/etc/hosts": "127.0.0.1 localhost trial\n::1 localhost\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


@dataclass(frozen=True)
class Limits:
    """What a sandbox may use. `num_processes` counts threads too; the wall limit needs somebody to poll or wait."""

    wall_seconds: float = 24 * 3600.0
    num_processes: int = 4096
    file_size_bytes: int = 256 * 2**30
    address_space_bytes: int | None = None
    tmp_size_bytes: int = 4 * 2**30
    shm_size_bytes: int = 4 * 2**30
    disk_size_bytes: int | None = None  # of all that it writes; None: half of what is free when it starts
    num_files: int = 1_000_000
    log_size_bytes: int = 2**28


@dataclass(frozen=True)
class Sandbox:
    """What a confined command sees. `read_only` and `read_write` map a path inside to the path outside.

    `env` is added to PATH, HOME, TMPDIR and LANG; nothing is inherited. `devices` are nodes or folders below /dev.
    At network level `fabric` other hosts go by address: the trial's /etc/hosts knows none.
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

        Where that changes the uid, the folders of `read_write` are given to it.

        Raises ConfigError outside a private namespace and for a bind that cannot work, NotFound without bubblewrap,
        WorkFailed when it does not start.
        """
        require_private_namespace()
        self._check()
        limits = [f"--nproc={self.limits.num_processes}", f"--fsize={self.limits.file_size_bytes}", "--core=0"]
        if self.limits.address_space_bytes is not None:
            limits.append(f"--as={self.limits.address_space_bytes}")
        bounds = (self.limits.disk_size_bytes, self.limits.num_files, self.limits.log_size_bytes)
        spending = Spending(list(self.read_write.values()), log_path, *bounds)
        identity: dict[str, Any] = {}
        if self.uid != os.geteuid():
            identity = {"user": self.uid, "group": self.uid, "extra_groups": []}
            for folder in self.read_write.values():
                os.chown(folder, self.uid, self.uid)
        staging = Staging()
        try:
            # The limits are set inside, where processes are counted per sandbox and nobody may raise them again.
            # And where memory ends, the kernel takes the trial before the worker or a neighbour.
            inner = ["--", "/usr/bin/choom", "-n", "1000", "--", "/usr/bin/prlimit", *limits, "--", *command]
            process, init = launch([*self._arguments(staging), *inner], log_path, identity)
        except BaseException:
            staging.remove()
            raise
        return Confined(process, init, staging, time.monotonic() + self.limits.wall_seconds, spending)

    def environment(self) -> dict[str, str]:
        """All the variables that the command gets."""
        sockets = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if self.network == "loopback" else {}
        base = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
        return {**base, **sockets, **self.env}

    def _check(self) -> None:
        if self.network not in NETWORKS:
            raise ConfigError(f"no network level {self.network!r}", f"valid: {', '.join(NETWORKS)}")
        for inside, source in {**self.read_only, **self.read_write}.items():
            if not inside.startswith("/") or inside == "/" or source.resolve() == Path("/") or not source.exists():
                raise ConfigError(f"cannot bind {source} at {inside!r}", "bind what exists, and never the whole root")
        for source in self.read_only.values() if self.uid != os.geteuid() else ():
            status = source.stat()
            needed = 0o005 if stat.S_ISDIR(status.st_mode) else 0o004
            if status.st_uid != self.uid and status.st_mode & needed != needed:
                raise ConfigError(f"uid {self.uid} may not read {source}", f"chmod o+rX {source}")

    def _arguments(self, staging: Staging) -> list[str]:
        """bubblewrap's arguments, in the order in which it acts on them: a later mount covers an earlier one."""
        arguments = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL", "--new-session"]
        arguments += ["--die-with-parent", "--uid", str(INSIDE_ID), "--gid", str(INSIDE_ID), "--hostname", "trial"]
        arguments += ["--share-net"] if self.network == "fabric" else []
        arguments += ["--proc", "/proc", "--dev", "/dev", "--size", str(self.limits.tmp_size_bytes), "--tmpfs", "/tmp"]
        arguments += ["--size", str(self.limits.shm_size_bytes), "--tmpfs", "/dev/shm"]
        for path in _runtime():
            # /lib is a link to usr/lib, which is there too; a link to a virtual environment is to a place that is not.
            if os.path.islink(path) and path in SYSTEM:
                arguments += ["--symlink", os.readlink(path), path]
            else:
                arguments += ["--ro-bind", staging.bind(Path(path)), path]
        for path, text in ETC.items():
            arguments += ["--ro-bind", staging.write(text), path]
        for path in self.devices:
            arguments += ["--dev-bind", staging.bind(Path(path)), path]
        for inside, source in sorted({**self.read_only, **self.read_write}.items()):
            arguments += ["--bind" if inside in self.read_write else "--ro-bind", staging.bind(source), inside]
        # bubblewrap's own root and /dev are tmpfs without a size, and the trial would own them.
        arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", self.cwd, "--clearenv"]
        for name, value in self.environment().items():
            arguments += ["--setenv", name, value]
        return arguments


def probe(sandbox: Sandbox, forbidden: Mapping[str, Path], article: str, report_path: Path) -> dict[str, Any]:
    """Attack from inside `sandbox` (see probe.py) and return what each check reached; the report is `report_path`.

    `forbidden` names paths that must not exist inside: vault, ledger, answers, constitution, sibling attempts.

    Raises Refused naming `article` when anything leaked, WorkFailed when the sandbox or the probe did not work.
    """
    kinds = [kind for kind in NAMESPACES if kind != "net" or sandbox.network == "loopback"]
    asked = {
        "forbidden": {name: str(path) for name, path in forbidden.items()},
        "read_only": ["/", *(path for path in _runtime() if not os.path.islink(path)), *sandbox.read_only],
        "environment": [*sandbox.environment(), "PWD"],
        "network": sandbox.network,
        "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in kinds},
    }
    script = Path(__file__).with_name("probe_script.py")
    limits = replace(sandbox.limits, wall_seconds=PROBE_SECONDS)
    attacked = replace(sandbox, read_only={**sandbox.read_only, "/probe.py": script}, limits=limits)
    report_path.unlink(missing_ok=True)
    with attacked.start([sys.executable, "-I", "/probe.py", json.dumps(asked)], report_path) as process:
        code = process.wait()
    try:
        report = strict_json.read(report_path.read_bytes())
    except strict_json.BadJson as error:
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


def _runtime() -> list[str]:
    """Python, its packages and the system's libraries, each at the path that it has outside."""
    python = [path for path in dict.fromkeys((sys.base_prefix, sys.prefix)) if not path.startswith("/usr")]
    return [path for path in SYSTEM if os.path.lexists(path)] + python
