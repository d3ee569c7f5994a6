"""Keep what Hydra composed, because tests compose the same few configurations hundreds of times and each takes a sixth of a second."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import settings

_REAL = settings.compose
_KNOWN: dict[Any, settings.Settings] = {}


def compose(
    overrides: Sequence[str] = (), source: Path = settings.SOURCE, campaign_dir: Path | None = None
) -> settings.Settings:
    """As `settings.compose`, from the words and the bytes of all files that it could read. What is refused is composed each time."""
    folders = [source, *([campaign_dir / "hydra"] if campaign_dir else [])]
    files = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.rglob("*.yaml")) if path.is_file()):
        files.update(f"{path} {path.stat().st_size}\n".encode() + path.read_bytes())
    key = tuple(overrides), source, campaign_dir, files.digest()
    if key not in _KNOWN:
        _KNOWN[key] = _REAL(overrides, source, campaign_dir)
    return copy.deepcopy(_KNOWN[key])


def keep() -> None:
    """Take this for `settings.compose` in the whole session."""
    settings.compose = compose
