"""Training methods: the registry from the name in a configuration (`recipe.method`) to the class of the method.

Each method is one file that can be read from top to bottom. `base_recipe.py` has what all methods share, and
`substrate/training/run.py` the loop. To add a method, write its file, name it in METHODS and add its yaml
(docs/recipes.md).
"""

import importlib
from typing import TYPE_CHECKING, Any

from substrate.interface.errors import UsageError
from substrate.interface.fields import read_fields

if TYPE_CHECKING:
    from substrate.recipes.base_recipe import BaseRecipe

METHODS = {
    "sft_lora": ("substrate.recipes.sft_lora", "SftLora"),
    "sft_full": ("substrate.recipes.sft_full", "SftFull"),
    "rft": ("substrate.recipes.rft", "Rft"),
    "grpo": ("substrate.recipes.grpo", "Grpo"),
}


def load_recipe(values: dict[str, Any]) -> "BaseRecipe":
    """Builds the recipe that `values["method"]` names. Raises UsageError if the method or a key is wrong."""
    method = values.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise UsageError(f"recipe.method is {method!r}; valid are {', '.join(sorted(METHODS))}")
    module, name = METHODS[method]
    recipe: BaseRecipe = read_fields(getattr(importlib.import_module(module), name), values, "recipe")
    return recipe
