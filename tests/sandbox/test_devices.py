"""Test which devices a sandbox gets on made-up nodes with GPUs, and run slurm/all_reduce.py on this machine."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given as given_by_hypothesis
from hypothesis import strategies as st

from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.cluster import local_runner
from pipeline.config import settings
from pipeline.execution import image_process
from pipeline.sandbox import devices
from tests.support.paths import ROOT


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """A node of four GPUs. Files stand for device nodes: what matters is which of them open."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "sda", "mem"):
        (tmp_path / name).touch()
    for name in ("nvidia-caps/nvidia-cap21", "nvidia-caps/nvidia-cap30", "infiniband/uverbs0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def close(dev: Path, *names: str) -> None:
    """As Slurm's cgroup refuses the open; a link that goes round in circles refuses it to root as well."""
    for name in names:
        (dev / name).unlink()
        (dev / name).symlink_to(Path(name).name)


def names(found: devices.NodeDevices) -> list[str]:
    return [Path(path).name for path in found.devices]


def given(dev: Path, needed: int, network: str = "loopback", **variables: str) -> devices.NodeDevices:
    return devices.of_node(needed, network, dev, variables, dev / "gpus")


def gpus(found: devices.NodeDevices) -> tuple[tuple[int, ...], str]:
    return found.gpus, found.env["CUDA_VISIBLE_DEVICES"]


def test_gpus_and_their_controls_are_bound_and_nothing_else(dev):
    assert names(given(dev, 4)) == ["nvidia-uvm", "nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl"]


def test_only_the_fabric_level_has_infiniband(dev):
    assert "uverbs0" in names(given(dev, 4, "fabric"))
    assert "uverbs0" not in names(given(dev, 4))


def test_a_job_gets_the_gpus_that_slurm_names_where_every_node_opens(dev):
    """Without a cgroup all four open, and the numbers of Slurm's variables are those of the node."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "2-3", "CUDA_VISIBLE_DEVICES": "2,3"}
    found = given(dev, 2, **job)
    assert gpus(found) == ((2, 3), "0,1"), "inside the sandbox CUDA counts the nodes that are there"
    assert [name for name in names(found) if name[-1].isdigit() and "cap" not in name] == ["nvidia2", "nvidia3"]
    assert gpus(given(dev, 1, SLURM_JOB_ID="7", SLURM_JOB_GPUS="0,1,2,3", SLURM_STEP_GPUS="1")) == ((1,), "0")
    assert gpus(given(dev, 1, SLURM_JOB_ID="7", SLURM_JOB_GPUS="1,2", CUDA_VISIBLE_DEVICES="2")) == ((2,), "0")


@pytest.mark.parametrize("visible", ["0,1", "", "GPU-22,GPU-33"])
def test_a_cgroup_makes_cuda_count_from_0_among_the_gpus_that_open(dev, visible):
    close(dev, "nvidia0", "nvidia1")
    describe(dev)
    found = given(dev, 2, SLURM_JOB_ID="7", SLURM_JOB_GPUS="2,3", CUDA_VISIBLE_DEVICES=visible)
    assert gpus(found) == ((2, 3), visible if "GPU" in visible else "0,1")
    assert gpus(given(dev, 1, SLURM_JOB_ID="7", CUDA_VISIBLE_DEVICES="1")) == ((3,), "0")


def describe(dev: Path) -> None:
    """What the driver tells of each GPU."""
    for number in range(4):
        (dev / "gpus" / f"0000:0{number}:00.0").mkdir(parents=True)
        text = f"Model: \t\t NVIDIA H200\nGPU UUID: \t GPU-{number}{number}\nDevice Minor: \t {number}\n"
        (dev / "gpus" / f"0000:0{number}:00.0" / "information").write_text(text)


def test_uuids_are_found_by_what_the_driver_tells(dev):
    describe(dev)
    asked = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "2"}
    assert gpus(given(dev, 2, **asked, CUDA_VISIBLE_DEVICES="GPU-33,GPU-11")) == ((1, 3), "GPU-33,GPU-11")
    with pytest.raises(
        WorkFailed, match="GPU-99, which is no GPU that .* lists. Let the site's prolog name GPUs by number"
    ):
        given(dev, 1, CUDA_VISIBLE_DEVICES="GPU-99")


MIG = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "MIG-5c1f"}


@pytest.fixture
def parts(dev: Path) -> Path:
    """The same node with two parts in nvidia0, whose nodes have the driver's own modes: everybody may read them, nobody write."""
    for path in dev.glob("nvidia-caps/*"):
        path.unlink()
    for number, mode in {1: 0o400, 2: 0o444, 21: 0o444, 22: 0o444, 30: 0o444, 31: 0o444}.items():
        (dev / "nvidia-caps" / f"nvidia-cap{number}").touch(mode)
    return dev


def test_a_part_of_a_gpu_needs_a_cgroup_that_keeps_its_siblings_out(parts):
    with pytest.raises(WorkFailed, match="4 GPUs and 4 nodes of parts open here.*ConstrainDevices=yes"):
        given(parts, 1, **MIG)
    close(parts, "nvidia-caps/nvidia-cap21", "nvidia-caps/nvidia-cap22")
    with pytest.raises(WorkFailed, match="4 GPUs and 2 nodes of parts open here"):
        given(parts, 1, **MIG)
    close(parts, "nvidia1", "nvidia2", "nvidia3")
    found = given(parts, 1, **MIG)
    assert gpus(found) == ((0,), "MIG-5c1f")
    assert names(found) == ["nvidia-cap30", "nvidia-cap31", "nvidia-uvm", "nvidia0", "nvidiactl"]
    assert local_runner.shared_out(found, 1, 8) == [""], "one arm at a time"
    assert given(parts, 1, **MIG, POSTRAIN_GPUS="") == found
    with pytest.raises(WorkFailed, match="this work needs 2 GPUs"):
        given(parts, 2, **MIG)


def test_parts_are_refused_to_an_ordinary_user_where_nothing_hides_the_others(parts):
    """Root may open what nobody may write; so the question is asked as another user, as every arm's job asks it."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        shutil.copytree(parts, folder, dirs_exist_ok=True)
        for path in (Path(folder), *Path(folder).glob("nvidia*")):
            path.chmod(0o777)
        code = f"import os, sys; from pathlib import Path; sys.path.insert(0, {str(ROOT)!r})\n"
        code += "from pipeline.sandbox import devices\nos.setgid(65534); os.setuid(65534)\n"
        code += f"devices.of_node(1, 'loopback', Path({folder!r}), {MIG!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "4 GPUs and 4 nodes of parts open here" in done.stderr


@pytest.mark.parametrize("visible", ["0", "0,1", "GPU-11"])
def test_a_variable_that_a_login_shell_exported_gives_nothing_to_a_job_that_asked_for_no_gpu(dev, visible):
    describe(dev)
    job = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": visible}
    for requested in ({}, {"POSTRAIN_REQUESTED_GPUS": "0"}):
        with pytest.raises(WorkFailed, match="this job was given none on this node"):
            given(dev, 1, **job, **requested)
    assert len(given(dev, 1, **job, POSTRAIN_REQUESTED_GPUS="2").gpus) == len(visible.split(","))


numberings = st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True).map(sorted)


@given_by_hypothesis(numberings, st.data())
def test_arms_of_one_machine_have_gpus_of_their_own_and_all_that_were_given(numbers, data):
    """Whatever the numbers of the device nodes are, and whichever of them a person keeps to with CUDA_VISIBLE_DEVICES."""
    with tempfile.TemporaryDirectory() as folder:
        node = Path(folder)
        for number in numbers:
            (node / f"nvidia{number}").touch()
        places = sorted(data.draw(st.sets(st.sampled_from(range(len(numbers))), min_size=1)))
        variables = data.draw(st.sampled_from([{}, {"CUDA_VISIBLE_DEVICES": ",".join(map(str, places))}]))
        parent = devices.of_node(1, "loopback", node, variables)
        mine = parent.gpus
        assert mine == (tuple(numbers[place] for place in places) if variables else tuple(numbers))
        size = data.draw(st.integers(1, len(mine)))
        most = data.draw(st.integers(size, len(mine)))
        shares = local_runner.shared_out(parent, size, most)
        arms = [devices.of_node(size, "loopback", node, {**variables, "POSTRAIN_GPUS": share}) for share in shares]
        assert all(len(arm.gpus) == size for arm in arms)
        assert all(arm.env["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, range(size))) for arm in arms)
        held = [gpu for arm in arms for gpu in arm.gpus]
        assert held == list(mine[: len(shares) * size]) and most - len(held) < size


def test_a_share_is_part_of_what_the_parent_was_given(dev):
    with pytest.raises(WorkFailed, match="nvidia1 does not open here or is not this job's"):
        given(dev, 1, SLURM_JOB_ID="7", SLURM_JOB_GPUS="2,3", POSTRAIN_GPUS="1")


@pytest.mark.parametrize("variables", [{}, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, {"NVIDIA_VISIBLE_DEVICES": "void"}])
def test_a_job_to_which_slurm_gave_no_gpu_has_none_although_all_open(dev, variables):
    with pytest.raises(WorkFailed, match="this work needs 1 GPUs, but this job was given none on this node"):
        given(dev, 1, SLURM_JOB_ID="7", **variables)
    assert gpus(given(dev, 1)) == ((0, 1, 2, 3), "0,1,2,3"), "outside of Slurm they are the user's"


def test_void_keeps_a_container_from_having_gpus_and_is_named(tmp_path):
    with pytest.raises(
        WorkFailed, match="NVIDIA_VISIBLE_DEVICES=void keeps a container .*`export NVIDIA_VISIBLE_DEVICES=all"
    ):
        given(tmp_path, 1, SLURM_JOB_ID="7", NVIDIA_VISIBLE_DEVICES="void", SLURM_JOB_GPUS="0")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_JOB_GPUS": "4,5"}, "the GPUs 4,5 are named, but /dev/nvidia4 does not open here"),
        (
            {"SLURM_JOB_GPUS": "1,2", "CUDA_VISIBLE_DEVICES": "0"},
            r"CUDA_VISIBLE_DEVICES = 0, but this job has the GPUs \[1, 2\]. CUDA counts from 0",
        ),
        (
            {"SLURM_JOB_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "5"},
            r"CUDA_VISIBLE_DEVICES = 5, but this job has the GPUs \[0, 1\]",
        ),
        ({"SLURM_JOB_GPUS": "3"}, "this work needs 2 GPUs, but this job was given 1"),
    ],
)
def test_variables_that_contradict_the_node_are_named(dev, variables, words):
    with pytest.raises(WorkFailed, match=words):
        given(dev, 2, SLURM_JOB_ID="7", **variables)


def test_the_fabric_network_is_refused_on_a_node_that_other_jobs_share(dev):
    with pytest.raises(WorkFailed, match="this job has 2 of this node's 4 GPUs, so other jobs share the node"):
        given(dev, 2, "fabric", SLURM_JOB_ID="7", SLURM_JOB_GPUS="0,1")


def test_the_fabric_network_is_refused_in_a_container_that_shows_some_of_a_node_s_gpus(dev):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0,1,2,3"}
    with pytest.raises(WorkFailed, match="this job has 4 of this node's 8 GPUs, so other jobs share the node"):
        devices.of_node(4, "fabric", dev, job, dev / "gpus", on_node=8)
    assert devices.of_node(4, "fabric", dev, job, dev / "gpus", on_node=4).gpus == (0, 1, 2, 3)


def test_no_gpu_where_there_should_be_some_is_said(dev):
    for number in range(4):
        (dev / f"nvidia{number}").unlink()
    with pytest.raises(WorkFailed, match=r"needs 2 GPUs, but this job was given none .*nvidiactl"):
        given(dev, 2)
    assert given(dev, 0) == devices.NodeDevices()


def test_network_variables_pass_and_nothing_else():
    environment = {"NCCL_IB_HCA": "mlx5", "CUDA_VISIBLE_DEVICES": "0,1", "AWS_SECRET": "x", "HOME": "/root"}
    assert devices.passed(environment) == {"NCCL_IB_HCA": "mlx5"}


def test_a_sandbox_has_the_shared_memory_of_the_sites_file():
    chosen = settings.compose(["cluster.shm_size_gib=7"])
    assert image_process.sandbox_of(chosen, {}, {}, 2).limits.shm_size_bytes == 7 * 2**30
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
    assert "this job was given none on this node" in done.stderr
    assert "Traceback" not in done.stderr
