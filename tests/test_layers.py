"""The layers of the package: imports run one way, without a circle, and only training/ imports Lightning."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cucafera"
LAYERS = [
    {"quantities"},
    {"config", "storage", "process", "hub"},
    {"output", "terminal_table"},
    {"markup"},
    {"device"},
    {"model", "data"},
    {"objectives", "optimizers", "runs", "generation"},
    {"interop"},
    {"training"},
    {"sweeps", "evaluation", "serving", "pairs"},
    {
        "options",
        "run",
        "inspect",
        "chat",
        "serve",
        "telegram",
        "evaluate",
        "prefer",
        "export",
        "compare",
        "__main__",
        "__init__",
    },
]
"""From the lowest to the highest; a module may import from lower layers, and from its own package."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHIN_A_LAYER = {("runs", "objectives"), ("optimizers", "objectives")}
"""Pairs of one layer of which the first may import the second."""
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """The dotted names that a module imports, anywhere in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_layers(path: Path):
    part = part_of(path)
    others = {name.split(".")[1] for name in imported(path) if name.startswith("cucafera.")} - {part}
    upward = {
        other
        for other in others & LEVEL.keys()
        if LEVEL[other] >= LEVEL[part] and (part, other) not in WITHIN_A_LAYER and LEVEL[part] < len(LAYERS) - 1
    }
    assert not upward
    assert part == "training" or not any(name.split(".")[0] == "lightning" for name in imported(path))


def test_no_two_modules_import_each_other_in_a_circle():
    names = {".".join(("cucafera", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in MODULES}
    graph = {
        name: {other for other in imported(path) if other in names and other != name} for name, path in names.items()
    }
    done: set[str] = set()
    while ready := {name for name, others in graph.items() if name not in done and others <= done}:
        done |= ready
    assert sorted(graph.keys() - done) == []
