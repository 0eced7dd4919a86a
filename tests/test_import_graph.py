"""No loop among the package's modules, and no import of our own modules inside a function."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import tensortrain

ROOT = Path(tensortrain.__file__).parent


def name_of(path: Path) -> str:
    """Dotted name of a file; a folder's ``__init__`` has the name of the folder."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def is_for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def import_nodes(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import under a node, and whether it runs only when a function does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, in_function
        elif not is_for_types_alone(child):
            inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from import_nodes(child, inside)


def targets(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Our own modules that an import asks for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in FILES)
        return
    base = node.module or ""
    if node.level:
        is_folder = FILES[module].name == "__init__.py"
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_folder]
        base = ".".join([*parts, *([node.module] if node.module else [])])
    for alias in node.names:
        found = f"{base}.{alias.name}"
        if found in FILES or base in FILES:
            yield found if found in FILES else base


def with_folders(module: str, target: str) -> set[str]:
    """A module, and the folders whose ``__init__`` runs before it, but for those that the importer lies in."""
    parts = target.split(".")
    folders = {".".join(parts[:n]) for n in range(1, len(parts))}
    return {target} | {folder for folder in folders if not f"{module}.".startswith(f"{folder}.")}


@functools.cache
def import_graph() -> tuple[dict[str, set[str]], list[str]]:
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    late: list[str] = []
    for module, path in FILES.items():
        for node, in_function in import_nodes(ast.parse(path.read_text())):
            for target in targets(module, node):
                graph[module] |= with_folders(module, target) - {module}
                if in_function:
                    late.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {target}")
    return graph, late


def loops_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """What is left when modules that import nothing left, or that nothing left imports, go one by one."""
    left = {module: set(others) for module, others in graph.items()}
    while True:
        wanted = set().union(*left.values()) if left else set()
        ends = {module for module, others in left.items() if not others or module not in wanted}
        if not ends:
            return [[module, *sorted(others)] for module, others in sorted(left.items())]
        left = {module: others - ends for module, others in left.items() if module not in ends}


def test_the_import_graph_has_no_loop() -> None:
    graph, _ = import_graph()
    assert len(graph) > 150
    assert loops_of(graph) == []


def test_our_own_modules_are_imported_at_the_top() -> None:
    _, late = import_graph()
    assert late == []


def test_loops_and_late_imports_are_found() -> None:
    assert loops_of({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"], ["c", "b"]]
    tree = ast.parse("def f():\n    from tensortrain import nn\nif TYPE_CHECKING:\n    import tensortrain.io")
    found = [(target, late) for node, late in import_nodes(tree) for target in targets("tensortrain.viz", node)]
    assert found == [("tensortrain.nn", True)]
