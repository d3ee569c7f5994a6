"""Attacks of a trial on Slurm, with the real clients, configuration and addresses.

The trial knows everything that files could tell it, but it reaches neither munge's socket nor the controller.
"""

import socket

import pytest

from slurm.testbed.testbed import Testbed
from tests.attacks.host import Arena

COMMANDS = (
    *(
        "scontrol ping",
        "squeue --noheader --format=x",
        "sinfo --noheader",
        "sbatch --wrap=true",
        "srun --immediate=5 true",
    ),
    *(
        "scancel --name=x --user=trial",
        "scontrol update nodename=n1 state=drain reason=x",
        "sacctmgr --immediate add account evil",
    ),
)
NETWORKS = {
    "loopback": "submit, cancel or drain from inside",
    "fabric": "submit from inside over the host's network (fabric)",
}


@pytest.mark.parametrize("network", [pytest.param(n, marks=pytest.mark.attack(name)) for n, name in NETWORKS.items()])
def test_submit_from_inside(arena: Arena, testbed: Testbed, network: str) -> None:
    # What a site has in /etc/slurm, which a trial may know by heart; its clients want a user and a host that are known
    # inside, and may be told to do without munge.
    conf = testbed.conf.read_text()
    known = conf.replace("SlurmUser=root", "SlurmUser=trial").replace(socket.gethostname(), "localhost")
    for name, text in (("slurm", conf), ("known", known), ("none", known.replace("auth/munge", "auth/none"))):
        (arena.world / f"task/{name}.conf").write_text(text)
        (arena.world / f"task/{name}.conf").chmod(0o644)
    client = f"SLURM_CONF={arena.world}/task/slurm.conf timeout 5 squeue --noheader"
    assert arena.outside("sh", "-c", client) == 0
    tried = COMMANDS if network == "loopback" else COMMANDS[1:]  # that a controller answers is no secret there
    lines = [f"SLURM_CONF=/task/{name}.conf timeout 2 {command}" for name in ("known", "none") for command in tried]
    assert arena.attack("commands", *lines, network=network) == []
    assert "drain" not in arena.ask("outside", "sh", "-c", client.replace("squeue", "sinfo"))["log"].lower()
