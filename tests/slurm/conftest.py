"""The `testbed` fixture, a real eight-node Slurm (slurm/testbed/testbed.py) for the tests of this folder, and the drill's campaign.

It is the checkout's own cluster. If it ran before the session it stays up, else it is stopped afterwards. The drill has a cluster of its own,
whose daemons run in its mount namespace (see as_site.py).
"""

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

from pipeline.campaign.layout import Campaign
from slurm.testbed.testbed import FOLDER, Testbed
from tests.slurm.playing import OVERRIDES, UID, own, pipeline


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Testbed]:
    cluster = Testbed(FOLDER.with_name("drill") if "DRILL_UID" in os.environ else FOLDER)
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


@pytest.fixture(scope="session")
def drilled(_cluster: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """The drill's campaign, frozen, with a copy beside it in which nothing will happen."""
    made = Campaign.at(own(tmp_path_factory.mktemp("campaigns")) / "drill")
    pipeline("round", made.folder, *OVERRIDES, "--no-submit")
    calm = made.folder.parent / "calm"
    calm.mkdir()
    own(calm)
    shutil.copytree(made.folder, calm / "drill")
    for path in calm.rglob("*"):
        os.chown(path, UID, UID, follow_symlinks=False)
    return made


@pytest.fixture
def ends(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Told the fault and its end, for the table."""
    return lambda fault, end: record_property("drill", f"{fault} | {end}")
