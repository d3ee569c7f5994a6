"""Test `cluster.runtime`: stages train and judge in a container, here bubblewrap, and a missing runtime is reported.

The stand-in shares with the host what apptainer and pyxis share: processes, network, /proc and /dev. It has a
root of its own, with the system's folders, Python, the checkout, the campaign, and an empty /tmp.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError, NotFound
from pipeline.campaign.files import read_json, read_json_lines
from pipeline.campaign.layout import Campaign
from pipeline.cluster import local_runner, stage_command
from pipeline.execution.results import read_attributes
from pipeline.rounds import freeze
from tests.support.campaigns import OVERRIDES, fresh_campaign, tree

LINKS = [path for path in ("/bin", "/lib", "/lib64", "/sbin") if os.path.islink(path)]


def container(seen: Path, *flags: str) -> list[str]:
    """Words that start this Python in a root file system of its own, in which `seen` may be written."""
    needed = dict.fromkeys((sys.base_prefix, sys.prefix))
    read_only = ["/usr", "/etc", *(path for path in needed if not path.startswith("/usr"))]
    words = ["bwrap", "--unshare-uts", "--hostname", "container", "--die-with-parent", *flags, "--tmpfs", "/tmp"]
    for path in read_only:
        words += ["--ro-bind", path, path]
    for link in LINKS:
        words += ["--symlink", os.readlink(link), link]
    words += [
        "--bind",
        "/proc",
        "/proc",
        "--dev-bind",
        "/dev",
        "/dev",
        "--ro-bind",
        "/sys",
        "/sys",
        "--bind",
        str(seen),
        str(seen),
    ]
    return [*words, "--chdir", "/tmp", "--", sys.executable]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    made = fresh_campaign(tmp_path_factory.mktemp("campaigns"))
    freeze.freeze(made, "r0001", OVERRIDES)
    return made


def code_of(campaign: Campaign) -> Path:
    (code_dir,) = campaign.code_dir.iterdir()
    return code_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "flags"),
    [
        pytest.param("a0", ["--cap-add", "ALL"], id="as root"),
        pytest.param("a1", ["--unshare-user"], id="in a user namespace", marks=pytest.mark.long),
    ],
)
def test_a_whole_arm_in_a_container_of_the_site_s(campaign, tmp_path, arm, flags):
    if os.geteuid() != 0 and "ALL" in flags:
        pytest.skip("needs root")
    hidden = tmp_path / "hidden"
    hidden.touch()
    runtime = container(campaign.folder, *flags)
    looked = subprocess.run(
        [*runtime, "-c", f"import os; print(os.path.exists({str(hidden)!r}))"], capture_output=True, text=True
    )
    assert looked.stdout == "False\n", looked.stderr
    stage = ("worker", str(campaign.folder), "r0001", arm)
    codes = local_runner.run_local([stage], code_of(campaign), 1, tmp_path / "logs", runtime=runtime)
    folder = campaign.round("r0001")
    log = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert set(codes.values()) == {0}, log
    (attempt,) = folder.attempts(arm)
    assert read_json(attempt.claim)["host"] == "container"
    found = read_attributes(folder.published(arm))
    assert found["status"] == "completed"
    assert not any(check["reached"] for check in read_json(attempt.probe).values())
    phases = [mark["phase"] for mark in read_json_lines(attempt.phases)]
    assert {"probe", "train", "generate", "publish"} <= set(phases)


def test_a_round_here_is_not_frozen_for_a_runtime_that_is_not_here(tmp_path):
    campaign = fresh_campaign(tmp_path)
    before = tree(campaign.folder)
    with pytest.raises(
        NotFound, match="cluster.runtime begins with apptainer-of-the-site, which is no program on .* Install it there"
    ):
        freeze.freeze(campaign, "r0001", [*OVERRIDES, "cluster.runtime=[apptainer-of-the-site,exec,python3]"])
    assert tree(campaign.folder) == before


def test_a_stage_whose_runtime_is_not_on_the_node_ends_with_the_cure(tmp_path, campaign):
    """As in a job: POSTRAIN_RUNTIME is what `cluster.runtime` became."""
    program = "import sys; from pipeline.cluster.slurm_submit import run_stage; run_stage('worker', *sys.argv[1:])"
    environment = {
        **os.environ,
        "PYTHONPATH": str(code_of(campaign)),
        "POSTRAIN_RUNTIME": "apptainer-of-the-site exec python3",
    }
    command = [sys.executable, "-P", "-c", program, str(campaign.folder), "r0001", "a7"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith("NotFound: cluster.runtime begins with apptainer-of-the-site, which is no program on")
    assert "put it on PATH in cluster.setup" in done.stderr and "Traceback" not in done.stderr
    assert not campaign.round("r0001").attempts("a7")


def test_what_talks_to_slurm_stays_outside(monkeypatch):
    monkeypatch.setenv("POSTRAIN_RUNTIME", f"{shutil.which('env')} $IMAGE python3")
    monkeypatch.setenv("IMAGE", "/shared/run time.sif")
    assert stage_command.command(("rerun", "runs/demo", "r0001", "a0"))[0] == sys.executable
    stage = ("worker", "runs/demo", "r0001", "a0", "--plan", "0f")
    assert stage_command.command(stage)[1:] == [
        "/shared/run time.sif", "python3", "-P", "-m", "pipeline", "worker", "runs/demo", "--round", "r0001", "a0", "--plan", "0f",
    ]  # fmt: skip
