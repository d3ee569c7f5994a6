"""The command that runs one stage of a round. Stages that train or judge run in the site's runtime."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence

from pipeline.campaign.errors import ConfigError, NotFound

IN_RUNTIME = ("worker", "reference", "judge", "meta", "forward", "serve")
Stage = tuple[str, ...]
"""A command of the pipeline, the campaign, the round and further words: ("worker", "/runs/demo", "r0001", "a3", "--plan", "<sha256>")."""


def command(stage: Stage, runtime: Sequence[str] = ()) -> list[str]:
    """The words of the process that runs a stage: a Python, `-P -m pipeline` and the stage's own words.

    runtime: the words that start a Python in the site's runtime (cluster.runtime), such as `apptainer exec --nv $IMAGE python3`. If it is
    empty, POSTRAIN_RUNTIME has them inside a job; without either it is the Python that runs this. Stages outside IN_RUNTIME always use
    that one, because they talk to Slurm.

    Raises ConfigError for a variable that is not set, NotFound if the first word is no program on this host.
    """
    words = list(runtime) or shlex.split(os.environ.get("POSTRAIN_RUNTIME", ""))
    chosen = [os.path.expandvars(word) for word in words] if stage[0] in IN_RUNTIME else []
    if unset := [word for word in chosen if "$" in word]:
        raise ConfigError(
            f"cluster.runtime has {unset[0]}, and that variable is not set", "Export the variable in cluster.setup"
        )
    if chosen and shutil.which(chosen[0]) is None:
        raise NotFound(
            f"cluster.runtime begins with {chosen[0]}, which is no program on {platform.node()}",
            "Install it there, or put it on PATH in cluster.setup (`module load ...`); cluster.runtime=[] uses this Python",
        )
    name, campaign, round_name, *further = stage
    return [*(chosen or [sys.executable]), "-P", "-m", "pipeline", name, campaign, "--round", round_name, *further]
