"""The attacks that a trial could try, run inside its sandbox before anything else runs there.

This is a script and not a module of the package: `bubblewrap.probe` binds this file alone at `/probe.py` and starts it, with one JSON
argument, in the same sandbox that the trial will get. It tries everything that a trial must not be able to do, and prints one JSON object:

    {"path vault": {"reached": false, "detail": "FileNotFoundError: ..."}, "remount /substrate": {...}, ...}

`reached` states what happened, not what was configured. The script imports only the standard library, and undoes an attack that succeeds.
"""

import ctypes
import errno
import json
import os
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MS_REMOUNT, MS_BIND, MNT_DETACH, CLONE_NEWNS, CLONE_NEWUSER = 0x20, 0x1000, 0x2, 0x20000, 0x10000000
KEYCTL = {"x86_64": 250, "aarch64": 219}  # the system call's number
BASIC_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx")
GPU_MAJOR = 195
KEYCTL_READ, SESSION_KEYRING = 11, -3
# Paths through which a node's services can be reached: the scheduler and its credentials, the message bus, container engines.
SOCKETS = (
    *("/run/munge/munge.socket.2", "/var/run/munge/munge.socket.2", "/run/slurm", "/run/slurmd", "/var/spool/slurmd"),
    *("/var/spool/slurm", "/etc/slurm", "/etc/munge", "/run/dbus/system_bus_socket", "/run/docker.sock"),
    *("/run/containerd/containerd.sock", "/run/systemd/private", "/run/nscd/socket", "/run/user"),
)
# These addresses are from blocks that RFC 5737 and 3849 reserve for documentation. No host has them, but a default route covers them.
ADDRESSES = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def attempt(act: Callable[..., object], *arguments: object) -> dict[str, Any]:
    """Try `act`. It counts as reached unless the kernel refuses it. Any other error is a fault of the probe, which then ends without a report."""
    try:
        detail = act(*arguments)
    except OSError as error:
        return {"reached": False, "detail": f"{type(error).__name__}: {error}"}
    return {"reached": True, "detail": str(detail)}


def must_be_empty(things: object) -> dict[str, Any]:
    """The result of a check that lists things which must not exist."""
    return {"reached": bool(things), "detail": str(things or "none")}


def checked(result: int) -> int:
    """Return the result of a C function. Raises OSError with its errno where it is not 0."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def write(path: str) -> str:
    """Create and remove a file in a folder, or open a file for appending without writing to it."""
    if not os.path.isdir(path):
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
        return "may be written"
    made = os.path.join(path, ".probe")
    os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.unlink(made)
    return "a file was made and removed"


def remount(libc: ctypes.CDLL, path: str) -> str:
    checked(libc.mount(None, path.encode(), None, MS_REMOUNT | MS_BIND, None))
    return "remounted writable"


def unmount(libc: ctypes.CDLL, path: str) -> str:
    checked(libc.umount2(path.encode(), MNT_DETACH))
    return "unmounted"


def new_user_namespace(libc: ctypes.CDLL) -> str:
    """Make a user namespace, in which a process would have every capability. A child does it, so that the probe stays in its own."""
    child = os.fork()
    if child == 0:
        os._exit(ctypes.get_errno() if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0 else 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        raise OSError(code, os.strerror(code))
    return "a new user namespace"


def route(family: int, address: str) -> str:
    """Look for a route by connecting a datagram socket, which sends nothing."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return f"a route from {probe.getsockname()[0]}"


def through_proc(paths: list[str]) -> list[str]:
    """The forbidden paths that can be reached through the roots of other processes."""
    roots = [f"/proc/{pid}/root" for pid in os.listdir("/proc") if pid.isdigit()]
    return [root + path for root in roots for path in paths if os.path.lexists(root + path)]


def undeclared_variables(declared: list[str]) -> list[str]:
    """The names of undeclared variables in any readable environment. The caller's variables would show up in that of pid 1."""
    names = set(os.environ)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            entries = Path("/proc", pid, "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        names |= {os.fsdecode(entry.partition(b"=")[0]) for entry in entries if entry}
    return sorted(names - set(declared))


def open_descriptors() -> list[str]:
    """The open descriptors beyond the standard three, without the one that lists them."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links += [os.readlink(f"/proc/self/fd/{number}")] if int(number) > 2 else []
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
    return links


def capabilities() -> list[str]:
    """The lines of /proc/self/status that show a capability, or that new ones could be gained."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = [line for line in lines if line.startswith(("CapPrm", "CapEff", "CapAmb")) and int(line.split()[1], 16)]
    return held + [line for line in lines if line.startswith("NoNewPrivs") and line.split()[1] != "1"]


def session_keys(libc: ctypes.CDLL) -> str:
    """The number of keys in the session's keyring, such as the caller's tickets; an empty string without any."""
    number = KEYCTL.get(os.uname().machine)
    size = libc.syscall(number, KEYCTL_READ, SESSION_KEYRING, None, 0) if number else 0
    return f"{size // 4} keys" if size > 0 else ""


def other_devices(given: list[str]) -> list[str]:
    """The device nodes below /dev that the trial was not given, and that are none of those which every sandbox has."""
    known = {*given, *(f"/dev/{name}" for name in BASIC_DEVICES)}
    found = [os.path.join(folder, name) for folder, _, names in os.walk("/dev") for name in names]
    kinds = {path: os.stat(path, follow_symlinks=False).st_mode for path in found}
    nodes = [path for path, mode in kinds.items() if stat.S_ISCHR(mode) or stat.S_ISBLK(mode)]
    return sorted(path for path in nodes if path not in known and not path.startswith("/dev/pts/"))


def unix_sockets(given: list[str], runtime: list[str]) -> list[str]:
    """The socket files that were not given. The folders of the runtime are left out: they are large, and bound read-only."""
    left_out = {*runtime, "/proc", "/sys", "/dev/pts"}
    found = []
    for folder, folders, names in os.walk("/"):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in left_out]
        for name in names:
            path = os.path.join(folder, name)
            try:
                is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
            except OSError:
                continue
            if is_socket and path not in given:
                found.append(path)
    return sorted(found)


def make_device(path: str) -> str:
    """Make a device node, here one of the GPU with the number 0: it would open a GPU that was not given."""
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(GPU_MAJOR, 0))
    os.unlink(path)
    return "a device node was made and removed"


def run_checks(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run every check. Returns a map from its name to its result."""
    libc = ctypes.CDLL(None, use_errno=True)
    report = {f"path {name}": attempt(os.lstat, path) for name, path in task["forbidden"].items()}
    report["paths through /proc"] = must_be_empty(through_proc(list(task["forbidden"].values())))
    for path in task["read_only"]:
        report[f"write {path}"] = attempt(write, path)
        report[f"remount {path}"] = attempt(remount, libc, path)
        report[f"unmount {path}"] = attempt(unmount, libc, path)
    report["user namespace"] = attempt(new_user_namespace, libc)
    report["capabilities"] = must_be_empty(capabilities())
    for kind, outside in task["namespaces"].items():
        report[f"namespace {kind}"] = must_be_empty(outside if os.readlink(f"/proc/self/ns/{kind}") == outside else "")
    if task["network"] == "loopback":
        report["interfaces"] = must_be_empty([name for _, name in socket.if_nameindex() if name != "lo"])
        for family, address in ADDRESSES:
            report[f"route to {address}"] = attempt(route, family, address)
    report["devices"] = must_be_empty(other_devices(task["devices"]))
    report["make a device"] = attempt(make_device, "/tmp/.probe-device")
    report["sockets"] = must_be_empty([path for path in SOCKETS if os.path.lexists(path)])
    report["unix sockets"] = must_be_empty(unix_sockets(task["sockets"], task["runtime"]))
    report["environment"] = must_be_empty(undeclared_variables(task["environment"]))
    report["keys"] = must_be_empty(session_keys(libc))
    report["descriptors"] = must_be_empty(open_descriptors())
    return report


if __name__ == "__main__":
    print(json.dumps(run_checks(json.loads(sys.argv[1]))))
