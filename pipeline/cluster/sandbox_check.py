"""What `doctor` finds by playing the whole sandbox on this machine (sandbox/rehearsal.py), and the cure for what a kernel, a distribution or a
container forbids.

A refusal says little ("Operation not permitted"), so the cure follows from what the machine is set to: every setting that forbids namespaces
is named, and in a container the flags that allow them.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.cluster.site_check import Check
from pipeline.config import settings
from pipeline.sandbox import rehearsal

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
CONTAINER_FILES = (".dockerenv", "run/.containerenv", "run/systemd/container", ".singularity.d")
CONTAINER_VARIABLES = (
    "container",
    "APPTAINER_CONTAINER",
    "SINGULARITY_CONTAINER",
    "KUBERNETES_SERVICE_HOST",
    "ENROOT_ROOTFS",
)
SYS_ADMIN = 21  # the capability's bit
CONTAINER_CURE = (
    "start the container so that it may make namespaces and mounts: docker run --security-opt seccomp=unconfined --security-opt "
    "apparmor=unconfined --security-opt systempaths=unconfined --device /dev/fuse (podman: --security-opt unmask=ALL; Kubernetes: seccompProfile "
    "and appArmorProfile Unconfined, procMount Unmasked)"
)
PROC_CURE = (
    "parts of /proc are masked, as containers do, so no new /proc can be mounted: docker run --security-opt systempaths=unconfined, podman run "
    "--security-opt unmask=ALL, Kubernetes procMount: Unmasked"
)
LOOPBACK_CURE = (
    "the loopback of a new network namespace may not be set up. AppArmor refuses this to programs without a profile (as root: sysctl "
    "kernel.apparmor_restrict_unprivileged_userns=0, or load a profile for bwrap with `userns,`), and so do containers whose seccomp filter "
    "forbids it (docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined)"
)
ALLOW = "allow unprivileged user namespaces (AppArmor, SELinux, a container's seccomp filter)"
OTHERWISE = {
    "namespace": f"as root: sysctl user.max_user_namespaces=10000, and {ALLOW}",
    "image": "install squashfs-tools and squashfuse, and give cluster.scratch_dir (or TMPDIR) a local disk with free space",
    "fork": "set cluster.scratch_dir to a local disk (xfs, ext4 or tmpfs): overlays cannot lie on NFS or Lustre, and a copy needs space",
    "bubblewrap": f"install bubblewrap 0.8 or newer, and {ALLOW}",
    "network": LOOPBACK_CURE,
    "output": "set cluster.scratch_dir to a local disk that keeps owners and permissions",
    "limits": "install util-linux (prlimit), and raise the hard limits of this account (`ulimit -H -a`) where they are lower",
    "isolation": "do not train on this machine: what the check names can be reached from inside a sandbox",
}
"""Stage -> the cure where nothing on this machine explains the failure."""


def examine(chosen: settings.Settings) -> Iterator[Check]:
    """Play the sandbox. Yields a check for each stage: good, bad for the first that fails, and unknown for those after it.

    The failure is `unknown` if arms run in a container of the site (cluster.runtime), because only a node can play that one.
    """
    elsewhere = bool(chosen.cluster.runtime) and chosen.cluster.kind == "slurm"
    stages = rehearsal.rehearse(chosen.cluster.scratch_dir)
    for stage in stages:
        if stage.holds:
            yield Check(f"sandbox: {stage.name}", "good", stage.found)
            continue
        cure = "; ".join([stage.cure] if stage.cure else cures(stage.found) or [OTHERWISE[stage.name]])
        if elsewhere:
            cure += "; arms run in cluster.runtime on the nodes, where `python slurm/drill.py` plays the sandbox"
        yield Check(f"sandbox: {stage.name}", "unknown" if elsewhere else "bad", stage.found, cure)
    for name in rehearsal.STAGES[len(stages) :]:
        yield Check(f"sandbox: {name}", "unknown", "not played, because the stage before it failed", "")


def cures(found: str, root: Path = Path("/")) -> list[str]:
    """What this machine forbids that explains a refusal, as sentences to follow. root: where /proc and the others are looked for.

    found: the words of the program that was refused. Empty where nothing explains them.
    """
    known: list[str] = []
    if "nknown option" in found:
        return ["install bubblewrap 0.8 or newer; this one does not know an option of ours"]
    if re.search(r"mount(ing)? proc|newroot/proc", found):
        known.append(PROC_CURE)
    zero = [kind for kind in NAMESPACES if _setting(root, f"user.max_{kind}_namespaces") == "0"]
    known += [
        f"as root: sysctl user.max_{kind}_namespaces=10000 (it is 0; for good in /etc/sysctl.d/)" for kind in zero
    ]
    if _setting(root, "kernel.unprivileged_userns_clone") == "0":
        known.append("as root: sysctl kernel.unprivileged_userns_clone=1 (it is 0; for good in /etc/sysctl.d/)")
    if _setting(root, "kernel.apparmor_restrict_unprivileged_userns") == "1":
        known.append(
            "as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0 (it is 1, as on Ubuntu 24.04; for good in /etc/sysctl.d/), or load "
            "AppArmor profiles for bwrap and unshare that have `userns,`"
        )
    if not known and re.search(r"ENOSPC|No space left on device", found) and re.search(r"unshare|namespace", found):
        known.append(
            "as root: raise user.max_user_namespaces and the other user.max_*_namespaces, of which too many are in use or nested"
        )
    if (program := shutil.which("bwrap")) and os.stat(program).st_mode & stat.S_ISUID:
        known.append(
            f"as root: chmod u-s {program}, because a set-uid bubblewrap cannot do all that ours must, and a nosuid mount stops it"
        )
    if not known and re.search(r"loopback|RTM_|NETLINK", found):
        known.append(LOOPBACK_CURE)
    if _is_refusal(found) and _is_contained(root):
        known.append(CONTAINER_CURE)
        if os.geteuid() == 0 and not _has_sys_admin(root):
            known.append("its root needs --cap-add SYS_ADMIN, or be an ordinary user in it")
    if _is_refusal(found) and _text(root / "sys/fs/selinux/enforce") == "1":
        known.append("SELinux is enforcing: `ausearch -m avc -ts recent` shows what it refused")
    return known


def _is_refusal(found: str) -> bool:
    return bool(re.search(r"not permitted|[Pp]ermission|EPERM|EACCES|denied|Function not implemented", found))


def _is_contained(root: Path) -> bool:
    """Whether this is a container, or a process whose system calls are filtered as in one."""
    marked = any((root / name).exists() for name in CONTAINER_FILES) or any(
        os.environ.get(name) for name in CONTAINER_VARIABLES
    )
    return marked or bool(re.search(r"^Seccomp:\s*2$", _text(root / "proc/self/status"), re.MULTILINE))


def _has_sys_admin(root: Path) -> bool:
    held = re.search(r"^CapEff:\s*([0-9a-f]+)$", _text(root / "proc/self/status"), re.MULTILINE)
    return bool(held and int(held[1], 16) >> SYS_ADMIN & 1)


def _setting(root: Path, name: str) -> str:
    """The value of a sysctl; empty where this kernel has none of that name."""
    return _text(root / "proc/sys" / name.replace(".", "/"))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
