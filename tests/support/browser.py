"""Debian's Chromium, driven by playwright, for the browser tests and for pictures."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

CHROMIUM = "chromium"  # as Debian names it


def why_not() -> str:
    """Why no browser can be started here; an empty string where one can."""
    if not shutil.which(CHROMIUM):
        return (
            "no chromium on this machine (Debian's package `chromium`; `scripts/setup.sh testbed` installs it as root)"
        )
    missing = [name for name in ("playwright", "axe_playwright_python") if not find_spec(name)]
    return f"no {', '.join(missing)} in this environment (`make setup`)" if missing else ""


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium. As root it runs without its own sandbox, and only on pages of this project."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        words = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = player.chromium.launch(executable_path=shutil.which(CHROMIUM), args=words)
        try:
            yield found
        finally:
            found.close()
