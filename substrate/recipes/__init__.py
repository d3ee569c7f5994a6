"""Training methods: the registry from the name in a configuration (`recipe.method`) to the file that is the method.

One file a method, read top to bottom: its configuration (a frozen dataclass whose fields are the keys of
`hydra_conf/recipe/<method>.yaml`), what it trains, on which batches, with which loss, and what it saves.
`substrate/train.py` owns the rest: ranks, steps, progress, stopping, checkpoints. To add a method, write its file,
name it in METHODS, add its yaml.
"""

import importlib
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from substrate.errors import UsageError

if TYPE_CHECKING:
    import torch

    from substrate.data import MicroBatch, Stream
    from substrate.model import HybridModel
    from substrate.parallel import Parallel

METHODS = {"sft_lora": ("substrate.recipes.sft_lora", "SftLora")}


class Recipe(Protocol):
    """What `substrate/train.py` asks of a method. The attributes are keys of every recipe, units as in sft_lora.py."""

    num_steps: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    schedule: str
    warmup_steps: int
    min_lr_ratio: float
    checkpoint_every: int

    def stream(self, train_data: Path, tokenizer: Path, parallel: "Parallel", seed: int) -> "Stream":
        """The batches of the run, the same on every rank but for the data-parallel slice."""
        ...

    def attach(self, model: "torch.nn.Module", seed: int) -> None:
        """Adds the trainable parameters to a loaded base model and freezes the rest."""
        ...

    def outputs(self, model: "HybridModel", batch: "MicroBatch") -> "torch.Tensor":
        """What the loss is made of, from the model's last stage; hidden states from the others."""
        ...

    def loss(self, outputs: "torch.Tensor", batch: "MicroBatch", num_targets: int) -> "torch.Tensor":
        """This micro-batch's part of the step's loss; those of all micro-batches and data-parallel ranks add up."""
        ...

    def save(self, model: "torch.nn.Module", folder: Path) -> None:
        """Writes the adapter (docs/contract.md). All ranks call it."""
        ...


def load_recipe(values: dict[str, Any]) -> Recipe:
    """Builds the recipe that `values["method"]` names. Raises UsageError for what the method does not know."""
    method = values.get("method")
    if method not in METHODS:
        raise UsageError(f"recipe.method {method!r}; valid are {', '.join(sorted(METHODS))}")
    module, name = METHODS[method]
    return read_fields(getattr(importlib.import_module(module), name), values, "recipe")


def read_fields(cls: type, values: Any, where: str) -> Any:
    """Makes the dataclass `cls` from a mapping: every field present, none unknown, each of its annotated type (int
    passes as float).

    Nested dataclasses, `list[str]` and `dict[str, float]` are followed. Raises UsageError naming the key as
    `where.key`.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where} is {values!r}; it is a mapping")
    names = [field.name for field in fields(cls)]
    for what, keys in (("unknown", set(values) - set(names)), ("missing", set(names) - set(values))):
        if keys:
            named = ", ".join(f"{where}.{key}" for key in sorted(keys))
            raise UsageError(f"{what} {named}; the keys are {', '.join(names)}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _typed(hints[name], values[name], f"{where}.{name}") for name in names})


def _typed(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return read_fields(typing.cast(type, hint), value, where)
    if isinstance(hint, types.GenericAlias):
        container, inner = typing.get_origin(hint), typing.get_args(hint)[-1]
        if isinstance(value, dict) and container is dict:
            return {str(key): _typed(inner, item, f"{where}.{key}") for key, item in value.items()}
        if isinstance(value, list) and container is list:
            return [_typed(inner, item, f"{where}[{index}]") for index, item in enumerate(value)]
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise UsageError(f"{where} is {value!r}; it is of type {getattr(hint, '__name__', hint)}")
