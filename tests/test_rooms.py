"""The house: a module imports only from rooms below its own, and every room can be held in mind."""

import ast
from pathlib import Path

import pytest

import gradnorm_func

HOUSE = Path(gradnorm_func.__file__).parent
# From the ground up. Two on one floor do not know of each other.
FLOORS = [
    {"_core"},
    {"_reduce"},
    {"_measure"},
    {"_solvers"},
    {"_balance"},
    {"_rotograd", "_gradinit"},
    {"_tools"},
    {"plot"},
    {"demo"},
]
MODULES = sorted(path for path in HOUSE.rglob("*.py") if path.parent != HOUSE)


def floor(room):
    (number,) = [i for i, rooms in enumerate(FLOORS) if room in rooms]
    return number


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gradnorm_func."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "gradnorm_func":
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_come_from_below(path):
    room = path.relative_to(HOUSE).parts[0]
    for other in imported_rooms(path):
        if (HOUSE / other).is_dir():
            assert other == room or floor(other) < floor(room), f"{path} imports from {other}"


def test_every_room_has_its_floor():
    rooms = {path.name for path in HOUSE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set().union(*FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_files_and_functions_can_be_held_in_mind(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 320
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False)
            length = node.end_lineno - node.lineno + 1 - (len(doc.splitlines()) if doc else 0)
            assert length <= 60, f"{node.name} has {length} lines"
