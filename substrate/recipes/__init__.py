"""Training methods: the registry from the name in a configuration (`recipe.method`) to the file that is the method.

One file a method, read top to bottom, on top of `knobs.py`, which has what all share. `substrate/train.py` owns the
rest: ranks, steps, progress, stopping, checkpoints. To add a method, write its file, name it in METHODS, add its yaml.
"""

import importlib
from typing import TYPE_CHECKING, Any

from substrate.interface.errors import UsageError
from substrate.interface.fields import read_fields

if TYPE_CHECKING:
    from substrate.recipes.knobs import Knobs

METHODS = {
    "sft_lora": ("substrate.recipes.sft_lora", "SftLora"),
    "sft_full": ("substrate.recipes.sft_full", "SftFull"),
    "rft": ("substrate.recipes.rft", "Rft"),
    "grpo": ("substrate.recipes.grpo", "Grpo"),
}


def load_recipe(values: dict[str, Any]) -> "Knobs":
    """Builds the recipe that `values["method"]` names. Raises UsageError for what the method does not know."""
    method = values.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise UsageError(f"recipe.method {method!r}; valid are {', '.join(sorted(METHODS))}")
    module, name = METHODS[method]
    recipe: Knobs = read_fields(getattr(importlib.import_module(module), name), values, "recipe")
    return recipe
