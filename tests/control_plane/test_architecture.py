"""The shape of the control plane: imports point one way, nothing of it is known to the router."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import control_plane

ROOT = Path(control_plane.__file__).parent
TOP = ROOT.parent

# From the ground up: a module may import from its own layer and from those before it.
LAYERS = (
    "control_plane.errors",
    "control_plane.pure",
    "control_plane.panels",
    "control_plane.data",
    "control_plane.settings",
    "control_plane.documents",
    "control_plane.metrics",
    "control_plane.passwords",
    "control_plane.kept",
    "control_plane.usage_state",
    "control_plane.clients",
    "control_plane.connections",
    "control_plane.plane",
    "control_plane.services",
    "control_plane.web",
    "control_plane.http",
    "control_plane.app",
    "control_plane.serving",
    "control_plane.commands",
    "control_plane.cli",
    "control_plane.__main__",
)


def name_of(path: Path) -> str:
    parts = path.relative_to(TOP).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    name_of(path): ast.parse(path.read_text(), str(path))
    for path in sorted(ROOT.rglob("*.py"))
    if "migrations" not in path.parts
}
NAMES = sorted(TREES)


def imported(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & TREES.keys()) or {node.module or ""}
    return found


def layer(name: str) -> int:
    return next((rank for rank, top in enumerate(LAYERS) if f"{name}.".startswith(f"{top}.")), -1)


def test_every_module_has_a_layer() -> None:
    assert [name for name in NAMES if layer(name) == -1] == ["control_plane"]


def test_imports_point_down() -> None:
    up = {
        (name, other) for name in NAMES for other in imported(TREES[name]) & TREES.keys() if layer(other) > layer(name)
    }

    assert up == set()


def test_no_import_comes_back_to_where_it_began() -> None:
    # Raises CycleError, with the cycle.
    graph = {name: imported(tree) & TREES.keys() - {name} for name, tree in TREES.items()}

    assert len(list(TopologicalSorter(graph).static_order())) == len(TREES)


def test_decisions_have_no_effects() -> None:
    effects = {"sqlalchemy", "httpx", "asyncio", "starlette", "fastapi", "socket", "time"}
    users = {
        name: {other.partition(".")[0] for other in imported(TREES[name])} & effects
        for name in NAMES
        if name.startswith("control_plane.pure.")
    }

    assert {name: found for name, found in users.items() if found} == {}


@pytest.mark.parametrize("package", ["inference_api", "registry_stub", "inference_control"])
def test_others_know_nothing_of_it(package: str) -> None:
    users = {
        path.name
        for path in (TOP / package).rglob("*.py")
        for other in imported(ast.parse(path.read_text()))
        if other.startswith("control_plane")
    }

    assert users == set()


def test_a_module_says_what_it_is() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_functions_are_short() -> None:
    functions = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {name: lines for name, lines in functions.items() if lines > 50}

    assert long == {}


# Statements of one shape for several tables, whose names the module has.
OF_SEVERAL_TABLES = {"control_plane.services.retention"}


def is_constant(text: ast.expr) -> bool:
    """Whether a text is one, or put together of constants of modules."""
    values = text.values if isinstance(text, ast.JoinedStr) else [text]
    return all(
        isinstance(value, ast.Constant)
        or (isinstance(value, ast.FormattedValue) and ast.unparse(value.value).isupper())
        for value in values
    )


def test_statements_are_not_text() -> None:
    """SQL is SQLAlchemy's, but for what it has no word for; then nothing of a request is in it."""
    formatted = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("text", "sa.text", "sqlalchemy.text")
        and not is_constant(node.args[0])
        and not name.startswith("control_plane.data.")
        and name not in OF_SEVERAL_TABLES
    ]

    assert formatted == []
