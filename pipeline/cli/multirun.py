"""Run the arms of a frozen round as a Hydra multirun, with any Hydra launcher.

    CAMPAIGN_DIR=runs/demo python -m pipeline.cli.multirun -m +round=r0002 'arm=glob(a*)'
    python -m pipeline meta runs/demo --round r0002

The composition selects only the round and the arms. Everything else comes from `rounds/r0002/`, which `round --no-submit` froze. Each job
starts `python -m pipeline worker` as a process of its own, so that a launcher may run jobs in one process or on many nodes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from pipeline.config.settings import SOURCE, search_path


@hydra.main(version_base="1.3", config_path=str(SOURCE), config_name="campaign")
def run_arm(config: DictConfig) -> int:
    """Run one job of the sweep: one arm of one round. Returns the worker's exit code."""
    campaign = Path(os.environ["CAMPAIGN_DIR"]).absolute()
    for key in ("round", "arm"):
        if key not in config:
            raise ValueError(f"{key} is missing; valid is, for example: -m +round=r0001 'arm=glob(a*)'")
    stage = ["worker", str(campaign), "--round", config.round, config.arm]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    return subprocess.run([sys.executable, "-P", "-m", "pipeline", *stage], env=environment, check=False).returncode


def main() -> None:
    """Put the campaign's rounds on Hydra's search path, then let Hydra take over."""
    campaign = os.environ.get("CAMPAIGN_DIR")
    if not campaign or not Path(campaign, "campaign.yaml").exists():
        sys.exit(
            f"ConfigError: CAMPAIGN_DIR is {campaign or 'not set'}, which is no campaign. Set it to a campaign's folder, such as runs/demo"
        )
    sys.argv += search_path(
        Path(campaign).absolute()
    )  # at the end, because Hydra refuses overrides between its own flags
    run_arm()


if __name__ == "__main__":
    main()
