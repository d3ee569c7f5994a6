"""What task files share, and the one of a training run, read and checked (docs/contract.md, kind `train`)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from substrate.interface.errors import UsageError


def read_parts(
    path: Path, kind: str, config_keys: set[str], paths_keys: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `config` and `paths` of a task file of schema 1.

    Raises UsageError if it is unreadable, of another schema or kind, or has other keys than these.
    """
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
        header, config, paths = (task.get("schema"), task.get("kind")), task["config"], task["paths"]
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"task file {path}: {error!r}; it must be a JSON object with schema, kind, config and paths"
        ) from None
    if header != (1, kind):
        raise UsageError(f"task file {path} has schema and kind {header}; valid is {(1, kind)}")
    for name, values, needed in (("config", config, config_keys), ("paths", paths, paths_keys)):
        if not isinstance(values, dict) or set(values) != needed:
            came = sorted(values) if isinstance(values, dict) else repr(values)
            raise UsageError(f"{name} of {path} has {came}; valid keys are {sorted(needed)}")
    return config, paths


@dataclass(frozen=True)
class Task:
    """A checked task file of kind `train`. Paths are those inside the sandbox."""

    model: dict[str, Any]
    recipe: dict[str, Any]
    parallelism: dict[str, Any]
    seed: int
    base: Path  # a .safetensors file, or a folder with one
    tokenizer: Path
    train_data: Path
    out: Path
    stop: Path

    @property
    def num_ranks(self) -> int:
        """Number of processes; ep adds none, because the experts are spread over the ranks of a stage."""
        return int(self.parallelism["tp"] * self.parallelism["pp"] * self.parallelism["dp"])

    @classmethod
    def read(cls, path: Path) -> "Task":
        """Reads and checks a task file. Raises UsageError if it is unreadable, of another schema or kind, or has a wrong key."""
        config, paths = read_parts(
            path,
            "train",
            {"model", "recipe", "parallelism", "seed"},
            {"base", "tokenizer", "train_data", "out", "stop"},
        )
        if type(config["seed"]) is not int:
            raise UsageError(f"config.seed of {path} is {config['seed']!r}; it must be an integer")
        for axis in ("tp", "pp", "dp"):
            size = config["parallelism"].get(axis) if isinstance(config["parallelism"], dict) else None
            if type(size) is not int or size < 1:
                raise UsageError(
                    f"config.parallelism.{axis} of {path} is {size!r}; it must be an integer of at least 1"
                )
        fields: dict[str, Any] = {**config, **{name: Path(value) for name, value in paths.items()}}
        return cls(**fields)
