"""The attacks of a hostile trial. They run inside the sandbox as `python -sE /task/inside.py ATTACK ARGUMENT...`.

Each function, here and in leavings.py, is one attack and returns what it got, which is nothing or something allowed if the sandbox holds.
The last line of output is the answer: JSON of what the attack got and of what refused it.
"""

import ctypes
import glob
import itertools
import json
import os
import pty
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import leavings
from acts import (
    CLONE_NEWNS,
    CLONE_NEWUSER,
    LIBC,
    MNT_DETACH,
    MS_BIND,
    MS_REMOUNT,
    PTRACE_ATTACH,
    REFUSED,
    Act,
    refused,
    run,
    successes,
)


def write_mount(*folders: str) -> list[str]:
    acts: list[Act] = []
    for folder in folders:
        files = (Path(below, name) for below, _, names in os.walk(folder) for name in names)
        first = next((path for path in files if not path.is_symlink()), Path(folder, "none"))
        acts += [
            (f"create in {folder}", Path(folder, "evil").write_text, ""),
            (f"link in {folder}", os.symlink, "/out", f"{folder}/evil-link"),
            (f"chmod {first}", first.chmod, 0o777),
            (f"open {first}", os.open, first, os.O_WRONLY),
            (f"truncate {first}", os.truncate, first, 0),
            (f"unlink {first}", os.unlink, first),
            (f"rename in {folder}", os.rename, f"{folder}/evil", f"{folder}/worse"),
        ]
    return successes(acts)


def remount(*folders: str) -> list[str]:
    acts: list[Act] = []
    for folder in folders:
        name = folder.encode()
        acts += [
            (f"remount {folder}", LIBC.mount, None, name, None, MS_REMOUNT | MS_BIND, None),
            (f"bind over {folder}", LIBC.mount, b"/tmp", name, None, MS_BIND, None),
            (f"tmpfs over {folder}", LIBC.mount, b"x", name, b"tmpfs", 0, None),
            (f"unmount {folder}", LIBC.umount2, name, MNT_DETACH),
            (f"mount(8) {folder}", run, "mount", "-o", "remount,rw", folder),
        ]
    acts += [
        ("user namespace", LIBC.unshare, CLONE_NEWUSER),
        ("mount namespace", LIBC.unshare, CLONE_NEWNS),
        ("unshare(1)", run, "unshare", "-Urm", "true"),
        ("namespace of pid 1", lambda: LIBC.setns(os.open("/proc/1/ns/mnt", os.O_RDONLY), 0)),
        ("mknod", os.mknod, "/tmp/disk", 0o060666, os.makedev(7, 0)),
        ("chroot", os.chroot, "/tmp"),
    ]
    return successes(acts)


def read(path: str) -> list[str]:
    """By name, through every process's root and working folder, by a link and by climbing out of /out."""
    Path("/out/link").unlink(missing_ok=True)
    os.symlink(path, "/out/link")
    ways = [path, "/out/link", "/out" + "/.." * 12 + path, "/proc/self/root" + path]
    ways += [way + path for pattern in ("root", "cwd") for way in glob.glob(f"/proc/[0-9]*/{pattern}")]
    # Through every descriptor we hold: a folder left open is a door to all that lies below and above it.
    ways += [f"/proc/self/fd/{number}/../../../../../../../..{path}" for number in range(64)]
    return successes([*((way, os.open, way, os.O_RDONLY) for way in ways), ("link", os.link, path, "/out/hard")])


def connect(port: str, abstract: str, unix_path: str, host_addresses: str) -> list[str]:
    """The host's listeners on its loopback, its other addresses, its abstract sockets, its socket files."""

    def dial(family: int, address: Any) -> None:
        with socket.socket(family) as caller:
            caller.settimeout(2)
            caller.connect(address)

    hosts = ["127.0.0.1", "192.0.2.1", *filter(None, host_addresses.split(","))]
    acts: list[Act] = [(host, dial, socket.AF_INET, (host, int(port))) for host in hosts]
    return successes(acts + [(f"unix {name}", dial, socket.AF_UNIX, name) for name in ("\0" + abstract, unix_path)])


def signal_process(pid: str) -> list[str]:
    target = int(pid)
    acts: list[Act] = [
        ("kill", os.kill, target, signal.SIGKILL),
        ("its group", os.killpg, target, signal.SIGKILL),
        ("pidfd", os.pidfd_open, target),
        ("limits", resource.prlimit, target, resource.RLIMIT_NOFILE, (8, 8)),
        ("priority", os.setpriority, os.PRIO_PROCESS, target, 19),
        ("affinity", os.sched_setaffinity, target, {0}),
    ]
    done = successes(acts)
    # Everybody of this uid, here and outside; the one who called asks whether it changed.
    os.setpriority(os.PRIO_USER, 0, 10)
    # Everybody it may signal, apart from itself and pid 1: nobody outside may be among them.
    with subprocess.Popen(["sleep", "60"]) as own:
        os.kill(-1, signal.SIGKILL)
        own.wait()
    return done


def trace(pid: str) -> list[str]:
    """Stop a process of the same uid, read its memory, its environment, its open files."""
    target = int(pid)
    local, remote = ctypes.create_string_buffer(8), (ctypes.c_void_p * 2)(0x400000, 8)
    here = (ctypes.c_void_p * 2)(ctypes.addressof(local), 8)
    return successes(
        [
            ("ptrace", LIBC.ptrace, PTRACE_ATTACH, target, None, None),
            ("process_vm_readv", LIBC.process_vm_readv, target, here, 1, remote, 1, 0),
            *((name, os.open, f"/proc/{target}/{name}", os.O_RDONLY) for name in ("mem", "environ", "maps", "fd/0")),
            ("pidfd_getfd", lambda: LIBC.syscall(438, os.pidfd_open(target), 0, 0)),
        ]
    )


def host_processes() -> dict[str, Any]:
    """The command lines that /proc shows, and the namespaces it would let one join."""
    lines = [Path(path).read_bytes().replace(b"\0", b" ").decode() for path in glob.glob("/proc/[0-9]*/cmdline")]
    return {"commands": lines, "pid_namespace": os.readlink("/proc/self/ns/pid")}


def environment() -> str:
    """Every environment that can be read, in one string."""
    text = [f"{name}={value}" for name, value in os.environ.items()]
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            text.append(Path(path).read_bytes().decode(errors="replace"))
        except OSError as error:
            text.append(str(error))
    return "\n".join(text)


def descriptors() -> list[str]:
    """Open descriptors beyond the standard three."""
    return [path for path in glob.glob("/proc/self/fd/*") if int(Path(path).name) > 2 and os.path.exists(path)]


def fork_bomb(ceiling: str) -> dict[str, int]:
    """Fork until refused, at most to `ceiling`."""
    children: list[int] = []
    reason = ""
    for _ in range(int(ceiling)):
        try:
            child = os.fork()
        except OSError as error:
            reason = refused(error)
            break
        if child == 0:
            time.sleep(60)
            os._exit(0)
        children.append(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return {"children": len(children), "refused_again": reason == "EAGAIN"}


def raise_limits() -> list[str]:
    most = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    kinds = {"processes": resource.RLIMIT_NPROC, "file size": resource.RLIMIT_FSIZE}
    return successes((name, resource.setrlimit, kind, most) for name, kind in kinds.items())


def write_everywhere() -> list[str]:
    """Every mount and every folder near the root in which a file can be made."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    near = [path for depth in ("/*", "/*/*", "/*/*/*") for path in glob.glob(depth) if not path.startswith("/proc")]
    folders = sorted({path for path in ["/", *mounts, *near] if os.path.isdir(path) and not os.path.islink(path)})
    return successes((path, Path(path, "trace").write_text, "x") for path in folders)


def fill(path: str, size_mib: str) -> str:
    """Write until refused; the name of the refusal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(int(size_mib)):
                file.write(bytes(2**20))
    except OSError as error:
        return refused(error)
    return "filled"


def gain_privilege() -> list[str]:
    """Capabilities, set-uid programs, changes of identity."""
    status = Path("/proc/self/status").read_text()
    caps = [line for line in status.splitlines() if line.startswith("Cap") and int(line.split()[1], 16)]
    acts: list[Act] = [
        ("setuid 0", os.setuid, 0),
        ("setgroups", os.setgroups, [0]),
        ("su", run, "su", "-c", "true"),
    ]
    no_new = [] if "NoNewPrivs:\t1" in status else ["NoNewPrivs is off"]
    return caps + no_new + successes(acts)


def terminal() -> list[str]:
    """Type into the terminal of whoever started us."""
    return successes([("/dev/tty", os.open, "/dev/tty", os.O_RDWR)])


def shared_memory() -> dict[str, list[str]]:
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {"segments": segments, "files": os.listdir("/dev/shm")}


def linger(path: str) -> str:
    """Leave a process behind that has left session and parent, and goes on writing."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for beat in itertools.count():
                Path(path).write_text(str(beat))
                time.sleep(0.002)
        os._exit(0)
    while not os.path.exists(path):
        time.sleep(0.002)
    return "left one behind"


def tamper_with_output() -> str:
    """Links and fifos in the place of the files that the worker will read."""
    os.symlink("/etc/passwd", "/out/progress.jsonl")
    os.symlink("/etc", "/out/adapter")
    os.mkfifo("/out/fifo")
    os.mkdir("/out/folder")
    Path("/out/plain").write_text("plain")
    return "planted"


def pseudo_terminal() -> str:
    """Not an attack: /dev is minimal, and still has what programs need."""
    main, other = pty.openpty()
    os.close(main)
    os.close(other)
    return "works"


if __name__ == "__main__":
    attack = globals().get(sys.argv[1]) or getattr(leavings, sys.argv[1])
    got = attack(*sys.argv[2:])
    print(json.dumps({"got": got, "refused": sorted(REFUSED)}), flush=True)
