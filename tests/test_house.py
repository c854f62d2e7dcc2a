"""The layout: imports go one way between rooms, and commands are not imported."""

import ast
import graphlib
from pathlib import Path

import pytest
from conftest import REPOSITORY

# What each room may import, besides itself and all that is to its right in the list.
ROOMS = (
    "training commands",
    "training.pages",
    "training.loop",
    "training.objectives",
    ("training.scores", "training.weights"),  # not each other
    "training.data",
    "training.checkpoint",
    "training.davit",
    "training.model",
    "training.config",
    "training.folders",
    "handler",
)


def modules() -> dict[str, ast.Module]:
    """Every module of the three packages by its dotted name, parsed."""
    parsed = {}
    for package in ("handler", "training", "export"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            parsed[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return parsed


MODULES = modules()


def is_command(name: str) -> bool:
    tests = (node.test for node in MODULES[name].body if isinstance(node, ast.If))
    return name.endswith(".__main__") or any("__name__" in ast.unparse(test) for test in tests)


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, anywhere in it: in functions, too."""
    found = set()
    for node in ast.walk(MODULES[name]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            names = [str(node.module)]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {imported for imported in names if imported in MODULES and "." in imported}
    # `from training.data import download` names the package, too.
    return {one for one in found if not any(other.startswith(f"{one}.") for other in found)} - {
        name
    }


def room(name: str) -> str:
    """The room that a module is in: its package, or the module itself beside the commands."""
    if name.startswith(("handler", "export")):
        return name.split(".")[0]
    if is_command(name):
        return "training commands"
    parts = name.split(".")
    return ".".join(parts[:2])


def rank(of: str) -> int:
    return next(
        index
        for index, rooms in enumerate(ROOMS)
        if of == rooms or (not isinstance(rooms, str) and of in rooms)
    )


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_a_command(name):
    assert not {imported for imported in imports(name) if is_command(imported)}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_from_room_to_room_in_one_direction(name):
    mine = room(name)
    for imported in imports(name):
        theirs = room(imported)
        if mine == theirs or mine == "export":
            continue
        assert theirs != "export", f"{name} imports {imported}"
        assert mine != "handler", f"{name} imports {imported}"
        assert rank(mine) < rank(theirs), f"{name} ({mine}) imports {imported} ({theirs})"


def test_no_import_is_hidden_from_the_walk():
    """An import of the project's own within a function, `try` or `if` hides a direction."""
    for name, module in MODULES.items():
        top = {id(node) for node in module.body}
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in (
                *("handler", "training", "export"),
            ):
                assert id(node) in top, f"{name}, line {node.lineno}"


def test_what_ships_in_the_archive_imports_no_folder_of_the_handler():
    for path in (REPOSITORY / "handler").glob("*.py"):
        name = f"handler.{path.stem}"
        if name == "handler.__init__":
            continue
        for imported in imports(name):
            assert imported.count(".") == 1, f"{name} imports {imported}"
            assert Path(REPOSITORY, *imported.split(".")).with_suffix(".py").is_file()


def test_no_chain_of_imports_is_longer_than_nine_modules():
    """Nor is there a circle, which has no order. A chain of 11 went unseen."""
    lengths: dict[str, int] = {}
    for name in graphlib.TopologicalSorter({n: imports(n) for n in MODULES}).static_order():
        lengths[name] = 1 + max((lengths[imported] for imported in imports(name)), default=0)
    assert max(lengths.values()) <= 9, max(lengths, key=lengths.__getitem__)
