"""The command that runs one stage of a round, in the site's runtime where it trains or judges."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence

from pipeline.campaign.errors import ConfigError, NotFound

IN_RUNTIME = ("worker", "reference", "meta")
Stage = tuple[str, ...]
"""A command's name, campaign, round and further words, such as ("worker", "/runs/demo", "r0001", "a3", "--plan", "<sha256>")."""


def command(stage: Stage, runtime: Sequence[str] = ()) -> list[str]:
    """The process that runs a stage: Python, safe path, `-m pipeline`. What trains or judges does so in the site's runtime.

    The runtime is words that end with a Python (cluster.runtime), such as `apptainer exec --nv $IMAGE python3`; inside a job they come as
    POSTRAIN_RUNTIME. Without any it is this very Python. Whatever talks to Slurm stays outside. Raises ConfigError for a
    variable that is not set, NotFound where the first word is no program here.
    """
    words = list(runtime) or shlex.split(os.environ.get("POSTRAIN_RUNTIME", ""))
    chosen = [os.path.expandvars(word) for word in words] if stage[0] in IN_RUNTIME else []
    if unset := [word for word in chosen if "$" in word]:
        raise ConfigError(f"cluster.runtime has {unset[0]}, which is not set", "Export it in cluster.setup")
    if chosen and shutil.which(chosen[0]) is None:
        raise NotFound(
            f"cluster.runtime begins with {chosen[0]}, which is no program on {platform.node()}",
            "Install it there, or put it on PATH in cluster.setup (`module load ...`); cluster.runtime=[] takes this Python",
        )
    name, campaign, round_name, *further = stage
    return [*(chosen or [sys.executable]), "-P", "-m", "pipeline", name, campaign, "--round", round_name, *further]
