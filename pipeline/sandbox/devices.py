"""What a sandbox needs on a node with GPUs: device nodes, driver libraries, shared memory and the network between nodes, and nothing else.

Slurm's cgroup decides which nodes of /dev a job may open, and those that open are bound. A driver's libraries lie where the loader finds
them, mostly below /usr, which every sandbox has. A folder elsewhere (/usr/local/nvidia of a container, /opt) is bound and added to
LD_LIBRARY_PATH. NCCL reads the topology from /sys. It communicates through /dev/shm on a node and through /dev/infiniband between
nodes (network level `fabric`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.campaign.errors import WorkFailed

GPU_NODES = ("nvidia[0-9]*", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia-caps")
FABRIC_NODES = ("infiniband", "gdrdrv")
DRIVER_FOLDERS = (
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "/opt/nvidia/lib64",
)
PASSED = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
PASSED_PREFIXES = ("NCCL_", "FI_", "UCX_")  # a site's network variables, set in cluster.setup


@dataclass(frozen=True)
class NodeDevices:
    """The arguments of a `Sandbox` for this node: devices, further read-only binds, variables."""

    devices: tuple[str, ...] = ()
    read_only: Mapping[str, Path] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def of_node(gpus_per_node: int, network: str, dev: Path = Path("/dev")) -> NodeDevices:
    """What sandboxes on this node get. It is empty where the site's file says that a node has no GPUs.

    Raises WorkFailed where the node should have GPUs and none of them can be opened.
    """
    if not gpus_per_node:
        return NodeDevices()
    gpus = _openable(dev, GPU_NODES)
    if not any(Path(path).name.removeprefix("nvidia").isdigit() for path in gpus):
        there = ", ".join(sorted(path.name for path in dev.glob("nvidia*"))) or "none"
        raise WorkFailed(
            f"cluster.gpus_per_node = {gpus_per_node}, but this job can open no GPU on this node ({dev} has: {there})",
            "Request GPUs from Slurm (cluster.gpus_per_node becomes --gpus-per-node), or check the node with nvidia-smi",
        )
    fabric = _openable(dev, FABRIC_NODES) if network == "fabric" else ()
    drivers = {folder: Path(folder) for folder in DRIVER_FOLDERS if Path(folder).is_dir()}
    library_path = {"LD_LIBRARY_PATH": ":".join(drivers)} if drivers else {}
    outside = {folder: path for folder, path in drivers.items() if not folder.startswith("/usr/")}
    return NodeDevices((*gpus, *fabric), {"/sys": Path("/sys"), **outside}, {**library_path, **passed(os.environ)})


def passed(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of the job that a trial needs to communicate. None of them is a secret."""
    return {
        name: value for name, value in sorted(environment.items()) if name in PASSED or name.startswith(PASSED_PREFIXES)
    }


def _openable(dev: Path, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The device nodes that this job may open, and the folders of nodes, which are not examined further."""
    paths = sorted({path for pattern in patterns for path in dev.glob(pattern)})
    return tuple(str(path) for path in paths if path.is_dir() or _opens(path))


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    except OSError:
        return False
    return True
