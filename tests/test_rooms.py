"""The rooms of hpo/: which may import which."""

import ast
import re
from pathlib import Path

import pytest

from conftest import ROOT

FLOORS = [  # from the bottom; a module imports from lower floors, and from its own room
    {"errors", "files", "disk", "host_memory"},
    {"code_copy"},
    {"bohb", "squad", "results"},
    {"search_space"},
    {"ranges", "known", "machines"},
    {"arguments"},
    {"checks", "plan"},
    {"cluster"},
]
MODULES = sorted(
    path.relative_to(ROOT) for path in (ROOT / "hpo").rglob("*.py") if path != ROOT / "hpo" / "__init__.py"
)


def room(parts: tuple[str, ...]) -> str:
    return parts[1].removesuffix(".py")


def floor(name: str) -> int:
    (number,) = (i for i, rooms in enumerate(FLOORS) if name in rooms)
    return number


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or in functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down_only(path):
    own = room(path.parts)
    for name in imports(path):
        parts = tuple(name.split("."))
        assert parts[0] not in ("raytune_bayesian", "tests", "bench", "demo"), f"{path} imports {name}"
        if parts[0] == "hpo" and len(parts) > 1 and room(parts) != own:
            assert floor(room(parts)) < floor(own), f"{path} imports {name}"


def test_private_names_of_ray_are_in_one_file():
    for path in MODULES:
        if path.name != "ray_private.py":
            for name in imports(path):
                assert not (name.startswith("ray.") and any(part.startswith("_") for part in name.split("."))), (
                    path,
                    name,
                )


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_private_name_of_ray_is_reached_through_another(path):
    """Such as ray._private after `import ray`."""
    if path.name != "ray_private.py":
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                assert not re.match(r"(ray|tune)\b", ast.unparse(node)), f"{path}: {ast.unparse(node)}"
            assert getattr(node, "attr", None) != "temporary_state", f"{path}: {ast.unparse(node)}"


def test_imports_have_no_circle():
    """Also within a room, and with the imports in functions."""
    modules = {".".join(path.with_suffix("").parts): path for path in MODULES}
    below = {name: imports(path) & modules.keys() - {name} for name, path in modules.items()}
    while leaves := {name for name, needs in below.items() if not needs}:
        below = {name: needs - leaves for name, needs in below.items() if name not in leaves}
    assert not below
