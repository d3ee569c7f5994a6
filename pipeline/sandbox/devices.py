"""What a sandbox needs on a node with GPUs: device nodes, driver libraries, shared memory and the network between nodes, and nothing else.

Several jobs may share a node, so only the GPUs that Slurm gave this job are bound. Sites say which those are in different ways:

    Slurm's cgroup (ConstrainDevices)     the other nodes of /dev do not open
    a container                           the other nodes of /dev are not there
    SLURM_STEP_GPUS, SLURM_JOB_GPUS       numbers of the node's GPUs, where every node of /dev opens
    CUDA_VISIBLE_DEVICES                  numbers from 0 among the GPUs that open, as CUDA reads it; or UUIDs (GPU-5c1f...), which
                                          /proc/driver/nvidia/gpus maps to numbers. In a job that did not ask for GPUs it says nothing
    MIG-...                               a part of a GPU: only a cgroup can keep its siblings out, so one is required
    POSTRAIN_GPUS                         ours: which of these this arm has, where one process starts several arms (local_runner.py)

Inside a sandbox the GPUs are numbered anew, because CUDA counts those whose node is there. A driver's libraries lie where the loader finds
them, mostly below /usr, which every sandbox has. A folder elsewhere (/usr/local/nvidia of a container, /opt) is bound and added to
LD_LIBRARY_PATH. NCCL reads the topology from /sys. It communicates through /dev/shm on a node and through /dev/infiniband between
nodes (network level `fabric`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.campaign.errors import WorkFailed

CONTROLS = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")
PARTS = "nvidia-caps/nvidia-cap*"  # a part of a GPU (MIG) has two: of its GPU instance and of its compute instance
NOT_PARTS = ("nvidia-cap1", "nvidia-cap2")  # those that divide and watch GPUs
FABRIC_NODES = ("infiniband/*", "gdrdrv")
DRIVER_FOLDERS = (
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "/opt/nvidia/lib64",
)
INFORMATION = Path("/proc/driver/nvidia/gpus")
PROCESSOR = Path("/proc/cpuinfo")
NUMBERED = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")  # numbers on the node, whatever a cgroup hides; the step's come first
SHARE = "POSTRAIN_GPUS"  # numbers on the node
REQUESTED = "POSTRAIN_REQUESTED_GPUS"  # how many this job asked for; its script exports it
VISIBLE = (
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)
"""Variables with which Slurm, or a person, says which GPUs a process may use. They are true of the job that has them alone."""
NONE_GIVEN = ("", "void", "none", "NoDevFiles", "-1")
PASSED_PREFIXES = ("NCCL_", "FI_", "UCX_")  # a site's network variables, set in cluster.setup


@dataclass(frozen=True)
class NodeDevices:
    """The arguments of a `Sandbox` for this node: devices, further read-only binds, variables. gpus: numbers of its GPUs in /dev."""

    devices: tuple[str, ...] = ()
    read_only: Mapping[str, Path] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[int, ...] = ()


def of_node(
    needed: int,
    network: str,
    dev: Path = Path("/dev"),
    environment: Mapping[str, str] | None = None,
    information: Path = INFORMATION,
    on_node: int = 0,
) -> NodeDevices:
    """What sandboxes of this job get on this node. It is empty where the work needs no GPU (`needed` 0).

    environment: of the job, this process's by default. information: the driver's folder that describes each GPU. on_node: how many GPUs the
    site's nodes have, because a container shows no others than the job's.

    Raises WorkFailed where Slurm gave fewer GPUs than are needed, where it does not say which, and for the network level `fabric` on a node
    that other jobs share.
    """
    if not needed:
        return NodeDevices()
    variables = os.environ if environment is None else environment
    there, openable = _numbers(dev), [number for number in _numbers(dev) if _opens(dev / f"nvidia{number}")]
    words = [word for word in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if word not in NONE_GIVEN]
    parts: tuple[str, ...] = ()
    if openable and any(word.startswith("MIG-") for word in words):
        parts = _parts(dev, openable, words)
        given, visible = openable, words
    else:
        given, visible = _given(there, openable, words, variables, information)
    if len(visible) < needed or not given:
        nodes = ", ".join(sorted(path.name for path in dev.glob("nvidia*"))) or "none"
        hidden = variables.get("NVIDIA_VISIBLE_DEVICES", "")
        void = (
            f"; NVIDIA_VISIBLE_DEVICES={hidden} keeps a container from mounting GPUs"
            if hidden in NONE_GIVEN[1:]
            else ""
        )
        raise WorkFailed(
            f"this work needs {needed} GPUs, but this job was given {len(given) or 'none'} on this node ({dev} has: {nodes}{void})",
            "Request GPUs from Slurm (they follow from parallelism and cluster.gpus_per_node), or check the node with nvidia-smi"
            + ("; `export NVIDIA_VISIBLE_DEVICES=all` in cluster.setup" if void else ""),
        )
    whole = max(len(there), on_node)
    if network == "fabric" and len(given) < whole:
        raise WorkFailed(
            f"this job has {len(given)} of this node's {whole} GPUs, so other jobs share the node, and network=fabric would give a trial "
            "their network",
            "Use network=loopback for arms that fit into a node; arms of several nodes take whole nodes",
        )
    fabric = _openable(dev, FABRIC_NODES) if network == "fabric" else ()
    bound = (*(str(dev / f"nvidia{number}") for number in given), *_openable(dev, CONTROLS), *parts, *fabric)
    drivers = {folder: Path(folder) for folder in DRIVER_FOLDERS if Path(folder).is_dir()}
    library_path = {"LD_LIBRARY_PATH": ":".join(drivers)} if drivers else {}
    outside = {folder: path for folder, path in drivers.items() if not folder.startswith("/usr/")}
    env = {**library_path, **passed(variables), "CUDA_VISIBLE_DEVICES": ",".join(visible)}
    return NodeDevices(tuple(sorted(bound)), {"/sys": Path("/sys"), **outside}, env, tuple(given))


def kind_of(node: NodeDevices | None, information: Path = INFORMATION, processor: Path = PROCESSOR) -> str:
    """The type of these GPUs as the driver names it ("NVIDIA H200"); without GPUs that of the CPU, with a digest of what it can do."""
    if node is None:
        told = dict(
            re.findall(r"^(model name|flags|Features|CPU part)\s*:\s*(.*)$", processor.read_text(), re.MULTILINE)
        )
        digest = hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()[:8]
        return f"cpu {digest} {told.get('model name', platform.machine())}"
    names = {number: name for number, name in _told(information, "Model").items() if number in node.gpus}
    kinds = " ".join(sorted({name for name in names.values()})) or "gpu of unknown type"
    return f"part of {kinds}" if node.env.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-") else kinds


def passed(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of the job that a trial needs to communicate. None of them is a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name == "CUDA_DEVICE_ORDER" or name.startswith(PASSED_PREFIXES)
    }


def _given(
    there: Sequence[int], openable: Sequence[int], words: Sequence[str], variables: Mapping[str, str], information: Path
) -> tuple[list[int], list[str]]:
    """(numbers of the GPUs that this process was given, CUDA_VISIBLE_DEVICES inside the sandbox).

    there: the node's GPUs. openable: those that open. words: of CUDA_VISIBLE_DEVICES. Raises WorkFailed where the variables and /dev
    contradict one another.
    """
    if not openable:
        return [], []
    is_constrained = len(openable) < len(there)
    numbered = next((variables[name] for name in NUMBERED if variables.get(name)), "")
    job = _expanded(numbered)
    given = list(openable)
    if job and not is_constrained:
        given = _among(job, openable, numbered)
    elif variables.get("SLURM_JOB_ID") and not is_constrained:
        # The node's GPUs open, and Slurm names none: a variable that a login shell exported would name somebody else's.
        has_asked = any(variables.get(name, "0") != "0" for name in (REQUESTED, "SLURM_GPUS_ON_NODE"))
        if not (has_asked and words):
            return [], []
    uuids = [word for word in words if not word.isdigit()]
    if uuids:
        by_uuid = _by_uuid(information)
        if unknown := [word for word in uuids if word not in by_uuid]:
            raise WorkFailed(
                f"CUDA_VISIBLE_DEVICES names {unknown[0]}, which is no GPU that {information} lists",
                "Let the site's prolog name GPUs by number, or mount /proc/driver/nvidia",
            )
        given = _among([by_uuid[word] for word in uuids], given, ",".join(uuids))
    elif words:
        given = _counted(sorted(set(map(int, words))), openable, given)
    if share := variables.get(SHARE):
        return (shared := _among(_expanded(share), given, share)), _from_0(shared)
    return given, uuids or _from_0(given)


def _counted(chosen: list[int], openable: Sequence[int], given: list[int]) -> list[int]:
    """The GPUs that numbers in CUDA_VISIBLE_DEVICES mean. Raises WorkFailed where they mean others than the job's."""
    if chosen in (given, list(range(len(given)))):  # all of them, by number or counted among the job's
        return given
    meant = [openable[number] for number in chosen if number < len(openable)]
    if len(meant) < len(chosen) or not set(meant) <= set(given):
        raise WorkFailed(
            f"CUDA_VISIBLE_DEVICES = {','.join(map(str, chosen))}, but this job has the GPUs {given}",
            f"CUDA counts from 0 among the GPUs that open here ({list(openable)}). Check what the site's prolog or cluster.setup exports",
        )
    return meant


def _parts(dev: Path, openable: Sequence[int], words: Sequence[str]) -> tuple[str, ...]:
    """The device nodes that open parts of GPUs (MIG) to this job. words: the parts' names.

    The driver lets everybody read them, so only a cgroup keeps a job out of others. Raises WorkFailed where more opens than the parts have:
    two nodes each, and one GPU.
    """
    nodes = [path for path in sorted(dev.glob(PARTS)) if path.name not in NOT_PARTS and _opens(path, os.O_RDONLY)]
    if not nodes or len(nodes) > 2 * len(words) or len(openable) > len(words):
        raise WorkFailed(
            f"CUDA_VISIBLE_DEVICES = {','.join(words)} names parts of a GPU, and {len(openable)} GPUs and {len(nodes)} nodes of parts open here, "
            "so nothing would keep this arm out of the others",
            "The site sets ConstrainDevices=yes in cgroup.conf and names each part's nodes in gres.conf, or ask for whole GPUs "
            "(cluster.gpu_type)",
        )
    return tuple(map(str, nodes))


def _from_0(given: Sequence[int]) -> list[str]:
    return [str(number) for number in range(len(given))]


def _among(wanted: Sequence[int], usable: Sequence[int], named: str) -> list[int]:
    """The wanted numbers, sorted. Raises WorkFailed where one of them does not open. named: the variable's text."""
    if missing := sorted(set(wanted) - set(usable)):
        raise WorkFailed(
            f"the GPUs {named} are named, but /dev/nvidia{missing[0]} does not open here or is not this job's (these are: {list(usable)})",
            "The numbers in the site's gres.conf must be those of the device files (AutoDetect=nvml does that)",
        )
    return sorted(wanted)


def _expanded(text: str) -> list[int]:
    """The numbers of a list such as 0,2-3; empty for a text that is none."""
    numbers: list[int] = []
    for part in text.split(",") if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text) else []:
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _by_uuid(information: Path) -> dict[str, int]:
    """UUID of a GPU -> its number in /dev, as the driver tells."""
    return {uuid: number for number, uuid in _told(information, "GPU UUID").items()}


def _told(information: Path, what: str) -> dict[int, str]:
    """Number of a GPU in /dev -> what the driver tells of it under this name."""
    found = {}
    for path in information.glob("*/information"):
        told = dict(re.findall(rf"^({what}|Device Minor):\s*(.*\S)", path.read_text(), re.MULTILINE))
        if len(told) == 2:
            found[int(told["Device Minor"])] = told[what]
    return found


def _numbers(dev: Path) -> list[int]:
    """The numbers of the node's GPUs."""
    return sorted(int(path.name[6:]) for path in dev.glob("nvidia[0-9]*") if path.name[6:].isdigit())


def _openable(dev: Path, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The device nodes that this job may open."""
    paths = sorted({path for pattern in patterns for path in dev.glob(pattern)})
    return tuple(str(path) for path in paths if not path.is_dir() and _opens(path))


def _opens(path: Path, how: int = os.O_RDWR) -> bool:
    try:
        os.close(os.open(path, how | os.O_NONBLOCK))
    except OSError:
        return False
    return True
