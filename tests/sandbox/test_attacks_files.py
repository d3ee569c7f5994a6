"""Attacks of a trial on files of others: image, task, runtime, host, and everything of the campaign.

Each test is one attack and runs as root of the machine and as an ordinary user. Nothing is simulated (see test_bubblewrap.py).
"""

import sys
from pathlib import Path

import pytest

from tests.attacks.host import ROOT, SECRETS, Arena

NAMES = (
    *("read the sealed seed of fresh items", "read the ledger", "read the answers of judged items"),
    *("read the constitution", "read another arm's result", "read an earlier round's result"),
)


@pytest.mark.attack("write the image or the task")
def test_write_the_image(arena: Arena) -> None:
    assert arena.attack("write_mount", "/substrate", "/task") == []
    refusals = set(arena.refusals)
    # The same acts where they are allowed; the arena verifies the pristine image after each of them.
    assert len(arena.attack("write_mount", "/fork")) == 7
    arena.refusals = refusals


@pytest.mark.attack("write the runtime: Python, its packages, libraries, /etc")
def test_write_the_runtime(arena: Arena) -> None:
    assert arena.attack("write_mount", "/usr/lib", "/etc", sys.prefix, sys.base_prefix) == []


@pytest.mark.attack("remount or unmount the image, mount over it")
def test_remount_the_mount(arena: Arena) -> None:
    assert arena.attack("remount", "/substrate", "/task", "/usr", "/", "/proc", "/out") == []


@pytest.mark.parametrize(
    "secret", [pytest.param(s, marks=pytest.mark.attack(n)) for s, n in zip(SECRETS, NAMES, strict=True)]
)
def test_read_what_belongs_to_the_campaign(arena: Arena, secret: str) -> None:
    """By path, by symlinks, by climbing, through /proc/*/root and every descriptor."""
    path = str(arena.world / secret)
    assert arena.outside("cat", path) == 0
    assert arena.attack("read", path) == []


@pytest.mark.attack("read the host's files")
def test_read_the_files_of_the_host(arena: Arena) -> None:
    assert arena.outside("cat", "/etc/hostname") == 0
    for path in ("/etc/hostname", "/etc/shadow", "/sys/kernel", "/var", "/home", str(ROOT / "pipeline")):
        assert arena.attack("read", path) == [], path


@pytest.mark.attack("hard links to files outside, to the image and the task")
def test_hard_links(arena: Arena) -> None:
    assert arena.attack("hard_links", str(arena.world / SECRETS[0])) == []


@pytest.mark.attack("overlay attributes that lead out of the fork", "the content stays the image's")
def test_overlay_attributes(arena: Arena) -> None:
    assert arena.attack("overlay_attributes", str(arena.world / "vault")) == []
    assert arena.attack("overlay_attributes", f"/../../..{arena.world}/vault/seed") == []


@pytest.mark.attack("write anywhere but /out, the fork, /tmp and /dev/shm")
def test_write_outside_out(arena: Arena) -> None:
    allowed = {"/out", "/fork", "/fork/substrate", "/tmp", "/dev/shm"}
    # A checkout below /tmp: the folders on the way to its runtime stand on the sandbox's own tmpfs.
    allowed |= {str(parent) for parent in Path(sys.prefix).parents if parent.is_relative_to("/tmp")}
    assert {"/out", "/fork", "/tmp"} <= set(arena.attack("write_everywhere")) <= allowed


@pytest.mark.attack("open or make devices")
def test_devices_are_those_that_were_asked_for(arena: Arena) -> None:
    assert arena.attack("devices") == []
    # As root the node keeps its mode, and nobody may not open it; a graphics card's is open to everybody.
    look = "test -c /dev/fuse" if arena.who == "root" else ": <>/dev/fuse"
    assert arena.ask("plain", "sh", "-c", look)["code"] != 0
    assert arena.ask("plain", "sh", "-c", look, devices=["/dev/fuse"])["code"] == 0


@pytest.mark.attack("change the kernel's settings through /proc, /sys and system calls")
def test_kernel_settings(arena: Arena) -> None:
    assert arena.attack("kernel_settings") == []
