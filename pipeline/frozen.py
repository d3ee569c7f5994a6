"""The campaign's frozen code: what judges and decides runs from the copy that `init` made, and from nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline import namespace
from pipeline.campaign import facts_of, verified_code
from pipeline.layout import Campaign

HERE = Path(__file__).resolve().parent.parent


def run_frozen_code(campaign: Campaign) -> None:
    """Go on as the campaign's frozen code, in a private mount namespace; returns there, and only there."""
    code_dir = verified_code(campaign, facts_of(campaign))
    if HERE != code_dir:
        os.environ["PYTHONPATH"] = str(code_dir)
        os.execv(sys.executable, [sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])
    os.environ["PYTHONPATH"] = str(code_dir)
    namespace.enter_private_namespace([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])
