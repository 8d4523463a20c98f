"""The drawing of the package's imports: they run downwards only, and there is no circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "pace_convert"
# From the roof down. A room may import from rooms on lower floors, and from itself.
FLOORS = (
    ("cli",),
    ("",),  # pace_convert itself
    ("api",),
    ("evaluation", "inspect", "reading", "serving"),
    ("reference", "vllm_plugin"),
    ("conversion",),
    ("converted",),
    ("family_file",),
    ("checkpoint", "experts"),
    ("options", "journal", "jobs"),
    ("families", "modeling", "progress", "device", "writing", "yaml_options"),
    ("family_kinds",),
    ("family_spec", "unsupported"),
    ("errors", "units", "version"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module's dotted name, and its file."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    files += [
        ROOT / PACKAGE / "modeling" / path.name for path in sorted((ROOT / "modeling").glob("*.py"))
    ]
    found = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """The package's modules that a module imports anywhere: at its top, in functions, for types."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if target in known else base for target in inside]
        else:
            continue
        found |= {target for target in targets if target in known}
    return found - {name}


@pytest.fixture(scope="module")
def drawing() -> dict[str, set[str]]:
    """Module -> what it imports."""
    files = modules()
    return {name: imported(name, path, set(files)) for name, path in files.items()}


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def test_every_room_has_a_floor(drawing):
    assert {room(module) for module in drawing} == set(FLOOR)


def test_no_arrow_points_upwards(drawing):
    arrows = [(here, there) for here, targets in drawing.items() for there in targets]
    assert len(arrows) > 300
    upward = [
        f"{here} -> {there}"
        for here, there in arrows
        if room(here) != room(there) and FLOOR[room(here)] >= FLOOR[room(there)]
    ]
    assert upward == []


def test_no_circle(drawing):
    try:
        list(TopologicalSorter(drawing).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
