"""Test the sandbox of an honest trial, its probe and its end. Hostile trials are in test_attacks_*.py.

Nothing is simulated here or there. A real image is mounted and forked, as root of the machine and as an ordinary user, and the attacks of
attacks/inside.py and leavings.py run in the real sandbox. Where it proves something, the same act is first shown to succeed outside. The
victim is attacks/arena.py.
"""

import importlib.util
import json
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.campaign.errors import ConfigError
from pipeline.sandbox.bubblewrap import Sandbox
from pipeline.sandbox.namespace import enter_private_namespace, in_private_namespace
from tests.attacks.host import ADD_KEY, ROOT, SECRETS, WHO, Arena, lay_out, why_not

ALL_REDUCE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(x)
open(f"/out/rank{dist.get_rank()}", "w").write(str(x.item()))
dist.destroy_process_group()
"""


def test_linked_virtual_environment_is_bound_at_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.sandbox import bubblewrap

    (tmp_path / "real").mkdir()
    (tmp_path / "venv").symlink_to(tmp_path / "real")
    monkeypatch.setattr(bubblewrap.sys, "prefix", str(tmp_path / "venv"))
    staging = SimpleNamespace(bind=lambda source: f"bound:{source}", write=lambda text: "text")
    arguments = bubblewrap.Sandbox()._arguments(staging)
    place = arguments.index(str(tmp_path / "venv"))
    assert arguments[place - 2 : place] == ["--ro-bind", f"bound:{tmp_path / 'venv'}"]


def test_the_arena_uses_what_the_node_has(arena: Arena) -> None:
    answered = arena.ask("plain", "id", "-u")
    assert (answered["got"], answered["code"]) == ("1000", 0)
    assert arena.uid == (65534 if arena.who == "root" else 0)
    assert arena.backends == (["loop", "overlay"] if arena.who == "root" else ["squashfuse", "overlay"])
    assert arena.attack("pseudo_terminal") == "works"


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
    assert {
        "write /substrate",
        "remount /substrate",
        "environment",
        "namespace net",
        "sockets",
        "devices",
        "make a device",
    } < set(report)
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


def test_probe_refuses_a_socket_that_was_not_given(arena: Arena) -> None:
    folder = arena.world / "relay"
    folder.mkdir(mode=0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        (folder / "s").chmod(0o666)
        answered = arena.ask("probe", forbidden={}, show={"/relay": str(folder)})
        assert answered["error"] == "Refused" and "unix sockets (['/relay/s'])" in answered["what"]
        answered = arena.ask("probe", forbidden={}, show={"/relay": str(folder)}, sockets=["/relay/s"])
        assert not answered["report"]["unix sockets"]["reached"]


def test_probe_sees_everything_where_there_is_no_sandbox(arena: Arena) -> None:
    vault = str(arena.world / "vault/seed")
    asked = {
        "forbidden": {"vault": vault},
        "read_only": [str(arena.world / "scratch")],
        "environment": [],
        "network": "loopback",
        "devices": [],
        "sockets": [],
        "runtime": [str(path) for path in Path("/").iterdir()],
        "namespaces": {"pid": os.readlink("/proc/self/ns/pid")},
    }
    if platform.machine() == "x86_64":
        arena.ask("outside", sys.executable, "-c", ADD_KEY)
    answered = arena.ask(
        "outside", sys.executable, "-I", str(ROOT / "pipeline/sandbox/probe_script.py"), json.dumps(asked)
    )
    report = json.loads(answered["log"].splitlines()[-1])
    reached = {name for name, check in report.items() if check["reached"]}
    assert {"path vault", "paths through /proc", "namespace pid", "environment", "capabilities", "devices"} <= reached
    assert "keys" in reached or platform.machine() != "x86_64"
    assert f"write {arena.world}/scratch" in reached and "user namespace" in reached


def test_probe_finds_a_device_that_was_not_given(arena: Arena) -> None:
    """/dev/fuse stands for the GPU of another job: the sandbox shows it at a path of which its list of devices knows nothing."""
    answered = arena.ask("probe", forbidden={}, show={"/dev/nvidia7": "/dev/fuse"})
    assert answered["error"] == "Refused" and "devices (['/dev/nvidia7'])" in answered["what"]


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
    monkeypatch.setattr("pipeline.sandbox.bubblewrap.require_private_namespace", lambda: None)
    with pytest.raises(ConfigError, match="never the whole root"):
        Sandbox({"/host": Path("/")}).start(["true"], folder / "log")
    with pytest.raises(ConfigError, match="never the whole root"):
        Sandbox({"/task": folder / "missing"}).start(["true"], folder / "log")
    with pytest.raises(ConfigError, match="Use one of loopback, fabric"):
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
