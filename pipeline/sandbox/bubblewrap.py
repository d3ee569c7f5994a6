"""Run a command confined: it sees the runtime and the paths that it was given, and nothing else of the machine.

The worker enters a private mount namespace first (namespace.py). There, bubblewrap builds a new root of listed binds and starts the command
in it. The sources of the binds are first bound under a staging folder that everybody may enter. Root of the machine can therefore drop
to an unprivileged uid *before* bubblewrap starts (limits on processes do not bind root, and root's files stay unreadable) and still
give the trial a runtime that lies below /root. An ordinary user does the same in a user namespace.

The sandbox protects against these acts. An attack tests each of them (`make attacks` prints them), and `probe` repeats most before every trial:

- reading files outside the list, by path or through /proc
- writing, remounting or unmounting what is bound read-only
- gaining capabilities, running set-uid programs, making user namespaces
- reaching other processes by signals, ptrace, /proc, System V or shared memory
- reaching the network, the host's loopback or its abstract sockets (network level `loopback`)
- reading the caller's environment, descriptors, terminal or keyring
- opening a device that it was not given, such as the GPU of another job of the node
- exceeding the number of processes, the size of a file, of /tmp or of /dev/shm; disk_usage.py polls the total that is written
- leaving processes behind when the command has ended

It does not protect against these:

- bugs of the kernel (no system call is filtered) and of device drivers
- use of total memory and CPU time, which the scheduler's cgroup bounds (without one, the kernel kills the trial first)
- use of disk space between two polls, and by files without a name
- timing and other side channels
- reading the *names* of bound paths in /proc/self/mountinfo, and kernel-wide facts in /proc
- AF_VSOCK, which no namespace divides

Network level `fabric` shares the host's network, so loopback services, abstract sockets and all other hosts can be reached. Only trials of
several nodes should have it. A trial's files prove nothing; `open_output` reads them without following a link.
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
from pipeline.sandbox.disk_usage import DiskUsage
from pipeline.sandbox.namespace import Staging, enter_private_namespace, require_private_namespace, trial_uid
from pipeline.sandbox.process import Confined, launch

# The list has two names of namespace.py, because every caller that starts a sandbox needs them.
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
    """What a sandbox may use. `num_processes` counts threads too. The limits of time and disk take effect when the caller polls or waits."""

    wall_seconds: float = 24 * 3600.0
    num_processes: int = 4096
    file_size_bytes: int = 256 * 2**30
    address_space_bytes: int | None = None
    tmp_size_bytes: int = 4 * 2**30
    shm_size_bytes: int = 4 * 2**30
    disk_size_bytes: int | None = (
        None  # of everything that it writes; None allows half of the space that is free at the start
    )
    num_files: int = 1_000_000
    log_size_bytes: int = 2**28


@dataclass(frozen=True)
class Sandbox:
    """What a confined command sees. `read_only` and `read_write` map a path inside to the path outside.

    `env` is added to PATH, HOME, TMPDIR and LANG; no variable is inherited. `devices` are nodes or folders below /dev. At network level
    `fabric` the trial must use the addresses of other hosts, because its /etc/hosts has no names for them.
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
        """Start `command` and append its output to `log_path`. Call this from the main thread, because the sandbox dies with its thread.

        Where the trial gets another uid, that uid becomes the owner of the `read_write` folders.

        Raises ConfigError outside a private namespace and for a bind that cannot work, NotFound without bubblewrap, and WorkFailed where
        the sandbox does not start.
        """
        require_private_namespace()
        self._check()
        limits = [f"--nproc={self.limits.num_processes}", f"--fsize={self.limits.file_size_bytes}", "--core=0"]
        if self.limits.address_space_bytes is not None:
            limits.append(f"--as={self.limits.address_space_bytes}")
        bounds = (self.limits.disk_size_bytes, self.limits.num_files, self.limits.log_size_bytes)
        disk_usage = DiskUsage(list(self.read_write.values()), log_path, *bounds)
        identity: dict[str, Any] = {}
        if self.uid != os.geteuid():
            identity = {"user": self.uid, "group": self.uid, "extra_groups": []}
            for folder in self.read_write.values():
                os.chown(folder, self.uid, self.uid)
        staging = Staging(self.uid)
        try:
            # The limits are set inside, where processes are counted per sandbox and no process may raise them again. choom makes
            # the kernel kill the trial, before the worker or another job, when memory runs out.
            inner = ["--", "/usr/bin/choom", "-n", "1000", "--", "/usr/bin/prlimit", *limits, "--", *command]
            process, init = launch([*self._arguments(staging), *inner], log_path, identity)
        except BaseException:
            staging.remove()
            raise
        return Confined(process, init, staging, time.monotonic() + self.limits.wall_seconds, disk_usage)

    def environment(self) -> dict[str, str]:
        """All variables that the command gets."""
        sockets = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if self.network == "loopback" else {}
        base = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
        return {**base, **sockets, **self.env}

    def _check(self) -> None:
        """Raises ConfigError for an unknown network level and for a bind that cannot work."""
        if self.network not in NETWORKS:
            raise ConfigError(f"There is no network level {self.network!r}", f"Use one of {', '.join(NETWORKS)}")
        for inside, source in {**self.read_only, **self.read_write}.items():
            if not inside.startswith("/") or inside == "/" or source.resolve() == Path("/") or not source.exists():
                raise ConfigError(
                    f"The sandbox cannot bind {source} at {inside!r}",
                    "Bind a path that exists at an absolute path, and never the whole root",
                )
        for source in self.read_only.values() if self.uid != os.geteuid() else ():
            status = source.stat()
            needed = 0o005 if stat.S_ISDIR(status.st_mode) else 0o004
            if status.st_uid != self.uid and status.st_mode & needed != needed:
                raise ConfigError(f"The trial's uid {self.uid} may not read {source}", f"Run chmod o+rX {source}")

    def _arguments(self, staging: Staging) -> list[str]:
        """bubblewrap's arguments. It acts on them in order, so a later mount covers an earlier one."""
        arguments = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL", "--new-session"]
        arguments += ["--die-with-parent", "--uid", str(INSIDE_ID), "--gid", str(INSIDE_ID), "--hostname", "trial"]
        arguments += ["--share-net"] if self.network == "fabric" else []
        arguments += ["--proc", "/proc", "--dev", "/dev", "--size", str(self.limits.tmp_size_bytes), "--tmpfs", "/tmp"]
        arguments += ["--size", str(self.limits.shm_size_bytes), "--tmpfs", "/dev/shm"]
        for path in _runtime():
            # /lib is a link to usr/lib, which exists inside too. The target of a link to a virtual environment does not.
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
        # bubblewrap's own root and /dev are tmpfs without a size limit, and the trial would own them if they were writable.
        arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", self.cwd, "--clearenv"]
        for name, value in self.environment().items():
            arguments += ["--setenv", name, value]
        return arguments


def probe(
    sandbox: Sandbox, forbidden: Mapping[str, Path], article: str, report_path: Path, sockets: Sequence[str] = ()
) -> dict[str, Any]:
    """Attack `sandbox` from inside (probe_script.py) and return the result of each check. The report is also written to `report_path`.

    `forbidden` maps a name to a path that must not exist inside: vault, ledger, answers, constitution, sibling attempts. `sockets`: paths
    inside of the Unix sockets that it was given.

    Raises Refused, which names `article`, where a check got through, and WorkFailed where the sandbox or the probe did not work.
    """
    kinds = [kind for kind in NAMESPACES if kind != "net" or sandbox.network == "loopback"]
    task = {
        "forbidden": {name: str(path) for name, path in forbidden.items()},
        "read_only": ["/", *(path for path in _runtime() if not os.path.islink(path)), *sandbox.read_only],
        "environment": [*sandbox.environment(), "PWD"],
        "network": sandbox.network,
        "devices": list(sandbox.devices),
        "sockets": list(sockets),
        "runtime": _runtime(),
        "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in kinds},
    }
    script = Path(__file__).with_name("probe_script.py")
    limits = replace(sandbox.limits, wall_seconds=PROBE_SECONDS)
    attacked = replace(sandbox, read_only={**sandbox.read_only, "/probe.py": script}, limits=limits)
    report_path.unlink(missing_ok=True)
    with attacked.start([sys.executable, "-I", "/probe.py", json.dumps(task)], report_path) as process:
        code = process.wait()
    try:
        report = strict_json.read(report_path.read_bytes())
    except strict_json.BadJson as error:
        raise WorkFailed(
            f"The probe exited with code {code} and wrote no report: {report_path.read_text()[-2000:]}"
        ) from error
    leaks = [f"{name} ({check['detail']})" for name, check in report.items() if check["reached"]]
    if leaks:
        raise Refused(
            article, "isolation", f"the sandbox leaks: {'; '.join(leaks)}", f"All checks are in {report_path}"
        )
    return report


def open_output(folder: Path, name: str) -> IO[bytes]:
    """Open the regular file `name` below a folder that a trial wrote, without following a link or waiting for a fifo.

    Raises NotFound where there is no such file, and TrialFailed (`bad_output`) where the path is not a regular file.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for part in Path(name).parts:
        try:
            below = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
        except FileNotFoundError as error:
            raise NotFound(f"The trial left no file {name} in {folder}") from error
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
    """The paths of Python, its packages and the system's libraries, which are the same inside and outside."""
    python = [path for path in dict.fromkeys((sys.base_prefix, sys.prefix)) if not path.startswith("/usr")]
    return [path for path in SYSTEM if os.path.lexists(path)] + python
