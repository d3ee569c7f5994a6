"""Test which devices a sandbox gets on made-up nodes with GPUs, and run slurm/all_reduce.py on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.config import settings
from pipeline.execution import image_process
from pipeline.sandbox import devices
from tests.support.paths import ROOT


@pytest.fixture
def dev(tmp_path) -> Path:
    """Files stand for nodes: what matters is which of them open."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "sda", "mem"):
        (tmp_path / name).touch()
    for name in ("nvidia-caps", "infiniband"):
        (tmp_path / name).mkdir()
    return tmp_path


def names(found: devices.NodeDevices) -> list[str]:
    return [Path(path).name for path in found.devices]


def test_gpus_and_their_controls_are_bound_and_nothing_else(dev):
    assert names(devices.of_node(2, "loopback", dev)) == [
        "nvidia-caps",
        "nvidia-uvm",
        "nvidia0",
        "nvidia1",
        "nvidiactl",
    ]


def test_only_the_fabric_level_has_infiniband(dev):
    assert "infiniband" in names(devices.of_node(2, "fabric", dev))
    assert "infiniband" not in names(devices.of_node(2, "loopback", dev))


def test_a_gpu_that_does_not_open_is_another_jobs(dev):
    """Slurm's cgroup refuses the open; a link that goes round in circles refuses it to root as well."""
    (dev / "nvidia1").unlink()
    (dev / "nvidia1").symlink_to("nvidia1")
    assert names(devices.of_node(2, "loopback", dev)) == ["nvidia-caps", "nvidia-uvm", "nvidia0", "nvidiactl"]


def test_no_gpu_where_there_should_be_some_is_said(dev):
    for number in (0, 1):
        (dev / f"nvidia{number}").unlink()
    with pytest.raises(WorkFailed, match=r"gpus_per_node = 2, but this job can open no GPU .*nvidiactl"):
        devices.of_node(2, "loopback", dev)
    assert devices.of_node(0, "loopback", dev) == devices.NodeDevices()


def test_network_variables_pass_and_nothing_else():
    environment = {"NCCL_IB_HCA": "mlx5", "CUDA_VISIBLE_DEVICES": "0,1", "AWS_SECRET": "x", "HOME": "/root"}
    assert devices.passed(environment) == {"CUDA_VISIBLE_DEVICES": "0,1", "NCCL_IB_HCA": "mlx5"}


def test_a_sandbox_has_the_shared_memory_of_the_sites_file():
    chosen = settings.compose(["cluster.shm_size_gib=7"])
    assert image_process.sandbox_of(chosen, {}, {}).limits.shm_size_bytes == 7 * 2**30
    with pytest.raises(ConfigError, match="cluster.network = open"):
        settings.compose(["cluster.network=open"])


def all_reduce(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "slurm" / "all_reduce.py"), "--bytes", str(2**20), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_all_reduce_reaches_from_rank_to_rank():
    done = all_reduce("cluster.shm_size_gib=1")
    assert done.returncode == 0, done.stderr
    assert "shm        1.0 GiB" in done.stdout
    assert "all-reduce 2 ranks over" in done.stdout
    assert "the sum is right" in done.stdout


def test_all_reduce_says_when_a_node_lacks_its_gpus():
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has an NVIDIA GPU")
    done = all_reduce("cluster.gpus_per_node=2")
    assert (done.returncode, done.stdout) == (1, "")
    assert "this job can open no GPU" in done.stderr
    assert "Traceback" not in done.stderr
