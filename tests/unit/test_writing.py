"""A file is written whole or not at all; nothing in the package writes one in another way."""

import ast
import os
from pathlib import Path

import pytest

import pace_convert
from pace_convert.writing import write_json, write_whole

PACKAGE = Path(pace_convert.__file__).parent
# Where a file is made in a folder of its own that is moved, flushed or thrown away as a whole; and
# the kernel's.
# unpacked: the part that `write_whole` gives it
ELSEWHERE = {
    "checkpoint/unpacked.py", "conversion/output.py", "evaluation/cost/shapes.py",
    "evaluation/cost/walk.py",
}  # fmt: skip


@pytest.fixture
def steps(monkeypatch):
    """The flushes and renames that are made, in order."""
    made = []
    for name in ("fsync", "replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real: (made.append(name), real(*args))[1]
        )
    return made


@pytest.mark.parametrize(
    "content", ["ä\n", "ä\n".encode(), lambda path: path.write_bytes("ä\n".encode())]
)
def test_what_was_written_is_there_and_nothing_else(tmp_path, steps, content):
    path = tmp_path / "results.json"
    for _ in range(2):
        write_whole(path, content)
        assert path.read_bytes() == "ä\n".encode() and list(tmp_path.iterdir()) == [path]
    # On the disk before it has its name, and then its name too.
    assert len(steps) == 6 and steps[0] == steps[2] == "fsync" and steps[1] in ("replace", "rename")


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("before")

    def stopped(part):
        part.write_text("half of")
        assert path.read_text() == "before"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, stopped)
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_another_place_for_the_part(tmp_path):
    (tmp_path / "staging").mkdir()
    seen = []
    write_whole(
        tmp_path / "a",
        lambda part: (seen.append(part), part.write_text("x")),
        tmp_path / "staging" / "b",
    )
    assert (
        seen == [tmp_path / "staging" / "b"]
        and (tmp_path / "a").read_text() == "x"
        and not seen[0].exists()
    )


def _writes(tree: ast.AST) -> list[int]:
    """Lines that write a file by its name, but for what writes the part that it is given."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, to = node.func.attr, node.args[0] if node.args else None
            if name in ("write_text", "write_bytes") or (
                name == "savefig" and not (isinstance(to, ast.Name) and to.id == "part")
            ):
                found.append(node.lineno)
            mode = to.value if name == "open" and isinstance(to, ast.Constant) else ""
            if isinstance(mode, str) and set(mode) & set("wx") and len(mode) < 4:
                found.append(node.lineno)
    return found


def test_nothing_else_writes():
    files = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    writers = {name for name, path in files.items() if _writes(ast.parse(path.read_text()))}
    assert "writing.py" in writers and writers <= {"writing.py", *ELSEWHERE}
