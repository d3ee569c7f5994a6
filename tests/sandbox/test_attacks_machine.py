"""Attacks of a trial on the machine (processes, network, memory, disk, time) and on the process that started it.

Each test is one attack and runs as root of the machine and as an ordinary user. Nothing is simulated (see test_bubblewrap.py).
"""

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.host import ADD_KEY, Arena

MEMORY = Path("/sys/fs/cgroup/memory")
MIB = 2**20
ATTACK = "import sys; sys.path.insert(0, '/task'); import leavings; "
FLOODS = {
    "/out": "fill the disk with many files: /out",
    "/substrate": "fill the disk with many files: the fork's upper layer",
}


@pytest.mark.attack("reach the host's loopback, addresses, abstract and file sockets")
def test_reach_the_network(arena: Arena) -> None:
    unix_path = str(arena.world / "socket")
    abstract = f"arena-{arena.process.pid}"
    addresses: list[Any] = [("0.0.0.0", 0), "\0" + abstract, unix_path]
    listeners = [socket.socket(socket.AF_INET if isinstance(at, tuple) else socket.AF_UNIX) for at in addresses]
    try:
        for listener, address in zip(listeners, addresses, strict=True):
            listener.bind(address)
            listener.listen()
        os.chmod(unix_path, 0o777)
        hosts = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
        arguments = ("connect", str(listeners[0].getsockname()[1]), abstract, unix_path, ",".join(hosts))
        control = [sys.executable, "-sE", str(arena.world / "task/inside.py"), *arguments]
        reached = json.loads(arena.ask("outside", *control)["log"].splitlines()[-1])["got"]
        assert {"127.0.0.1", f"unix {unix_path}", f"unix \0{abstract}"} <= set(reached)
        assert arena.attack(*arguments) == []
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.attack("signal, slow down or limit a sibling of the same uid")
def test_signal_a_process_outside(arena: Arena, outsider: subprocess.Popen[bytes]) -> None:
    assert arena.outside("kill", "-0", str(outsider.pid)) == 0
    assert arena.attack("signal_process", str(outsider.pid)) == []
    assert outsider.poll() is None and os.getpriority(os.PRIO_PROCESS, outsider.pid) == 0
    assert arena.process.poll() is None


@pytest.mark.attack("trace a sibling, read its memory and files")
def test_trace_a_process_outside(arena: Arena, outsider: subprocess.Popen[bytes]) -> None:
    assert arena.outside("cat", f"/proc/{outsider.pid}/status") == 0
    assert arena.attack("trace", str(outsider.pid)) == []


@pytest.mark.attack("see the host's processes", "its own pid namespace, with two processes")
def test_see_the_processes_of_the_host(arena: Arena, outsider: subprocess.Popen[bytes]) -> None:
    seen = arena.attack("host_processes")
    assert len(seen["commands"]) == 2  # bubblewrap's pid 1 and the attack
    assert not any("sleep 300" in line or "arena" in line.replace("inside.py", "") for line in seen["commands"])
    assert seen["pid_namespace"] != os.readlink("/proc/self/ns/pid")


@pytest.mark.attack("secrets in the environment", "an empty one, and no other process's")
def test_read_the_callers_environment(arena: Arena) -> None:
    got = arena.attack("environment")
    assert "the-secret-of-the-caller" not in got and "API_TOKEN" not in got
    assert "GLOO_SOCKET_IFNAME=lo" in got


@pytest.mark.attack("use inherited descriptors", "none is there")
def test_inherit_descriptors(arena: Arena) -> None:
    assert arena.attack("descriptors") == []


@pytest.mark.attack("a fork bomb, limits raised")
def test_fork_bomb(arena: Arena) -> None:
    got = arena.attack("fork_bomb", "500")
    assert got["refused_again"] and 10 < got["children"] < 64
    assert arena.attack("raise_limits") == []


@pytest.mark.parametrize(
    ("path", "refusal"),
    [
        pytest.param(path, refusal, marks=pytest.mark.attack(f"fill the disk with one file: {path}"))
        for path, refusal in (("/tmp/big", "ENOSPC"), ("/dev/shm/big", "ENOSPC"), ("/out/big", "EFBIG"))
    ],
)
def test_fill_the_disk(arena: Arena, path: str, refusal: str) -> None:
    assert arena.attack("fill", path, "64") == refusal


@pytest.mark.parametrize("folder", [pytest.param(f, marks=pytest.mark.attack(name)) for f, name in FLOODS.items()])
def test_fill_the_disk_with_many_files(arena: Arena, folder: str) -> None:
    code = f"import time\nfor n in range(1000):\n open(f'{folder}/{{n}}', 'wb').write(bytes(4 << 20)); time.sleep(0.05)"
    answered = arena.ask("train", code, limits={"disk_size_bytes": 32 * MIB})
    assert answered["kind"] == "disk_limit" and "bytes were written, and 33554432 are allowed" in answered["what"]


@pytest.mark.attack("use up the disk's inodes")
def test_make_files_without_end(arena: Arena) -> None:
    code = "import itertools, time\nfor n in itertools.count():\n open(f'/out/{n}', 'w').close(); time.sleep(0.0005)"
    answered = arena.ask("train", code, limits={"num_files": 500})
    assert answered["kind"] == "disk_limit" and "files were written, and 500 are allowed" in answered["what"]


@pytest.mark.attack("fill the campaign's disk by talking")
def test_talk_without_end(arena: Arena) -> None:
    code = "import time\nwhile True: print('x' * 2**16, flush=True); time.sleep(0.01)"
    answered = arena.ask("train", code, limits={"log_size_bytes": MIB, "file_size_bytes": 256 * MIB})
    assert answered["kind"] == "disk_limit" and "the log has more than" in answered["what"]


@pytest.fixture
def small_memory(arena: Arena) -> Iterator[None]:
    """The arena in a memory cgroup, as a node's scheduler makes one for a job."""
    if not os.access(MEMORY, os.W_OK) or os.geteuid() != 0:
        pytest.skip(f"no memory cgroup below {MEMORY} that this user may make")
    group = MEMORY / f"attacks-{os.getpid()}"
    own = next(line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(400 * MIB))
        (group / "cgroup.procs").write_text(str(arena.process.pid))
        yield
        (Path(f"{MEMORY}{own}") / "cgroup.procs").write_text(str(arena.process.pid))
    finally:
        group.rmdir()


@pytest.mark.attack("allocate 100 GB, in a memory cgroup", "killed by the kernel, the worker goes on")
def test_allocate_everything(arena: Arena, small_memory: None) -> None:
    answered = arena.ask("train", f"{ATTACK}leavings.allocate('100')")
    assert answered["kind"] == "out_of_memory", answered
    assert arena.ask("plain", "id", "-u")["got"] == "1000"


@pytest.mark.attack("be spared when memory ends, in place of the worker", "oom_score_adj 1000, not below the worker's")
def test_outlive_the_worker(arena: Arena) -> None:
    assert arena.attack("victim_score") == {"score": 1000, "spared": []}


@pytest.mark.attack("stand still", "killed as stalled")
def test_stand_still(arena: Arena) -> None:
    assert arena.ask("train", "import time; time.sleep(300)", stall_seconds=0.4)["kind"] == "stalled"


@pytest.mark.attack("read the keys of the session that started it")
def test_read_the_keys_of_the_session(arena: Arena) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("system calls by number, those of x86_64")
    made = arena.ask("outside", sys.executable, "-c", ADD_KEY)
    assert made["code"] == 0, made
    assert arena.attack("keys", made["log"].split()[-1]) == []


@pytest.mark.attack("look names up, raw sockets, routes")
def test_names_and_raw_sockets(arena: Arena) -> None:
    assert arena.attack("names_and_raw_sockets") == []


@pytest.mark.attack("have munge vouch for it")
def test_ask_munge(arena: Arena) -> None:
    """A real munged that answers everybody: its socket is nowhere inside, nor a port that leads there."""
    if shutil.which("munged") is None:
        pytest.skip("munge is not installed")
    run = arena.world / "munge"
    run.mkdir(mode=0o755, exist_ok=True)
    (run / "key").write_bytes(os.urandom(64))
    (run / "key").chmod(0o600)
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    daemon = ["munged", "--foreground", "--force", *(f"--{option}={run / name}" for option, name in files.items())]
    with subprocess.Popen(daemon, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 20
            while arena.outside("munge", "-n", "-S", str(run / "socket")) and time.monotonic() < until:
                time.sleep(0.05)
            assert arena.outside("munge", "-n", "-S", str(run / "socket")) == 0
            ways = (f"munge -n -S {run}/socket", "munge -n")
            assert arena.attack("commands", *ways) == []
        finally:
            process.terminate()


@pytest.mark.attack("gain privilege: set-uid programs, identities, capabilities")
def test_gain_privilege(arena: Arena) -> None:
    assert arena.attack("gain_privilege") == []


@pytest.mark.attack("type into the terminal")
def test_type_into_the_terminal(arena: Arena) -> None:
    assert arena.outside(sys.executable, "-c", "open('/dev/tty').close()") == 0
    assert arena.attack("terminal") == []


@pytest.mark.attack("reach shared memory of others", "its own ipc namespace and /dev/shm")
def test_reach_shared_memory(arena: Arena) -> None:
    made = arena.ask("outside", "ipcmk", "--shmem", "64", "--mode", "0666")["log"].split()[-1]
    try:
        with tempfile.NamedTemporaryFile(dir="/dev/shm"):
            assert arena.attack("shared_memory") == {"segments": [], "files": []}
    finally:
        assert arena.outside("ipcrm", "--shmem-id", made) == 0


@pytest.mark.attack("leave a process behind", "it dies with pid 1")
def test_leave_a_process_behind(arena: Arena) -> None:
    assert arena.attack("linger", "/out/beat") == "left one behind"
    beat = (arena.world / "out/beat").read_text()
    time.sleep(0.05)
    assert (arena.world / "out/beat").read_text() == beat


@pytest.mark.attack("run for ever, deaf to signals", "killed at the wall limit")
def test_run_for_ever(arena: Arena) -> None:
    began = time.monotonic()
    deaf = "trap '' TERM INT HUP; sleep 300 & sleep 300"
    answered = arena.ask("plain", "sh", "-c", deaf, limits={"wall_seconds": 0.3})
    assert answered["timed_out"] and answered["code"] == 128 + signal.SIGKILL
    assert time.monotonic() - began < 10
