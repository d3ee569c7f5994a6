"""The sandbox against a hostile trial: one attack a test, each as root of the machine and as an ordinary user.

Nothing is simulated: a real image is mounted and forked, the attacks of attacks/inside.py run in the real sandbox, and
where it says something, the same act is shown to succeed outside first. The victim is attacks/arena.py.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.namespace import enter_private_namespace, in_private_namespace
from pipeline.sandbox import Sandbox
from tests.attacks.host import ROOT, SECRETS, USER, WHO, Arena, lay_out, why_not

ALL_REDUCE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(x)
open(f"/out/rank{dist.get_rank()}", "w").write(str(x.item()))
dist.destroy_process_group()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: pytest keeps that below a folder which only its own user may enter.
    with tempfile.TemporaryDirectory(prefix="arena-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module", params=WHO)
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    if why_not(request.param):
        pytest.skip(why_not(request.param))
    with tempfile.TemporaryDirectory(prefix="arena-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        running = Arena(request.param, lay_out(request.param, Path(name)))
        yield running
        assert running.close() == (0, "")


@pytest.fixture
def outsider(arena: Arena) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the arena's own uid, outside every sandbox."""
    uid = USER if arena.who == "user" else 0
    with subprocess.Popen(["sleep", "300"], user=uid if os.geteuid() == 0 else None) as process:
        yield process
        process.kill()


def test_linked_virtual_environment_is_bound_at_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import sandbox

    (tmp_path / "real").mkdir()
    (tmp_path / "venv").symlink_to(tmp_path / "real")
    monkeypatch.setattr(sandbox.sys, "prefix", str(tmp_path / "venv"))
    staging = SimpleNamespace(bind=lambda source: f"bound:{source}", write=lambda text: "text")
    arguments = sandbox.Sandbox()._arguments(staging)
    place = arguments.index(str(tmp_path / "venv"))
    assert arguments[place - 2 : place] == ["--ro-bind", f"bound:{tmp_path / 'venv'}"]


def test_the_arena_uses_what_the_node_has(arena: Arena) -> None:
    answered = arena.ask("plain", "id", "-u")
    assert (answered["got"], answered["code"]) == ("1000", 0)
    assert answered["uid"] == (65534 if arena.who == "root" else 0)
    assert answered["backends"] == (["loop", "overlay"] if arena.who == "root" else ["squashfuse", "overlay"])
    assert arena.attack("pseudo_terminal") == "works"


def test_devices_are_those_that_were_asked_for(arena: Arena) -> None:
    # As root the node keeps its mode, and nobody may not open it; a graphics card's is open to everybody.
    look = "test -c /dev/fuse" if arena.who == "root" else ": <>/dev/fuse"
    assert arena.ask("plain", "sh", "-c", look)["code"] != 0
    assert arena.ask("plain", "sh", "-c", look, devices=["/dev/fuse"])["code"] == 0


def test_write_the_mount(arena: Arena) -> None:
    assert arena.attack("write_mount", "/substrate", "/task", "/usr/lib", "/etc", sys.prefix, sys.base_prefix) == []
    # The same acts where they are allowed; the arena verifies the pristine image after each of them.
    assert len(arena.attack("write_mount", "/fork")) == 7


def test_remount_the_mount(arena: Arena) -> None:
    assert arena.attack("remount", "/substrate", "/task", "/usr", "/", "/proc", "/out") == []


@pytest.mark.parametrize("secret", SECRETS)
def test_read_what_belongs_to_the_campaign(arena: Arena, secret: str) -> None:
    path = str(arena.world / secret)
    assert arena.outside("cat", path) == 0
    assert arena.attack("read", path) == []


def test_read_the_files_of_the_host(arena: Arena) -> None:
    assert arena.outside("cat", "/etc/hostname") == 0
    for path in ("/etc/hostname", "/etc/shadow", "/sys/kernel", "/var", "/home", str(ROOT / "pipeline")):
        assert arena.attack("read", path) == [], path


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
        control = [sys.executable, "-I", str(arena.world / "task/inside.py"), *arguments]
        reached = json.loads(arena.ask("outside", *control)["log"].splitlines()[-1])
        assert {"127.0.0.1", f"unix {unix_path}", f"unix \0{abstract}"} <= set(reached)
        assert arena.attack(*arguments) == []
    finally:
        for listener in listeners:
            listener.close()


def test_signal_or_trace_a_process_outside(arena: Arena, outsider: subprocess.Popen[bytes]) -> None:
    assert arena.outside("kill", "-0", str(outsider.pid)) == 0
    assert arena.attack("signal_process", str(outsider.pid)) == []
    assert outsider.poll() is None
    assert arena.process.poll() is None


def test_see_the_processes_of_the_host(arena: Arena, outsider: subprocess.Popen[bytes]) -> None:
    seen = arena.attack("host_processes")
    assert len(seen["commands"]) == 2  # bubblewrap's pid 1 and the attack
    assert not any("sleep 300" in line or "arena" in line.replace("inside.py", "") for line in seen["commands"])
    assert seen["pid_namespace"] != os.readlink("/proc/self/ns/pid")


def test_read_the_callers_environment(arena: Arena) -> None:
    got = arena.attack("environment")
    assert "the-secret-of-the-caller" not in got and "API_TOKEN" not in got
    assert "GLOO_SOCKET_IFNAME=lo" in got


def test_inherit_descriptors(arena: Arena) -> None:
    assert arena.attack("descriptors") == []


def test_fork_bomb(arena: Arena) -> None:
    got = arena.attack("fork_bomb", "500")
    assert got["refused_again"] and 10 < got["children"] < 64
    assert arena.attack("raise_limits") == []


def test_write_outside_out(arena: Arena) -> None:
    allowed = {"/out", "/fork", "/fork/substrate", "/tmp", "/dev/shm"}
    # A checkout below /tmp: the folders on the way to its runtime stand on the sandbox's own tmpfs.
    allowed |= {str(parent) for parent in Path(sys.prefix).parents if parent.is_relative_to("/tmp")}
    assert {"/out", "/fork", "/tmp"} <= set(arena.attack("write_everywhere")) <= allowed


@pytest.mark.parametrize(
    ("path", "refusal"), [("/tmp/big", "ENOSPC"), ("/dev/shm/big", "ENOSPC"), ("/out/big", "EFBIG")]
)
def test_fill_the_disk(arena: Arena, path: str, refusal: str) -> None:
    assert arena.attack("fill", path, "64") == refusal


def test_gain_privilege(arena: Arena) -> None:
    assert arena.attack("gain_privilege") == []


def test_type_into_the_terminal(arena: Arena) -> None:
    assert arena.outside(sys.executable, "-c", "open('/dev/tty').close()") == 0
    assert arena.attack("terminal") == []


def test_reach_shared_memory(arena: Arena) -> None:
    made = arena.ask("outside", "ipcmk", "--shmem", "64", "--mode", "0666")["log"].split()[-1]
    try:
        with tempfile.NamedTemporaryFile(dir="/dev/shm"):
            assert arena.attack("shared_memory") == {"segments": [], "files": []}
    finally:
        assert arena.outside("ipcrm", "--shmem-id", made) == 0


def test_leave_a_process_behind(arena: Arena) -> None:
    assert arena.attack("linger", "/out/beat") == "left one behind"
    beat = (arena.world / "out/beat").read_text()
    time.sleep(0.05)
    assert (arena.world / "out/beat").read_text() == beat


def test_run_for_ever(arena: Arena) -> None:
    began = time.monotonic()
    deaf = "trap '' TERM INT HUP; sleep 300 & sleep 300"
    answered = arena.ask("plain", "sh", "-c", deaf, limits={"wall_seconds": 0.3})
    assert answered["timed_out"] and answered["code"] == 128 + signal.SIGKILL
    assert time.monotonic() - began < 10


def test_plant_links_in_the_output(arena: Arena) -> None:
    assert arena.attack("tamper_with_output") == "planted"
    for name in ("progress.jsonl", "adapter/passwd", "fifo", "folder"):
        assert arena.ask("read", name)["kind"] == "bad_output", name
    assert arena.ask("read", "missing")["error"] == "NotFound"
    assert arena.ask("read", "plain")["got"] == "plain"


def test_two_ranks_find_each_other(arena: Arena) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    (arena.world / "task/all_reduce.py").write_text(ALL_REDUCE)
    torchrun = ["python", "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    limits = {"num_processes": 512, "tmp_size_bytes": 2**28, "shm_size_bytes": 2**28}
    answered = arena.ask("plain", *torchrun, "/task/all_reduce.py", limits=limits)
    assert answered["code"] == 0, answered["log"]
    assert [(arena.world / f"out/rank{rank}").read_text() for rank in (0, 1)] == ["3.0", "3.0"]


def test_probe_finds_nothing(arena: Arena) -> None:
    forbidden = {name: str(arena.world / name) for name in SECRETS}
    report = arena.ask("probe", forbidden=forbidden)["report"]
    assert {f"path {name}" for name in SECRETS} < set(report)
    assert {"write /substrate", "remount /substrate", "environment", "namespace net", "sockets"} < set(report)
    assert not any(check["reached"] for check in report.values())
    assert json.loads((arena.world / "probe.json").read_text()) == report


def test_probe_refuses_a_leak(arena: Arena) -> None:
    vault = str(arena.world / "vault/seed")
    if arena.who == "root":
        os.chmod(vault, 0o644)  # else the sandbox refuses to bind what the trial cannot read
    answered = arena.ask("probe", forbidden={"vault": vault}, show={vault: vault})
    assert answered["error"] == "Refused"
    assert "article 7 (isolation)" in answered["what"] and "path vault" in answered["what"]
    answered = arena.ask("probe", forbidden={}, network="fabric")
    assert "namespace net" not in answered["report"]


def test_probe_sees_everything_where_there_is_no_sandbox(arena: Arena) -> None:
    vault = str(arena.world / "vault/seed")
    asked = {
        "forbidden": {"vault": vault},
        "read_only": [str(arena.world / "scratch")],
        "environment": [],
        "network": "loopback",
        "namespaces": {"pid": os.readlink("/proc/self/ns/pid")},
    }
    answered = arena.ask("outside", sys.executable, "-I", str(ROOT / "pipeline/probe.py"), json.dumps(asked))
    report = json.loads(answered["log"].splitlines()[-1])
    reached = {name for name, check in report.items() if check["reached"]}
    assert {"path vault", "paths through /proc", "namespace pid", "environment", "capabilities"} <= reached
    assert f"write {arena.world}/scratch" in reached and "user namespace" in reached


@pytest.mark.parametrize("who", WHO)
def test_sigkill_leaves_no_mount_behind(who: str, folder: Path) -> None:
    if why_not(who):
        pytest.skip(why_not(who))
    world = lay_out(who, folder)
    # Without a terminal: its hang-up would end the processes that we must end.
    running = Arena(who, world, has_terminal=False)
    beat = world / "out/beat"
    running.send("plain", "sh", "-c", "while sleep 0.01; do date +%N >> /out/beat; done")
    _wait(beat.exists)
    assert running.process.pid in _processes_that_name(str(world))
    inside = Path(f"/proc/{running.process.pid}/mounts").read_text().split()
    mounts = [path for path in inside if path.startswith((str(world / "scratch"), "/tmp/sandbox-"))]
    assert len(mounts) > 10  # the image, its fork, and the staged sources of the sandbox that runs
    on_the_host = set(Path("/proc/mounts").read_text().split())
    assert not on_the_host & set(mounts)  # even while all is mounted, the host sees none of it
    running.process.kill()
    assert running.close() == (-signal.SIGKILL, "")
    _wait(lambda: not _processes_that_name(str(world)))
    _wait(lambda: str(world) not in _loop_files())
    stopped = beat.read_text()
    time.sleep(0.05)
    assert beat.read_text() == stopped
    assert not set(Path("/proc/mounts").read_text().split()) & set(mounts)
    for path in mounts:
        if Path(path).parent == Path("/tmp"):
            Path(path).rmdir()  # of the staging folder, the empty mount point is left


def test_refusals_name_what_is_valid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="enter_private_namespace first"):
        Sandbox().start(["true"], folder / "log")
    monkeypatch.setattr("pipeline.sandbox.require_private_namespace", lambda: None)
    with pytest.raises(ConfigError, match="never the whole root"):
        Sandbox({"/host": Path("/")}).start(["true"], folder / "log")
    with pytest.raises(ConfigError, match="never the whole root"):
        Sandbox({"/task": folder / "missing"}).start(["true"], folder / "log")
    with pytest.raises(ConfigError, match="valid: loopback, fabric"):
        Sandbox(network="host").start(["true"], folder / "log")


def test_the_mark_of_another_process_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execvpe", lambda program, command, env: started.append(command))
    monkeypatch.setenv("PIPELINE_PRIVATE_NAMESPACE", f"{os.getpid() + 1} mnt:[1]")
    assert not in_private_namespace()
    enter_private_namespace(["worker"])
    assert started[0][0] == "unshare" and started[0][-2:] == ["--", "worker"]
    monkeypatch.setenv("PIPELINE_PRIVATE_NAMESPACE", f"{os.getpid()} mnt:[1]")
    assert in_private_namespace()


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _processes_that_name(text: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _loop_files() -> str:
    return "".join(path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file"))
