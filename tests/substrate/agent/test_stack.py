"""Test the interface of the stack: complete on open paths, bounded, in path order, and made without running a file."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from substrate.agent.stack import MOST_CHARACTERS, interface
from substrate.interface.errors import DataError
from tests.support.paths import ROOT

OPEN = '''"""Opens. And more
of it.

Another paragraph."""
import os
from substrate.closed import Base, helper, absent
from elsewhere import thing

class Mine(Base, list):
    """Mine is
    short. Not this."""

    size: int  # rows of a step
    named: "dict[str, int]" = {}
    untyped = 3

    def __init__(self): ...
    def step(self, run: "Training", *, scale=1.0, **more: int) -> list[int]:
        """Returns the step: a list."""
        def inner(): ...
    def _private(self): ...

def public(a, b: int = 2, /, *c): "No full stop"
def _private(): ...
if True:
    def hidden(): ...
raise SystemExit("nobody runs this file")
'''
CLOSED = '''"""Closed."""
class Base:
    """What Mine extends."""
    weight: float  # in kg
    def go(self) -> None: ...
class Other:
    """Not imported."""
class helper:
    """Helps."""
    field: int
    def help(self): ...
'''
EXPECTED = """# substrate/open.py (open): Opens
class Mine(Base, list): Mine is short
    size: int  # rows of a step
    named: 'dict[str, int]'
    def step(self, run: 'Training', *, scale=1.0, **more: int) -> list[int]: Returns the step: a list
def public(a, b: int=2, /, *c): No full stop

# substrate/closed.py: Closed
class Base: What Mine extends
    weight: float  # in kg
    def go(self) -> None
class helper: Helps
    def help(self)

"""


def is_open(name: str) -> bool:
    return name == "substrate/open.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {"open": OPEN, "closed": CLOSED, "unused": '"""Unused."""\n'}.items():
        (tmp_path / "substrate").mkdir(exist_ok=True)
        (tmp_path / "substrate" / f"{name}.py").write_text(text)
    return tmp_path


def test_the_form(root):
    assert interface(root, is_open) == EXPECTED


def test_what_is_too_long_loses_methods_of_closed_modules_then_modules_by_name(root):
    shorter = EXPECTED.replace("    def help(self)\n", "")
    assert interface(root, is_open, len(EXPECTED)) == EXPECTED
    assert interface(root, is_open, len(EXPECTED) - 1) == shorter
    opened = shorter.split("# substrate/closed.py")[0]
    assert (
        interface(root, is_open, len(shorter) - 1)
        == f"{opened}# Left out; read them by the tools: substrate/closed.py\n"
    )
    assert interface(root, is_open, 0) == "# Left out; read them by the tools: substrate/open.py, substrate/closed.py\n"


def test_what_cannot_be_read_is_refused(root):
    with pytest.raises(DataError, match="no module below .* is on an open path"):
        interface(root, lambda name: False)
    (root / "substrate" / "closed.py").write_text("def (")
    with pytest.raises(DataError, match="substrate/closed.py is no Python"):
        interface(root, is_open)


def test_the_real_stack_is_told_as_python_itself_sees_it():
    """Compares signatures and docstrings with `inspect`, for every public class and function of the open modules."""
    text = interface(
        ROOT, lambda name: name.startswith(("substrate/recipes/", "substrate/data/rows", "substrate/training/s"))
    )
    assert len(text) <= MOST_CHARACTERS + 400 and text.isascii()
    heads = re.findall(r"^# (\S+\.py)( \(open\))?", text, re.MULTILINE)
    opened = [name for name, is_marked in heads if is_marked]
    assert len(opened) > 8 and opened == sorted(opened)
    assert [name for name, _ in heads] == [*opened, *sorted(name for name, is_marked in heads if not is_marked)]
    found = 0
    for name in opened:
        module = importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        section = text.split(f"# {name} (open)")[1].split("\n# ")[0]
        for attribute, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__ and not attribute.startswith("_")
            if own and (inspect.isclass(value) or inspect.isfunction(value)):
                kind = "class" if inspect.isclass(value) else "def"
                (line,) = [line for line in section.splitlines() if re.match(rf"{kind} {attribute}\b", line)]
                first = " ".join((inspect.getdoc(value) or "").split())[:40].split(". ")[0].rstrip(".")
                assert first in line
                found += 1
            if own and inspect.isfunction(value):
                names = re.findall(r"(?:^|, )\*{0,2}(\w+)", line.partition("(")[2].rpartition(")")[0])
                assert set(inspect.signature(value).parameters) <= set(names)
    assert found > 20
