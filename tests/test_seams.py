"""Tests use what the package offers: how often they still reach past it is counted, and must not grow.

Where a count has become smaller, lower the number here.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.test_imports import PACKAGE, files

TESTS = Path(__file__).parent
PATCHES = {"setattr", "delattr", "setitem", "delitem"}
MOST_PATCHES = 42
"""Replacements of something of the package's own by `monkeypatch`. Those of other packages are not counted."""
MOST_PRIVATE = 47
"""Lines that name a private attribute or function of the package."""
OTHERS = {"_base", "_version", "_fields", "_field_defaults", "_timeout"}
"""Names of PyTorch's and Python's own that the package's happen to equal."""


@cache
def trees() -> dict[Path, ast.Module]:
    """The files of the tests, but for benchmarks, which are programs."""
    paths = [path for path in sorted(TESTS.rglob("*.py")) if "benchmarks" not in path.parts]
    return {path: ast.parse(path.read_text()) for path in paths}


def origins(tree: ast.AST) -> dict[str, str]:
    """What a file has imported: name -> where it comes from."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(one.asname or one.name).split(".")[0]: one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return found


def patched(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and origin of everything that `monkeypatch` replaces; "" where only running it would tell."""
    known = origins(tree) | {"loop": "asyncio"}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATCHES):
            continue
        if not (isinstance(node.func.value, ast.Name) and "patch" in node.func.value.id):
            continue
        target: ast.expr = node.args[0]
        while isinstance(target, ast.Attribute | ast.Call):
            target = target.value if isinstance(target, ast.Attribute) else target.func
        if isinstance(target, ast.Constant):
            yield node.lineno, str(target.value)
        else:
            yield node.lineno, known.get(target.id, "") if isinstance(target, ast.Name) else ""


@cache
def private_names() -> set[str]:
    """The private names that the package binds."""
    found: set[str] = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in found if name.startswith("_") and not name.endswith("__")} - OTHERS


def is_own(node: ast.Attribute) -> bool:
    """Whether it is of the test's own object: of `self`, `cls` or ``super()``."""
    of = node.value.func if isinstance(node.value, ast.Call) else node.value
    return isinstance(of, ast.Name) and of.id in ("self", "cls", "super")


def private_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in private_names() and not is_own(node):
            lines.add(node.lineno)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            lines |= {node.lineno for one in node.names if one.name.startswith("_") and not one.name.endswith("__")}
    return lines


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(TESTS)}:{line}"


def test_the_packages_own_names_are_seldom_replaced() -> None:
    found = [
        where(path, line)
        for path, tree in trees().items()
        for line, origin in patched(tree)
        if not origin or origin.split(".")[0] == PACKAGE.name
    ]
    assert len(found) <= MOST_PATCHES, "\n".join(found)


def test_private_state_is_seldom_looked_at() -> None:
    found = [where(path, line) for path, tree in trees().items() for line in sorted(private_lines(tree))]
    assert len(found) <= MOST_PRIVATE, "\n".join(found)
