"""What SECURITY.md says of the Python files in a checkpoint: arithmetic on tensors, and no way out
of it.
"""

import ast
import builtins
import functools
import json
import re
import shutil

import pytest

from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.converted.format import MODELING
from pace_convert.converted.opened import open_converted
from pace_convert.converted.shipped import modeling_files
from pace_convert.converted.verify import verify
from pace_convert.errors import CallError
from pace_convert.families import FAMILIES
from pace_convert.progress import Progress

STANDARD = {
    "__future__",
    "collections.abc",
    "contextlib",
    "dataclasses",
    "functools",
    "hashlib",
    "inspect",
    "math",
    "threading",
    "typing",
    "weakref",
}
TORCH = {"torch", "torch.nn.functional"}
TRANSFORMERS = {
    "transformers",
    "transformers.cache_utils",
    "transformers.conversion_mapping",
    "transformers.modeling_outputs",
    "transformers.utils.import_utils",
}
# The one file that may write and read another, where a caller says so: a text that was read.
FILE = "reread_file.py"
OF_FILE = {"json", "pathlib", "safetensors", "safetensors.torch"}
OF_TOKENIZER = {"json"}
# What the tokenizer of a Mistral does beyond it: it is loaded.
IN_TOKENIZER = {"uses .from_pretrained"}
SAVING = {"json", "pathlib", "transformers.utils"}
# What the one file that opens files does: `save_pretrained` copies two of them.
IN_SAVING = {
    *(f"imports {name}" for name in SAVING),
    *("uses .push_to_hub", "uses .save_pretrained", "uses bytes"),
}
MORE = {FILE: OF_FILE, "tokenization_pace.py": OF_TOKENIZER}
# A forward that takes a cache by the usual name says so, to whoever asks for its parameters.
IN_RECURRENT = {"uses .__signature__"}
BEYOND = {
    "memory_saving.py": IN_SAVING,
    "tokenization_pace.py": IN_TOKENIZER,
    "recurrent_cache.py": IN_RECURRENT,
}
BUILTINS = {
    "AttributeError", "BaseException", "Exception", "NotImplementedError", "OSError",
    "RuntimeError", "TypeError", "ValueError", "abs", "all", "any", "bool", "bytearray",
    "classmethod", "dict", "enumerate", "float", "getattr", "hasattr", "id", "int", "isinstance",
    "len", "list", "map", "max", "min", "next", "object", "property", "range", "round", "set",
    "slice", "sorted", "staticmethod", "str", "sum", "super", "tuple", "type", "zip",
}  # fmt: skip
UNDERSCORED = {"__init__", "__name__"}
# Parts of torch and transformers that read or write files, run other code or reach the network.
REACHING_OUT = {
    "_C", "_inductor", "classes", "cpp", "cpp_extension", "distributed", "dynamic_module_utils",
    "from_file", "from_pretrained", "hub", "jit", "library", "load", "load_library",
    "multiprocessing", "ops", "package", "pipeline", "push_to_hub", "save", "save_pretrained",
    "serialization", "utils",
}  # fmt: skip


def imported(tree):
    """(module, name or None) of every absolute import, and the relative modules."""
    absolute, relative = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            absolute |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative.add((node.level, node.module))
    return absolute, relative


def findings(text, shipped, more=frozenset()):
    """What a file does that it should not. more: modules that it may import beside the others'."""
    tree = ast.parse(text)
    absolute, relative = imported(tree)
    found = [
        f"imports {module}"
        for module, _ in absolute
        if module not in STANDARD | TORCH | TRANSFORMERS | more
    ]
    found += [f"imports {name} from {module}" for module, name in absolute if name in REACHING_OUT]
    found += [
        f"imports .{module}"
        for level, module in relative
        if level != 1 or f"{module}.py" not in shipped
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and hasattr(builtins, node.id) and node.id not in BUILTINS:
            found.append(f"uses {node.id}")
        if isinstance(node, ast.Attribute):
            dunder = node.attr.startswith("__") and node.attr not in UNDERSCORED
            found += [f"uses .{node.attr}"] * (dunder or node.attr in REACHING_OUT)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
        ):
            name = getattr(node.args[1], "value", "a computed name")
            found += [f"gets {name}"] * (str(name).startswith("__") or name in REACHING_OUT)
    return found


@pytest.fixture(scope="module")
def shipped():
    """(name, text) of every file that some family's checkpoints ship."""
    return {file for family in FAMILIES.values() for file in modeling_files(family).items()}


def test_shipped_files_only_compute(shipped):
    names = {name for name, _ in shipped}
    assert (
        len(shipped) >= len(FAMILIES)
        and [
            (name, found)
            for name, text in shipped
            for found in findings(text, names, MORE.get(name, frozenset()))
            if found not in BEYOND.get(name, ())
        ]
        == []
    )


def test_one_file_opens_files(shipped):
    """It copies two, by their names, and nothing else in it reaches out."""
    (text,) = (text for name, text in shipped if name == "memory_saving.py")
    assert set(findings(text, {"memory_saving.py"})) == IN_SAVING
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    named = sorted(call.func.attr for call in calls if isinstance(call.func, ast.Attribute))
    assert [name for name in named if name in ("read_bytes", "write_bytes", "replace")] == [
        "read_bytes", "replace", "write_bytes",
    ]  # fmt: skip


def test_nothing_is_allowed_that_is_not_used(shipped):
    trees = [ast.parse(text) for _, text in shipped]
    modules = {module for tree in trees for module, _ in imported(tree)[0]}
    names = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert modules == STANDARD | TORCH | TRANSFORMERS | SAVING | OF_FILE and names >= BUILTINS


def test_nothing_points_to_what_is_not_there(shipped):
    """A checkpoint has no DESIGN, and its README is the model card."""
    assert [name for name, text in shipped if re.search("DESIGN|README", text)] == []


def test_modeling_pace_lists_the_files_in_reading_order():
    """All of them and no other; each needs only those before it."""
    needs = functools.cache(lambda text: imported(ast.parse(text))[1])  # most are every family's
    for family in FAMILIES.values():
        files = modeling_files(family)
        listed = re.findall(
            r"^    (\w+\.py) +\w", ast.get_docstring(ast.parse(files[MODELING]), clean=False), re.M
        )
        assert sorted(listed) == sorted(files) and len(listed) == len(files)
        for place, name in enumerate(listed):
            needed = {f"{module}.py" for _, module in needs(files[name])}
            assert needed <= set(listed[:place]), name


def test_lines_are_short(shipped):
    assert [
        (name, line) for name, text in shipped for line in text.splitlines() if len(line) > 100
    ] == []


@pytest.mark.parametrize(
    "code",
    [
        "import os", "from os import path", "import subprocess as s", "import socket",
        "from .. import secrets", "from .other import x", "import torch.hub",
        "from torch import hub", "from torch.utils import cpp_extension", "open('x')", "eval('1')",
        "exec('1')", "compile('1', '', 'eval')", "__import__('os')", "globals()", "breakpoint()",
        "torch.load('x')", "torch.ops.load_library('x')", "().__class__.__subclasses__()",
        "getattr(torch, 'hub')", "getattr(x, '__globals__')", "AutoModel.from_pretrained('a/b')",
        "import urllib.request", "import pickle",
    ],
)  # fmt: skip
def test_a_way_out_would_be_found(code):
    assert findings(code, {"memory_bank.py"})


def redirect(folder):
    """transformers would fetch and run another repository's code."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "someone/else--modeling.Model"
    (folder / "config.json").write_text(json.dumps(config))


def add_a_package(folder):
    (folder / "more").mkdir()
    (folder / "more" / "code.py").write_text("print()")


@pytest.mark.parametrize(
    ("change", "named"), [(redirect, "config.json (auto_map)"), (add_a_package, "more/code.py")]
)
def test_verify_runs_no_code_that_we_do_not_ship(qwen2_pair, tmp_path, change, named):
    out = shutil.copytree(qwen2_pair[1], tmp_path / "out")
    change(out)
    source, progress = open_source(str(qwen2_pair[0])), Progress(quiet=True)
    assert verify(open_converted(out), source, progress, logits=False).edited_files == (named,)
    with pytest.raises(
        CallError, match=re.escape(f"{named} is not as this version ships it, so it is not run")
    ):
        verify(open_converted(out), source, progress)
