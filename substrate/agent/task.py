"""The task file of an agent's loop, read and checked (docs/contract.md, kind `agent`)."""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

from substrate.interface.errors import UsageError
from substrate.interface.fields import read_fields
from substrate.interface.task import read_parts

ROLES = ("anchor", "replicate", "axis", "contrast", "control")


@dataclass(frozen=True)
class Arm:
    """The arm that the agent works on."""

    role: str  # one of ROLES
    axis: str | None  # the axis's name; None for an arm that repeats a recipe
    settings: list[list[str]]  # [key, value] of each setting that the plan moved; the recipe has it already
    moves: list[str]  # the keys that the axis moves
    seed: int  # of the training


@dataclass(frozen=True)
class Budget:
    """What the arm may use. The worker enforces it; the loop tells the model of it."""

    steps: int  # answers of the model
    tokens: int  # of all requests and answers together
    answer_tokens: int  # most tokens of one answer
    attempts: int  # full runs that may be started, failed ones included
    gpu_seconds: int  # wall seconds times ranks, of all commands and runs
    wall_seconds: int  # of the whole session


@dataclass(frozen=True)
class AgentTask:
    """A checked task file of kind `agent`, without its socket: what the first request is a function of, beside the image."""

    arm: Arm
    recipe: dict  # the arm's, as its train task has it
    model: dict
    parallelism: dict
    budget: Budget
    open_paths: list[
        str
    ]  # patterns of paths below the image's root that may be edited: `*` in a name, `**` for any folders
    temperature: float
    seed: int  # of the model's sampling

    def __post_init__(self) -> None:
        _require(self.arm.role in ROLES, "arm.role", self.arm.role, f"one of {', '.join(ROLES)}")
        pairs = all(len(pair) == 2 for pair in self.arm.settings)
        _require(pairs, "arm.settings", self.arm.settings, "a list of [key, value]")
        for field in fields(Budget):
            number = getattr(self.budget, field.name)
            _require(number >= 1, f"budget.{field.name}", number, "at least 1")
        for path in self.open_paths:
            parts = path.split("/")
            inside = not {"", ".", ".."} & set(parts) and path.isprintable()
            _require(inside, "open_paths", path, "a path below the image's root, such as substrate/recipes/**")
        _require(0 <= self.temperature <= 2, "temperature", self.temperature, "from 0 to 2")
        for name in ("recipe", "model", "parallelism"):
            try:
                json.dumps(getattr(self, name), allow_nan=False)
            except ValueError:
                _require(False, name, getattr(self, name), "a mapping of finite numbers, texts and lists")

    def is_open(self, path: str) -> bool:
        """Whether a path below the image's root, such as substrate/recipes/rft.py, may be edited."""
        return any(_pattern(opened).fullmatch(path) for opened in self.open_paths)


def read_task(path: Path) -> tuple[AgentTask, Path]:
    """Returns the checked task and the path of the socket. Raises UsageError if the file is unreadable or has a wrong key or value."""
    config, paths = read_parts(path, "agent", {field.name for field in fields(AgentTask)}, {"socket"})
    task: AgentTask = read_fields(AgentTask, config, "config")
    if not isinstance(paths["socket"], str) or not paths["socket"].startswith("/"):
        raise UsageError(f"paths.socket of {path} is {paths['socket']!r}; it must be an absolute path")
    return task, Path(paths["socket"])


def _pattern(opened: str) -> re.Pattern[str]:
    """Returns the regular expression of an open path."""
    pieces = {"**": ".*", "*": "[^/]*"}
    return re.compile("".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", opened)))


def _require(holds: bool, key: str, value: object, valid: str) -> None:
    if not holds:
        raise UsageError(f"config.{key} is {value!r}; valid is {valid}")
