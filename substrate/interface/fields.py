"""Builds a dataclass from a mapping and checks every key and type, since configurations arrive as JSON.

read_fields(Lora, {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": ["q_proj"]}, "recipe.lora")
"""

import math
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any

from substrate.interface.errors import UsageError


def read_fields(cls: type, values: Any, where: str) -> Any:
    """Makes the dataclass `cls` from a mapping that has every field, no other key, and values of the annotated types.

    Numbers must be finite. An int passes as float, and a float without a fraction as int. Nested dataclasses,
    `list[str]`, `dict[str, float]` and `str | None` are checked too. Raises UsageError that names the key as `where.key`.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where} is {values!r}; it must be a mapping")
    names = [field.name for field in fields(cls)]
    for what, keys in (("unknown", set(values) - set(names)), ("missing", set(names) - set(values))):
        if keys:
            named = ", ".join(f"{where}.{key}" for key in sorted(keys))
            raise UsageError(f"{what} key {named}; valid keys are {', '.join(names) or 'none'}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _typed(hints[name], values[name], f"{where}.{name}") for name in names})


def _typed(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # of one type and None
        (kind,) = set(typing.get_args(hint)) - {types.NoneType}
        return None if value is None else _typed(kind, value, where)
    if is_dataclass(hint):
        return read_fields(typing.cast(type, hint), value, where)
    if isinstance(hint, types.GenericAlias):
        container, inner = typing.get_origin(hint), typing.get_args(hint)[-1]
        if isinstance(value, dict) and container is dict:
            return {str(key): _typed(inner, item, f"{where}.{key}") for key, item in value.items()}
        if isinstance(value, list) and container is list:
            return [_typed(inner, item, f"{where}[{index}]") for index, item in enumerate(value)]
    elif type(value) is float and not math.isfinite(value):
        raise UsageError(f"{where} is {value!r}; it must be a finite number")
    elif hint is float and type(value) is int:
        return float(value)
    elif hint is int and type(value) is float and value.is_integer():
        return int(value)
    elif type(value) is hint:
        return value
    raise UsageError(f"{where} is {value!r}; it must be of type {getattr(hint, '__name__', hint)}")
