"""What a hostile trial leaves for later stages in /out, in its fork and in its home, and what it takes of the machine."""

import ctypes
import json
import mmap
import os
import pickle
import py_compile
import socket
import stat
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from acts import LIBC, Act, refused, run, successes

ADAPTER = Path("/out/adapter")
FUTURE = 4102444800  # the year 2100
GIB = 2**30


class Evil:
    """Whoever unpickles it writes where it says."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /out/unpickled /tmp/unpickled",)


def safetensors(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def fake_adapter(kind: str, config: str) -> str:
    """An adapter of one tensor `w` of four floats, with one thing wrong (`honest`: with nothing)."""
    ADAPTER.mkdir()
    good = safetensors({"w": entry([2, 2], [0, 16])}, struct.pack("<4f", 1, 2, 3, 4))
    made = {
        "honest": good,
        "pickle": pickle.dumps(Evil()),
        "nan": safetensors({"w": entry([2, 2], [0, 16])}, struct.pack("<4f", 1, 2, float("nan"), 4)),
        "shape": safetensors({"w": entry([4], [0, 16])}, struct.pack("<4f", 1, 2, 3, 4)),
        "traversal": safetensors({"../../../a0.h5": entry([2, 2], [0, 16])}, bytes(16)),
        "beyond": safetensors({"w": entry([2, 2], [2**40, 2**40 + 16])}, bytes(16)),
    }
    (ADAPTER / "adapter_model.safetensors").write_bytes(made.get(kind, good))
    (ADAPTER / "adapter_config.json").write_text(config if kind != "config" else config.replace("{", '{"r": NaN, ', 1))
    (ADAPTER / "adapter_model.bin").write_bytes(made["pickle"])  # what a careless loader would prefer
    if kind == "sparse":
        os.truncate(ADAPTER / "adapter_model.safetensors", 7 * 2**20)
    return "planted"


def fake_result(config: str) -> str:
    """Everything that the worker or the meta stage writes, in the trial's own folder."""
    fake_adapter("honest", config)
    for name in ("result.h5", "a0.h5", "a1.h5", "sealed.json", "claim.json", "scores.jsonl", "completions/dev.jsonl"):
        path = Path("/out", name)
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"item_id": "roman-000000", "correct": 1}\n')
    return "planted"


def poison(home: str) -> list[str]:
    """Caches and hooks that a later process would load: beside the image's code, in HOME and in what torch reads."""
    code = Path("/fork/substrate/train.py")
    evil = Path("/tmp/evil.py")
    evil.write_text("print('evil')\n")
    cached = code.parent / "__pycache__" / f"train.{sys.implementation.cache_tag}.pyc"
    cached.parent.mkdir(exist_ok=True)
    # Not checked against its source: Python loads it whatever train.py says.
    py_compile.compile(str(evil), str(cached), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    places = [
        *(
            ".triton/cache/k/kernel.so",
            ".cache/torch/kernels/k",
            f".local/lib/{version}/site-packages/usercustomize.py",
        ),
        *(
            ".cache/torch_extensions/e.so",
            ".nv/ComputeCache/0/0",
            "torchinductor_trial/aa/k.py",
            ".pythonrc",
            "sitecustomize.py",
        ),
    ]
    acts: list[Act] = []
    for folder in (home, "/dev/shm"):
        for place in places:
            path = Path(folder, place)
            path.parent.mkdir(parents=True, exist_ok=True)
            acts.append((str(path), path.write_text, "print('evil')\n"))
    acts += [
        (f"cache in {sys.prefix}", Path(sys.prefix, "lib", version, "site-packages/evil.pth").write_text, "import evil")
    ]
    return successes(acts)


def poison_kernels(*outside: str) -> dict[str, Any]:
    """Change the compiled kernels that this sandbox was given, plant others, and try the same where the host keeps them.

    outside: folders of the host: the node's cache, the worker's copy, and what is bound at /kernels.
    """
    acts: list[Act] = []
    for folder in outside:
        for place in (folder, f"/proc/1/root{folder}", f"/proc/self/root{folder}", f"/kernels/../..{folder}"):
            acts += [
                (f"write {place}", Path(place, "inductor/kernel.so").write_text, "evil"),
                (f"create in {place}", Path(place, "evil.so").write_text, "evil"),
                (f"link to {place}", os.link, f"{place}/inductor/kernel.so", "/kernels/hard.so"),
                (f"rename {place}", os.rename, place, "/kernels/renamed"),
            ]
    reached = successes(acts)
    inside = Path("/kernels/inductor/kernel.so")
    inside.write_text("evil")
    inside.chmod(0o4755)
    Path("/kernels/more.so").write_text("evil")
    for number, folder in enumerate(outside):
        os.symlink(folder, f"/kernels/link-{number}")  # whoever follows it writes or deletes there
    return {"reached": reached, "planted": sorted(os.listdir("/kernels"))}


def lie_about_time() -> list[str]:
    """Set the clock; date files long ago and far ahead; tell impossible seconds."""

    class Timespec(ctypes.Structure):
        _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]

    step = {"phase": "train", "loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0, "num_steps": 5}
    told = (1e-300, -1e9, 1e300, 0.0, float(FUTURE))
    lines = [step | {"step": n + 1, "tokens": 2**50, "seconds": value} for n, value in enumerate(told)]
    text = "".join(json.dumps(line) + "\n" for line in [{"phase": "start", "seconds": -1e12}, *lines])
    Path("/out/progress.jsonl").write_text(text)
    Path("/out/checkpoints/step_999999").mkdir(parents=True)
    for path in ("/out/progress.jsonl", "/out/checkpoints/step_999999", "/out"):
        os.utime(path, (FUTURE, FUTURE) if path != "/out" else (0, 0))
    return successes(
        [
            ("clock_settime", LIBC.clock_settime, 0, ctypes.byref(Timespec(FUTURE, 0))),
            ("settimeofday", LIBC.settimeofday, ctypes.byref(Timespec(FUTURE, 0)), None),
            ("time.clock_settime", time.clock_settime, time.CLOCK_REALTIME, float(FUTURE)),
            ("time namespace", Path("/proc/self/timens_offsets").write_text, "monotonic 86400 0"),
            ("date", run, "date", "--set", "2100-01-01"),
        ]
    )


def deep_tree(depth: str) -> int:
    """Folders in folders, deeper than any path and than Python's own stack; a file at the bottom."""
    for number in range(int(depth)):
        os.mkdir("d")
        os.chdir("d")
        if number == 10:
            Path("checkpoint").write_text("x")
    Path("bottom").write_text("x")
    return int(depth)


def set_uid_program() -> list[str]:
    """A program of the trial's own uid for whoever finds it."""
    Path("/out/evil").write_bytes(Path("/usr/bin/env").read_bytes())
    os.chmod("/out/evil", 0o6755)
    return [oct(stat.S_IMODE(os.stat("/out/evil").st_mode))]


def overlay_attributes(secret: str) -> list[str]:
    """Attributes with which an overlay would be led to a file or folder outside its layers."""
    names = [f"{space}.overlay.{name}" for space in ("user", "trusted") for name in ("redirect", "metacopy", "origin")]
    target, folder = "/fork/manifest.yaml", "/fork/substrate"
    acts: list[Act] = [
        (f"{name} {to}", os.setxattr, to, name, secret.encode()) for name in names for to in (target, folder)
    ]
    acts += [("capability", os.setxattr, target, "security.capability", bytes.fromhex("0100000200200000") + bytes(12))]
    done = successes(acts)
    # What the kernel escapes rather than refuses leads nowhere: the content is still the image's.
    led = [
        path
        for path in (target, f"{folder}/seed")
        if os.path.exists(path) and b"must not see" in Path(path).read_bytes()
    ]
    return led + [name for name in done if "capability" in name]


def hard_links(secret: str) -> list[str]:
    """Give a file that is not ours a name in /out, by path, by descriptor and through /proc."""
    image = next(path for path in ("/substrate/manifest.yaml",) if os.path.exists(path))
    opened = os.open(image, os.O_RDONLY)
    acts: list[Act] = [
        (path, os.link, path, f"/out/hard{n}")
        for n, path in enumerate((secret, image, "/usr/bin/env", "/task/inside.py"))
    ]
    acts += [
        ("linkat /proc/self/fd", os.link, f"/proc/self/fd/{opened}", "/out/by-fd"),
        ("linkat AT_EMPTY_PATH", LIBC.linkat, opened, b"", -100, b"/out/empty", 0x1000),
        ("rename out of the image", os.rename, image, "/out/renamed"),
    ]
    return successes(acts)


def devices() -> list[str]:
    """Open or make what only the host's drivers should answer to."""
    names = ("mem", "kmsg", "port", "loop0", "loop-control", "fuse", "net/tun", "vda", "sda", "nvme0n1", "kvm", "dm-0")
    acts: list[Act] = [(name, os.open, f"/dev/{name}", os.O_RDONLY) for name in names]
    for number, (major, minor) in enumerate(((1, 1), (7, 0), (10, 229), (254, 0))):
        for folder in ("/dev", "/dev/shm", "/tmp", "/out"):
            kind = stat.S_IFBLK if major in (7, 254) else stat.S_IFCHR
            acts.append(
                (
                    f"mknod {major}:{minor} in {folder}",
                    os.mknod,
                    f"{folder}/made{number}",
                    kind | 0o666,
                    os.makedev(major, minor),
                )
            )
    return successes(acts)


def kernel_settings() -> list[str]:
    """Write what /proc and /sys would let root change of the whole machine."""
    files = (
        "sysrq-trigger",
        "sys/kernel/core_pattern",
        "sys/kernel/hostname",
        "sys/vm/overcommit_memory",
        "sys/vm/drop_caches",
    )
    acts: list[Act] = [(name, os.open, f"/proc/{name}", os.O_WRONLY) for name in files]
    acts += [
        (name, os.open, name, os.O_RDONLY)
        for name in ("/proc/kcore", "/proc/kmsg", "/sys/fs/cgroup", "/sys/kernel/debug")
    ]
    acts += [
        ("reboot", LIBC.reboot, 0x1234567),
        ("sethostname", socket.sethostname, "evil"),
        ("swapoff", LIBC.swapoff, b"/swap"),
    ]
    acts += [("load a module", LIBC.syscall, 175, b"", 0, b"")]
    return successes(acts)


def keys(serial: str) -> list[str]:
    """Read a key of the caller's session, and search its keyrings for it."""
    buffer = ctypes.create_string_buffer(100)
    read, search = 11, 10
    acts: list[Act] = [("read", LIBC.syscall, 250, read, int(serial), buffer, 100)]
    acts += [(f"search {ring}", LIBC.syscall, 250, search, ring, b"user", b"arena", 0) for ring in (-1, -2, -3, -4, -5)]
    return successes(acts)


def names_and_raw_sockets() -> list[str]:
    """Look names up, listen to the wire, forge packets, change routes, call the hypervisor."""

    def ask_dns(server: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
            caller.settimeout(1)
            caller.sendto(bytes.fromhex("0001010000010000000000000765786d61706c65036f72670000010001"), (server, 53))
            caller.recv(512)

    def add_route() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
            body = struct.pack("BBBBBBBBI", 2, 0, 0, 0, 254, 3, 0, 1, 0) + struct.pack("HHI", 8, 4, 1)
            netlink.send(struct.pack("IHHII", 16 + len(body), 24, 0x605, 1, 0) + body)
            code = struct.unpack("i", netlink.recv(4096)[16:20])[0]
            if code:
                raise OSError(-code, os.strerror(-code))

    acts: list[Act] = [
        (name, socket.getaddrinfo, name, 80) for name in ("example.org", "slurmctld", "metadata.google.internal")
    ]
    acts += [
        (f"ask {server}", ask_dns, server) for server in ("127.0.0.53", "8.8.8.8", "192.0.2.53", "169.254.169.254")
    ]
    acts += [
        ("listen to the wire", socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0x300),
        ("raw IPv4", socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        ("raw IPv6", socket.socket, socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6),
        ("add a route", add_route),
        ("ping", run, "ping", "-c1", "-W1", "192.0.2.1"),
    ]
    return successes(acts)


def commands(*lines: str) -> list[str]:
    """Shell commands, some at once, each line one attempt; those that ended with 0."""
    with ThreadPoolExecutor(6) as pool:
        done = pool.map(lambda line: successes([(line, run, "sh", "-c", line)]), lines)
        return [line for each in done for line in each]


def allocate(gib: str) -> str:
    """Take memory and touch it, all of it at once and then bit by bit."""
    held = []
    try:
        held.append(mmap.mmap(-1, int(gib) * GIB))
    except OSError as error:
        refused(error)
    for _ in range(int(gib) * 64):
        held.append(mmap.mmap(-1, GIB // 64))
        for page in range(0, GIB // 64, 4096):
            held[-1][page] = 1
    return "all of it"


def victim_score() -> dict[str, Any]:
    """How willing the kernel is to take this process first when memory ends; and whether it lets one be spared."""
    score = int(Path("/proc/self/oom_score_adj").read_text())
    return {"score": score, "spared": successes([("never", Path("/proc/self/oom_score_adj").write_text, "-1000")])}
