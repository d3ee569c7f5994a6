"""The `testbed` fixture: a real eight-node Slurm (slurm/testbed/testbed.py) under every test of this folder.

It is the checkout's own cluster. Where it runs already it stays up after the session; else it is taken down again.
"""

import os
from collections.abc import Iterator

import pytest

from slurm.testbed.testbed import Testbed


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Testbed]:
    cluster = Testbed()
    was_up = bool(cluster.processes())
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            patch.delenv(name)
        patch.setenv("SLURM_CONF", str(cluster.conf))
        try:
            cluster.up()
            yield cluster
        finally:
            if not was_up:
                cluster.down()


@pytest.fixture(autouse=True)
def testbed(_cluster: Testbed) -> Testbed:
    """The cluster with all eight nodes in service, whatever the test before did to it; SLURM_CONF points to it."""
    _cluster.up()
    return _cluster
