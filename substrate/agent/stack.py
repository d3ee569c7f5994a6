"""The interface of the training stack, from the docstrings and signatures of an image's files: what an agent reads before any file.

    # substrate/recipes/rft.py (open): Rejection-sampling fine-tuning: learn from worked solutions, then from the model's own correct ones
    class Rft(OwnSamples): The method of hydra_conf/recipe/rft.yaml
        def batch(self, run: 'Training') -> 'Batch'

It names the modules on open paths with everything public in them, and of other modules what the open ones import: a class that an open
one extends whole, others by their methods, or by their first line alone where the text would become too long. No file is run. The order
is that of the paths, and the size is bounded, so that the text is a function of the image and of the open paths alone.
"""

import ast
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from substrate.interface.command_line import read_text
from substrate.interface.errors import DataError

MOST_CHARACTERS = 24_000  # about 6,500 tokens, which every request of a session carries
MOST_SENTENCE = 160
Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the image. `name` is its path below the image's root."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file. Raises DataError if it is no Python."""
        try:
            return ast.parse(self.text)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise DataError(f"{self.name} is no Python: {error}; the image must be whole") from None

    @property
    def definitions(self) -> list[Definition]:
        return [node for node in self.tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]

    def bases(self) -> set[str]:
        """The classes that those of the module extend."""
        return {ast.unparse(base) for node in self.definitions if isinstance(node, ast.ClassDef) for base in node.bases}

    def imports(self, names: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yields the path of a module among `names`, and the name that is imported from it, for each such import at any place."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                stem = node.module.replace(".", "/")
                found = [name for name in (f"{stem}.py", f"{stem}/__init__.py") if name in names]
                yield from ((name, alias.name) for name in found for alias in node.names)


def interface(root: Path, is_open: Callable[[str], bool], most: int = MOST_CHARACTERS) -> str:
    """Returns the interface of the stack below an image's root, in at most `most` characters and a line on what was left out.

    is_open: whether a path below the root may be edited. Raises DataError if a file cannot be read or parsed, or if none is open.
    """
    paths = {path.relative_to(root).as_posix(): path for path in (root / "substrate").rglob("*.py")}
    opened = [Module(name, read_text(paths[name])) for name in sorted(paths) if is_open(name)]
    if not opened:
        raise DataError(f"no module below {root}/substrate is on an open path; name at least one in config.open_paths")
    called: dict[str, set[str]] = {}
    for module in opened:
        for name, imported in module.imports(paths.keys() - {module.name for module in opened}):
            called.setdefault(name, set()).add(imported)
    bases = {base for module in opened for base in module.bases()}
    others = [Module(name, read_text(paths[name])) for name in sorted(called)]
    parts: list[str] = []
    for methods in (True, False):
        parts = ["".join(_open_module(module)) for module in opened]
        parts += ["".join(_called_module(module, called[module.name], bases, methods)) for module in others]
        if sum(map(len, parts)) <= most:
            return "".join(parts)
    kept = 0
    while len("".join(parts[: kept + 1])) <= most:
        kept += 1
    left_out = ", ".join(module.name for module in [*opened, *others][kept:])
    return "".join(parts[:kept]) + f"# Left out; read them by the tools: {left_out}\n"


def _open_module(module: Module) -> Iterator[str]:
    yield f"# {module.name} (open): {_sentence(module.tree)}\n"
    for node in module.definitions:
        if not node.name.startswith("_"):
            yield from _definition(node, module.text.splitlines(), "")
    yield "\n"


def _called_module(module: Module, names: set[str], bases: set[str], methods: bool) -> Iterator[str]:
    """Yields the lines on what is imported from a module that is not open, as far as it is defined there."""
    yield f"# {module.name}: {_sentence(module.tree)}\n"
    for node in module.definitions:
        if node.name in bases:
            yield from _definition(node, module.text.splitlines(), "")
        elif node.name in names and (methods or isinstance(node, ast.FunctionDef)):
            yield from _definition(node, None, "")
        elif node.name in names:
            yield _head(node)
    yield "\n"


def _definition(node: Definition, lines: list[str] | None, indent: str) -> Iterator[str]:
    """Yields the lines of a class with its public methods, or of a function. lines: of the file; None leaves fields out."""
    yield indent + _head(node)
    for inner in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name) and lines is not None:
            comment = lines[inner.lineno - 1].partition("  # ")[2].strip() if inner.lineno == inner.end_lineno else ""
            field = f"{indent}    {inner.target.id}: {ast.unparse(inner.annotation)}"
            yield f"{field}  # {comment}\n" if comment else f"{field}\n"
        elif isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
            yield from _definition(inner, lines, f"{indent}    ")


def _head(node: Definition) -> str:
    """Returns a class or function's first line, with the first sentence of its docstring."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        head = f"def {node.name}({ast.unparse(node.args)}){returns}"
    else:
        bases = ", ".join(map(ast.unparse, node.bases))
        head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    sentence = _sentence(node)
    return f"{head}: {sentence}\n" if sentence else f"{head}\n"


def _sentence(node: ast.Module | Definition) -> str:
    """Returns the first sentence of a docstring, "" without one."""
    words = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    sentence = words.partition(". ")[0].removesuffix(".").removesuffix(":")
    return sentence if len(sentence) <= MOST_SENTENCE else sentence[: MOST_SENTENCE - 3] + "..."
