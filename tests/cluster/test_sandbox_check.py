"""Test that `doctor` plays the whole sandbox: every stage holds here, and what a kernel or a container forbids has its stage and its cure.

The refusals are real where an ordinary process can cause them: limits of a user namespace of its own, a filter of system calls as containers
have it, programs that are absent or old. Settings that only root of the whole machine could make are read from a folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster import sandbox_check
from pipeline.sandbox import rehearsal
from tests.support.paths import ROOT

PLAY = """
import json
from types import SimpleNamespace
from pipeline.cluster import sandbox_check
cluster = SimpleNamespace(**{"kind": "local", "runtime": [], "scratch_dir": "", **CLUSTER})
print(json.dumps([vars(check) for check in sandbox_check.examine(SimpleNamespace(cluster=cluster))]))
"""
AS_USER = ["unshare", "--user", "--map-root-user"]
# Refuses system calls with EPERM, as a container's filter does. Arguments: their numbers on x86_64, then a command.
FILTER = """
import ctypes, os, struct, sys
denied = [int(number) for number in sys.argv[1].split(",")]
code = [struct.pack("HBBI", 0x20, 0, 0, 0)]
code += [struct.pack("HBBI", 0x15, len(denied) - place, 0, number) for place, number in enumerate(denied)]
code += [struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000), struct.pack("HBBI", 0x06, 0, 0, 0x00050001)]
buffer = ctypes.create_string_buffer(b"".join(code))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(code), ctypes.addressof(buffer))), 0, 0) == 0
os.execvp(sys.argv[2], sys.argv[2:])
"""
UNSHARE, MOUNT, PIVOT_ROOT = 272, 165, 155


def played(*before: str, cluster: dict[str, object] | None = None, **environment: str) -> dict[str, dict[str, str]]:
    """The checks of a process that is started with the words `before`, by stage. cluster: keys of the configuration."""
    code = PLAY.replace("CLUSTER", repr(cluster or {}))
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([*before, sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {check["name"].removeprefix("sandbox: "): check for check in json.loads(done.stdout)}
    assert list(found) == list(rehearsal.STAGES)
    return found


def failure(found: dict[str, dict[str, str]]) -> tuple[str, str]:
    """(stage, cure) of the one stage that failed. Those before it hold, and those after it were not played."""
    verdicts = [check["verdict"] for check in found.values()]
    place = verdicts.index("bad")
    assert verdicts == ["good"] * place + ["bad"] + ["unknown"] * (len(verdicts) - place - 1)
    check = list(found.values())[place]
    assert check["found"] and check["cure"]
    return list(found)[place], check["cure"]


def program(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize("who", [[], AS_USER], ids=["as I am", "as an ordinary user"])
def test_case_17_every_stage_holds_on_this_machine(who):
    found = played(*who)
    assert {check["verdict"] for check in found.values()} == {"good"}, found
    assert "two processes met over loopback" in found["network"]["found"]
    assert found["image"]["found"].startswith("mounted by ") and found["fork"]["found"].startswith("forked by ")


@pytest.mark.parametrize(
    ("kind", "stage"), [("mnt", "namespace"), ("user", "bubblewrap"), ("pid", "bubblewrap"), ("net", "network")]
)
def test_case_17_namespaces_that_a_sysctl_forbids(kind, stage):
    found = played(*AS_USER, "sh", "-c", f'echo 0 > /proc/sys/user/max_{kind}_namespaces; exec "$@"', "sh")
    assert failure(found) == (
        stage,
        f"as root: sysctl user.max_{kind}_namespaces=10000 (it is 0; for good in /etc/sysctl.d/)",
    )


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of system calls are those of x86_64")
@pytest.mark.parametrize(("call", "stage"), [(UNSHARE, "namespace"), (MOUNT, "namespace"), (PIVOT_ROOT, "bubblewrap")])
def test_case_17_system_calls_that_a_container_refuses(call, stage):
    found = played(*AS_USER, sys.executable, "-c", FILTER, str(call))
    assert failure(found)[0] == stage
    assert "--security-opt seccomp=unconfined" in failure(found)[1] and "Kubernetes" in failure(found)[1]


@pytest.mark.parametrize(
    ("words", "stage", "cure"),
    [
        (
            "bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted",
            "bubblewrap",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "bubblewrap", "systempaths=unconfined"),
        ("bwrap: Unknown option --disable-userns", "bubblewrap", "bubblewrap 0.8 or newer"),
        ("bwrap: something new", "bubblewrap", "allow unprivileged user namespaces"),
    ],
)
def test_case_17_what_bubblewrap_says_has_its_cure(tmp_path, words, stage, cure):
    path = program(tmp_path / "bin", "bwrap", f'echo "{words}" >&2; exit 1')
    found = played(*AS_USER, PATH=path)
    assert failure(found)[0] == stage and cure in failure(found)[1]
    assert words in found[stage]["found"]


def test_case_17_a_loopback_that_may_not_be_set_up_is_the_network_s_failure(tmp_path):
    """Only the sandbox with a network of its own fails, as on Ubuntu 24.04."""
    real = subprocess.run(["which", "bwrap"], capture_output=True, text=True).stdout.strip()
    refusal = 'echo "bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted" >&2; exit 1'
    path = program(tmp_path / "bin", "bwrap", f'case "$*" in *--share-net*) exec {real} "$@";; *) {refusal};; esac')
    stage, cure = failure(played(*AS_USER, PATH=path))
    assert stage == "network" and "AppArmor" in cure and "userns" in cure


def test_programs_that_are_absent_are_the_stage_that_needs_them(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("unshare", "mount", "umount", "setpriv", "squashfuse", "unsquashfs", "mksquashfs", "sh", "env", "rm"):
        found = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        (tmp_path / "bin" / name).symlink_to(found)
    assert failure(played(*AS_USER, PATH=str(tmp_path / "bin"))) == ("bubblewrap", "Install bubblewrap 0.8 or newer")
    (tmp_path / "bin" / "mksquashfs").unlink()
    stage, cure = failure(played(*AS_USER, PATH=str(tmp_path / "bin")))
    assert stage == "image" and "make setup" in cure


def test_a_scratch_folder_in_which_nobody_may_write_is_named(tmp_path):
    stage, cure = failure(played(cluster={"scratch_dir": f"{tmp_path}/absent"}))
    assert stage == "image" and "cluster.scratch_dir" in cure


def test_arms_in_a_site_s_container_are_not_judged_by_this_machine(tmp_path):
    path = program(tmp_path / "bin", "bwrap", "exit 1")
    found = played(*AS_USER, PATH=path, cluster={"kind": "slurm", "runtime": ["srun", "python3"]})
    assert found["bubblewrap"]["verdict"] == "unknown" and "slurm/drill.py" in found["bubblewrap"]["cure"]


REFUSED = "unshare: unshare failed: Operation not permitted"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"},
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ({"proc/sys/kernel/unprivileged_userns_clone": "0"}, "sysctl kernel.unprivileged_userns_clone=1"),
        ({"proc/sys/user/max_user_namespaces": "0"}, "sysctl user.max_user_namespaces=10000"),
        ({"sys/fs/selinux/enforce": "1"}, "ausearch -m avc"),
        ({".dockerenv": ""}, "--security-opt seccomp=unconfined"),
        ({"run/.containerenv": ""}, "podman: --security-opt unmask=ALL"),
        ({"proc/self/status": "Name:\tpython\nSeccomp:\t2\nCapEff:\t00000000a80425fb\n"}, "--device /dev/fuse"),
    ],
)
def test_case_17_what_the_machine_is_set_to_explains_a_refusal(tmp_path, files, words):
    assert sandbox_check.cures(REFUSED, tmp_path) == []
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert any(words in cure for cure in sandbox_check.cures(REFUSED, tmp_path))


def test_a_set_uid_bubblewrap_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "bwrap", "exit 1"))
    (tmp_path / "bin" / "bwrap").chmod(0o4755)
    (cure,) = sandbox_check.cures("bwrap: No permissions to create new namespace", tmp_path)
    assert cure.startswith(f"as root: chmod u-s {tmp_path}/bin/bwrap")


def test_the_scratch_folder_is_left_empty(tmp_path):
    assert all(stage.holds for stage in rehearsal.rehearse(str(tmp_path)))
    assert os.listdir(tmp_path) == []
