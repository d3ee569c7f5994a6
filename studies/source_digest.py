"""What of a module's source computes: the same text for the same computation, wherever its modules lie and whatever they are called.

Comments, layout and docstrings do not compute. Neither do import statements and the names of our own modules: `shift_test.GUARD` and
`GUARD` read the same, so that moving or renaming a module changes nothing. What comes from outside is named in full, so that `np.exp` and
`math.exp` differ. Empty fields of the syntax tree are left out, because it depends on the version of Python which of them exist.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

OURS = ("pipeline.", "studies.")


def what_computes(source: str) -> str:
    """Return a module's syntax tree as text, without what does not compute. Raises SyntaxError for what is not Python."""
    tree = ast.parse(source)
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {each.asname or each.name: each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            origins |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return _text(tree, origins)


def _text(node: object, origins: Mapping[str, str]) -> str:
    """origins: where each imported name comes from, such as np -> numpy and Design -> pipeline.stats.design.Design."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant(str())):
            return ""
        case ast.Attribute(ast.Name(head), name) if head.islower() and head in origins:  # by convention it is a module
            return name if origins[head].startswith(OURS) else f"{origins[head]}.{name}"
        case ast.Name(name):
            origin = origins.get(name, name)
            return origin.rpartition(".")[2] if origin.startswith(OURS) else origin
        case ast.AST():
            fields = [
                f"{name}={_text(value, origins)}" for name, value in ast.iter_fields(node) if value not in (None, [])
            ]
            return f"{type(node).__name__}({' '.join(fields)})"
        case list():
            return f"[{' '.join(filter(None, (_text(each, origins) for each in node)))}]"
    return repr(node)
