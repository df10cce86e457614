"""The shape of the code: imports point one way, and the habits that keep it readable are kept."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import inference_api

ROOT = Path(inference_api.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

# From the ground up: a module may import from its own layer and from those before it.
LAYERS = (
    ("inference_api",),
    (
        "inference_api.models",
        "inference_api.errors",
        "inference_api.threads",
        "inference_api.headers",
        "inference_api.pace",
        "inference_api.supervisor",
    ),
    ("inference_api.settings",),
    ("inference_api.routing",),
    ("inference_api.policy",),
    ("inference_api.discovery",),
    ("inference_api.upstream",),
    ("inference_api.relay",),
    ("inference_api.observe",),
    ("inference_api.server",),
    ("inference_api.http",),
    ("inference_api.members",),
    ("inference_api.feature",),
    ("inference_api.chains",),
    ("inference_api.core", "inference_api.application", "inference_api.site"),
    ("inference_api.features",),
    ("inference_api.app",),
    ("inference_api.commands",),
    ("inference_api.cli",),
    ("inference_api.__main__",),
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text(), str(path)) for path in SOURCES}
CORE = [name for name in TREES if ".demo" not in name]


def is_typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(name: str, lazy: bool = True) -> set[str]:
    """The modules of ours that a module imports; not those that only a type checker sees, `lazy`: in functions too."""
    found: set[str] = set()
    pending: list[ast.AST] = list(TREES[name].body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            # `from package import module` is an import of the module.
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & TREES.keys()) or {node.module or ""}
        elif not (isinstance(node, ast.stmt) and is_typing_only(node)) and (
            lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ):
            pending += ast.iter_child_nodes(node)
    return found & TREES.keys()


def layer(name: str) -> int:
    """How high a module stands; the longest match is its own."""
    ranks = [(len(top), rank) for rank, tops in enumerate(LAYERS) for top in tops if f"{name}.".startswith(f"{top}.")]
    return max(ranks)[1]


def test_every_module_has_a_layer() -> None:
    assert {name for name in CORE if layer(name) == 0} == {"inference_api"}


def test_imports_point_down() -> None:
    up = {
        (name, other) for name in CORE for other in imports(name) if ".demo" not in other and layer(other) > layer(name)
    }

    assert up == set()


def test_no_import_comes_back_to_where_it_began() -> None:
    # Raises CycleError, with the cycle.
    order = list(TopologicalSorter({name: imports(name) for name in TREES}).static_order())

    assert len(order) == len(TREES)


def test_settings_need_nothing_but_the_names_of_headers() -> None:
    assert imports("inference_api.settings") <= {"inference_api.headers", "inference_api.models"}


def test_the_demo_is_loaded_by_its_command_alone() -> None:
    users = {name: {other for other in imports(name) if ".demo" in other} for name in CORE}

    assert {name for name, used in users.items() if used} == {"inference_api.cli"}
    assert not any(".demo" in other for other in imports("inference_api.cli", lazy=False))


def test_a_module_says_what_it_is() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_only_commands_print() -> None:
    calls = {
        name
        for name in CORE
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }

    assert {name for name in calls if not name.startswith("inference_api.commands.")} == {"inference_api.cli"}


def test_a_layer_is_plain_asgi() -> None:
    assert [path for path in SOURCES if "BaseHTTPMiddleware" in path.read_text()] == []


def test_a_function_fits_on_a_screen() -> None:
    longer = {
        (name, node.name)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 50
    }

    assert longer == set()


def test_the_environment_is_read_in_one_place() -> None:
    readers = {
        name
        for name in CORE
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }

    assert readers == {"inference_api.settings", "inference_api.commands.configuration"}


def test_features_are_known_to_the_composition_root_alone() -> None:
    users = {name for name in CORE for other in imports(name) if other.startswith("inference_api.features")}

    assert {name for name in users if not name.startswith("inference_api.features")} == {"inference_api.app"}


def test_the_composition_root_fits_on_two_screens() -> None:
    assert len((ROOT / "app.py").read_text().splitlines()) <= 120
