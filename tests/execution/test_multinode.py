"""Test arms of several nodes without Slurm: who waits for whom, which exit code counts, and what the image's launcher does with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError, TrialFailed
from pipeline.config import settings
from pipeline.execution import multinode
from pipeline.execution.multinode import MultiNodeProcess
from tests.support.paths import ROOT

WRITES_RANK = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
open(sys.argv[1] + os.environ["RANK"], "w").write(json.dumps({name: os.environ[name] for name in names}))
"""


class Local:
    """This node's process."""

    def __init__(self, code: int | None) -> None:
        self.returncode, self.timed_out, self.overspent, self.killed = code, False, "", False

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.killed = True
        self.returncode = self.returncode if self.returncode is not None else 137


def _processes(order_dir: Path, local: int | None, *others: int | None) -> tuple[MultiNodeProcess, Local]:
    order_dir.mkdir(exist_ok=True)
    for number, code in enumerate(others, start=1):
        if code is not None:
            (order_dir / f"{number}.json").write_text(json.dumps({"code": code}))
    process = Local(local)
    return MultiNodeProcess(process, order_dir, len(others)), process  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("local", "others", "code"),
    [(0, (0,), 0), (75, (75,), 75), (1, (137,), 137), (0, (1,), 1), (67, (1,), 67), (137, (139,), 137), (None, (0,), None), (0, (None,), None)],
)  # fmt: skip
def test_exit_code_of_all_nodes(
    tmp_path: Path, local: int | None, others: tuple[int | None, ...], code: int | None
) -> None:
    assert _processes(tmp_path / "00", local, *others)[0].poll() == code


def test_nodes_that_do_not_end_are_killed_when_one_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(multinode.time, "monotonic", lambda: now[0])
    processes, process = _processes(tmp_path / "00", None, 1)
    assert processes.poll() is None and not process.killed
    now[0] = multinode.GRACE_SECONDS + 1
    assert processes.poll() == 137 and process.killed
    assert (tmp_path / "00" / "end").exists()


def test_a_kill_reaches_every_node(tmp_path: Path) -> None:
    processes, process = _processes(tmp_path / "00", None, None)
    processes.kill()
    assert process.killed and (tmp_path / "00" / "end").exists() and processes.poll() == 137


def test_a_node_without_a_probe_is_no_part_of_a_score(tmp_path: Path) -> None:
    (tmp_path / "00").mkdir()
    with pytest.raises(TrialFailed, match="0 of 1 other nodes"):
        multinode.check_probes(tmp_path, 2)
    (tmp_path / "00" / "1.probe.json").write_text("{}")
    assert multinode.check_probes(tmp_path, 2) == "2 nodes"


def test_launchers_of_two_nodes_start_the_ranks_of_one_world(tmp_path: Path) -> None:
    (tmp_path / "writes_rank.py").write_text(WRITES_RANK)
    code = f"from substrate.distributed.launch import run_ranks; raise SystemExit(run_ranks('writes_rank', ['{tmp_path}/rank'], 4))"
    started = []
    for rank in range(2):
        env = {
            **os.environ,
            **multinode.rendezvous_env(2, rank, "127.0.0.9", 23456),
            "PYTHONPATH": f"{ROOT}:{tmp_path}",
        }
        started.append(subprocess.Popen([sys.executable, "-c", code], env=env))
    assert [each.wait(30) for each in started] == [0, 0]
    found = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(4)]
    assert [each["LOCAL_RANK"] for each in found] == ["0", "1", "0", "1"]
    same = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.9", "MASTER_PORT": "23456"}
    assert all(same.items() <= each.items() for each in found)
    assert multinode.rendezvous_env(1, 0, "x", 1) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cluster=testbed", "cluster.ranks_per_node=1"],
            "fabric, because an arm of 2 ranks takes 2 nodes here; or a layout",
        ),
        (["cluster.ranks_per_node=1", "cluster.network=fabric"], "only Slurm starts an arm on several nodes"),
        (["cluster.ranks_per_node=-1"], "a number >= 0"),
    ],
)
def test_several_nodes_need_a_fabric_and_a_slurm(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.compose(overrides)
    assert settings.compose(["cluster=testbed", "cluster.ranks_per_node=1", "cluster.network=fabric"]).num_nodes == 2
