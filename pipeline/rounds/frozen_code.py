"""Go on as the campaign's frozen code, the copy that `init` made: nothing else may act on a campaign, judge it or decide.

A checkout that was updated since then only shows the campaign: `status`, `logs`, `doctor` and `gc` run from the checkout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.campaign.facts import facts_of, verified_code
from pipeline.campaign.layout import CODE_ROOT, Campaign
from pipeline.sandbox import namespace


def run_frozen_code(campaign: Campaign) -> None:
    """Replace this process by the same command of the frozen code, in a private mount namespace; return once that is so.

    Raises IntegrityError if the frozen code was changed.
    """
    code_dir = verified_code(campaign, facts_of(campaign))
    if CODE_ROOT != code_dir.resolve():
        _become(code_dir, sys.argv[1:])
    os.environ["PYTHONPATH"] = str(code_dir)
    namespace.enter_private_namespace([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])


def act_as_frozen(campaign: Campaign, words: Sequence[str]) -> None:
    """Replace this process by the frozen code's if this code differs from it; return if it does not, or if there is no campaign yet.

    words: the command line after `python -m pipeline`. Raises IntegrityError if the frozen code was changed.
    """
    if not campaign.frozen.exists():
        return
    code_dir = verified_code(campaign, facts_of(campaign))
    if CODE_ROOT != code_dir.resolve() and not is_same_code(CODE_ROOT, code_dir):
        print(
            f"this checkout differs from the code that {campaign.name} was frozen with, so the frozen code runs: {code_dir}",
            file=sys.stderr,
        )
        _become(code_dir, words)


def is_same_code(checkout: Path, code_dir: Path) -> bool:
    """Whether a checkout has exactly the code and the constitution of a frozen copy, byte for byte.

    A campaign is composed from the copy's own hydra_conf/, so files of sites that are new or changed in the checkout make no difference to it.
    """
    tops = sorted(path.name for path in code_dir.iterdir() if path.name != "hydra_conf")
    return _files(checkout, tops) == _files(code_dir, tops)


def _files(root: Path, tops: Sequence[str]) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for top in tops
        for path in (root / top).rglob("*")
        if "__pycache__" not in path.parts and path.is_file()
    }


def _become(code_dir: Path, words: Sequence[str]) -> None:
    os.environ["PYTHONPATH"] = str(code_dir)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "pipeline", *words])
