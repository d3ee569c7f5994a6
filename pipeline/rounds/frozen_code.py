"""The campaign's frozen code: what acts on a campaign, judges and decides is the copy that `init` made, and nothing else.

A checkout that was updated meanwhile only looks: its `status`, `logs`, `doctor` and `gc` are its own.
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
    """Go on as the campaign's frozen code, in a private mount namespace; returns there, and only there."""
    code_dir = verified_code(campaign, facts_of(campaign))
    if CODE_ROOT != code_dir.resolve():
        _become(code_dir, sys.argv[1:])
    os.environ["PYTHONPATH"] = str(code_dir)
    namespace.enter_private_namespace([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])


def act_as_frozen(campaign: Campaign, words: Sequence[str]) -> None:
    """Go on as the campaign's frozen code where this is another; returns where it is the same, and where there is no campaign yet.

    words: the command. Raises IntegrityError for frozen code that was changed.
    """
    if not campaign.frozen.exists():
        return
    code_dir = verified_code(campaign, facts_of(campaign))
    if CODE_ROOT != code_dir.resolve() and not is_same_code(CODE_ROOT, code_dir):
        print(
            f"this checkout is another than {campaign.name} was frozen with: its own code acts, {code_dir}",
            file=sys.stderr,
        )
        _become(code_dir, words)


def is_same_code(checkout: Path, code_dir: Path) -> bool:
    """Whether a checkout has the files of a frozen copy, byte for byte, and no others beside them."""
    tops = sorted(path.name for path in code_dir.iterdir())
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
