"""The attacks of a curious trial, run inside its sandbox before anything else runs there.

A script, not a module: `sandbox.probe` binds this one file at `/probe.py` and starts it in exactly the sandbox that the
trial will get, with one JSON argument. It tries what a trial has no business doing and prints one JSON object:

    {"path vault": {"reached": false, "detail": "FileNotFoundError: ..."}, "remount /substrate": {...}, ...}

`reached` is what happened, not what was configured. The script imports only the standard library, and leaves nothing
behind where it gets through.
"""

import ctypes
import errno
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MS_REMOUNT, MS_BIND, MNT_DETACH, CLONE_NEWNS, CLONE_NEWUSER = 0x20, 0x1000, 0x2, 0x20000, 0x10000000
KEYCTL = {"x86_64": 250, "aarch64": 219}  # the system call's number
KEYCTL_READ, SESSION_KEYRING = 11, -3
# Where a node keeps the doors to whoever started us: the scheduler, its credentials, message bus, container engines.
SOCKETS = (
    *("/run/munge/munge.socket.2", "/var/run/munge/munge.socket.2", "/run/slurm", "/run/slurmd", "/var/spool/slurmd"),
    *("/var/spool/slurm", "/etc/slurm", "/etc/munge", "/run/dbus/system_bus_socket", "/run/docker.sock"),
    *("/run/containerd/containerd.sock", "/run/systemd/private", "/run/nscd/socket", "/run/user"),
)
# From the blocks that RFC 5737 and 3849 reserve for documentation: no host has them, but a default route covers them.
ADDRESSES = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def attempt(act: Callable[..., object], *arguments: object) -> dict[str, Any]:
    """Try `act`; reached unless the kernel refused. Other errors are ours and end the probe without a report."""
    try:
        detail = act(*arguments)
    except OSError as error:
        return {"reached": False, "detail": f"{type(error).__name__}: {error}"}
    return {"reached": True, "detail": str(detail)}


def found(things: object) -> dict[str, Any]:
    """A check that looks for things which should not be there."""
    return {"reached": bool(things), "detail": str(things or "none")}


def checked(result: int) -> int:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def write(path: str) -> str:
    """Make a file in a folder, and remove it; open a file to append nothing."""
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
    """A namespace of one's own would give every capability over it. In a child, so that the probe stays where it is."""
    child = os.fork()
    if child == 0:
        os._exit(ctypes.get_errno() if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0 else 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        raise OSError(code, os.strerror(code))
    return "a new user namespace"


def route(family: int, address: str) -> str:
    """Connecting a datagram socket asks for a route and sends nothing."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return f"a route from {probe.getsockname()[0]}"


def through_proc(paths: list[str]) -> list[str]:
    """What other processes' roots, environments and descriptors show of the forbidden paths."""
    doors = [f"/proc/{pid}/root" for pid in os.listdir("/proc") if pid.isdigit()]
    return [door + path for door in doors for path in paths if os.path.lexists(door + path)]


def undeclared_variables(declared: list[str]) -> list[str]:
    """Names in any readable environment, that of pid 1 included: what the caller's shell knew shows up there."""
    names = set(os.environ)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            entries = Path("/proc", pid, "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        names |= {os.fsdecode(entry.partition(b"=")[0]) for entry in entries if entry}
    return sorted(names - set(declared))


def open_descriptors() -> list[str]:
    """Descriptors beyond the standard three, less the one that lists them."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links += [os.readlink(f"/proc/self/fd/{number}")] if int(number) > 2 else []
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
    return links


def capabilities() -> list[str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    held = [line for line in lines if line.startswith(("CapPrm", "CapEff", "CapAmb")) and int(line.split()[1], 16)]
    return held + [line for line in lines if line.startswith("NoNewPrivs") and line.split()[1] != "1"]


def session_keys(libc: ctypes.CDLL) -> str:
    """Keys in the session's keyring: the caller's tickets, where it came along."""
    number = KEYCTL.get(os.uname().machine)
    size = libc.syscall(number, KEYCTL_READ, SESSION_KEYRING, None, 0) if number else 0
    return f"{size // 4} keys" if size > 0 else ""


def look_around(asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every check, by name."""
    libc = ctypes.CDLL(None, use_errno=True)
    report = {f"path {name}": attempt(os.lstat, path) for name, path in asked["forbidden"].items()}
    report["paths through /proc"] = found(through_proc(list(asked["forbidden"].values())))
    for path in asked["read_only"]:
        report[f"write {path}"] = attempt(write, path)
        report[f"remount {path}"] = attempt(remount, libc, path)
        report[f"unmount {path}"] = attempt(unmount, libc, path)
    report["user namespace"] = attempt(new_user_namespace, libc)
    report["capabilities"] = found(capabilities())
    for kind, outside in asked["namespaces"].items():
        report[f"namespace {kind}"] = found(outside if os.readlink(f"/proc/self/ns/{kind}") == outside else "")
    if asked["network"] == "loopback":
        report["interfaces"] = found([name for _, name in socket.if_nameindex() if name != "lo"])
        for family, address in ADDRESSES:
            report[f"route to {address}"] = attempt(route, family, address)
    report["sockets"] = found([path for path in SOCKETS if os.path.lexists(path)])
    report["environment"] = found(undeclared_variables(asked["environment"]))
    report["keys"] = found(session_keys(libc))
    report["descriptors"] = found(open_descriptors())
    return report


if __name__ == "__main__":
    print(json.dumps(look_around(json.loads(sys.argv[1]))))
