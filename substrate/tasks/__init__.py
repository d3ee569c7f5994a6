"""The puzzle families, by the names that item ids, configurations and the mix of a recipe use.

A new family is one new module in this folder, with the names of `protocol.Family` (docs/families.md has an example):

    FAMILIES["roman"].generate(random.Random(7), "small")
    Puzzle(examples=((21, 'XXI'), (10, 'X')), query=26)

Sources: the rows of the NVIDIA Nemotron Model Reasoning Challenge, whose generators the modules rebuild.
"""

import importlib
import pkgutil
from typing import Any

from substrate.tasks.protocol import STYLES, Family, Solution


def _find() -> dict[str, Family]:
    """Returns the modules of this folder that have `PHRASES`, in name order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    modules: dict[str, Any] = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "PHRASES")}


LEVELS = ("small", "full")
FAMILIES: dict[str, Family] = _find()

__all__ = ["FAMILIES", "LEVELS", "STYLES", "Family", "Solution"]
