"""Which files of a model folder go with a conversion: those of kinds that a model is known to have,
each with all that it refers to.

What is not the model's own weights is copied whole or left out whole: an adapter's configuration
without its weights would keep the conversion from loading. What is left out is named, with a
reason.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import CallError, DamagedSourceError
from .files import AGAIN, check_file, parse_json, read_json
from .secrets import is_secret_name

# Weights, the model's own shards among them.
WEIGHTS = (
    "*.safetensors", "*.index*.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack",
    "*.ot", "*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.pkl", "*.npz", "*.mlmodel",
)  # fmt: skip
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Tokenizers, templates, configurations, results; documents and pictures of the card; licences.
KNOWN = (
    "*.json", "*.jinja", "*.model", "*.model.v*", "*.tiktoken", "*.vocab", "*.bpe", "*.spm",
    "*.txt", "*.yaml", "*.yml", "*.md", "*.rst", "*.bib", "*.cff", "*.pdf", "*.png", "*.jpg",
    "*.jpeg", "*.gif", "*.svg", "*.webp", "licen[cs]e*", "copying*", "notice*", "use_policy*",
    "terms*", "*_terms.*",
)  # fmt: skip
# Configurations that mean nothing without weights of their own: name -> the weights.
COMPANIONS = {
    "params.json": "consolidated*",
    "openvino_config.json": "openvino_*",
    "ort_config.json": "*.onnx",
}
# peft, where it is installed, loads the model that this names and not the one beside it.
ADAPTER = "adapter_config.json"
MODULES = "modules.json"  # of sentence-transformers: names the folders of its other modules
OF_MODULES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
CUSTOM_GENERATE = "custom_generate/"  # transformers runs it by its name
NAMES_CODE = ("config.json", "tokenizer_config.json", "*processor_config.json")
OTHERS, PART, HIDDEN, SECRET, CODE, UNKNOWN = (
    "other weights",
    "belongs to other weights",
    "hidden",
    "may be a secret",
    "Python that no auto_map names",
    "not known as a part of a model",
)


@dataclass(frozen=True)
class Selection:
    """taken: what is copied as it is. left_out: name -> why; a folder's name ends with "/"."""

    taken: tuple[str, ...]
    left_out: dict[str, str]


def readable_by_name(files: Iterable[str], include: Sequence[str]) -> list[str]:
    """What may be downloaded before it is known what is taken: no weights, nothing hidden, no
    secrets but those that are asked for.
    """
    return [
        file
        for file in files
        if not is_weights(file)
        and (_matches(file, include) or not (_is_hidden(file) or is_secret_name(file)))
    ]


def select(folder: Path, files: Sequence[str], own: set[str], include: Sequence[str]) -> Selection:
    """What of a folder's files goes with a conversion.

    own: the model's own files, which are neither. include: patterns of what is taken beside what a
    model is known to have. Raises CallError for a pattern that fits no file or an adapter,
    DamagedSourceError for an auto_map that can't be read.
    """
    others = [file for file in files if file not in own]
    for pattern in include:
        if not any(fnmatch.fnmatchcase(file, pattern) for file in others):
            raise CallError(
                f"--include {pattern} fits no file of the source", "give a name or a pattern"
            )
    wanted = _with_their_folders(others, include)
    if any(PurePosixPath(file).name == ADAPTER and "/" not in file for file in wanted):
        raise CallError(
            f"--include would take {ADAPTER}, and peft would load the model that it names instead",
            "merge the adapter into the model first, or leave it out",
        )
    modules = _module_folders(folder) if MODULES in others else set()
    why = _why_not(others, wanted, _code(folder, others), modules)
    return Selection(tuple(file for file in others if file not in why), _as_folders(why))


def by_name(files: Iterable[str], own: set[str]) -> list[str]:
    """What of a folder's files would go with a conversion by their names, where none is there to be
    read; no Python.
    """
    others = [file for file in files if file not in own]
    why = _why_not(others, set(), set(), set())
    return [file for file in others if file not in why and not file.endswith(".py")]


def asked_for(files: Iterable[str], include: Sequence[str]) -> set[str]:
    """What the patterns fit."""
    return {file for file in files if _matches(file, include)}


def is_weights(file: str) -> bool:
    """Whether a name is one of weights in any format."""
    return _matches_name(file, WEIGHTS)


def named_code(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Python files that an auto_map of the folder names -> the file that has the auto_map. Code of
    another repository is not among them.
    """
    found: dict[str, str] = {}
    for file in files:
        if "/" not in file and _matches_name(file, NAMES_CODE):
            auto_map = read_json(folder, file).get("auto_map")
            for classes in auto_map.values() if isinstance(auto_map, dict) else ():
                for name in classes if isinstance(classes, list) else [classes]:
                    if isinstance(name, str) and "." in name and "--" not in name:
                        found.setdefault(name.rpartition(".")[0] + ".py", file)
    return found


def _with_their_folders(files: Sequence[str], include: Sequence[str]) -> set[str]:
    """What the patterns fit; of a folder of other weights all, if they fit anything of it."""
    asked = asked_for(files, include)
    whole = {_top(file) for file in files if _top(file) and is_weights(file)}
    folders = {_top(file) for file in asked} & whole
    return asked | {file for file in files if _top(file) in folders and not _is_hidden(file)}


def _why_not(
    files: Sequence[str], wanted: set[str], code: set[str], modules: set[str]
) -> dict[str, str]:
    """What is left out, and why. code: Python that an auto_map leads to; modules: folders that
    sentence-transformers would load.
    """
    why = _by_kind(files, wanted, code)
    return why | _parts_of_others(files, wanted, why, modules)


def _by_kind(files: Sequence[str], wanted: set[str], code: set[str]) -> dict[str, str]:
    """What is left out for what it is itself, and why."""
    why: dict[str, str] = {}
    for file in files:
        if file in wanted:
            continue
        if is_secret_name(file):
            why[file] = SECRET
        elif _is_hidden(file):
            why[file] = HIDDEN
        elif is_weights(file):
            why[file] = OTHERS
        elif file.endswith(".py"):
            if file not in code and not file.startswith(CUSTOM_GENERATE):
                why[file] = CODE
        elif not _matches_name(file, KNOWN):
            why[file] = UNKNOWN
    return why


def _parts_of_others(
    files: Sequence[str], wanted: set[str], why: dict[str, str], modules: set[str]
) -> dict[str, str]:
    """What is left out because what it belongs to is: folders with other weights, companions."""
    absent = [file for file, reason in why.items() if reason == OTHERS]
    folders = {_top(file) for file in absent} - {""}
    broken = modules & folders
    if broken:
        folders |= modules
    part = {}
    for file in files:
        name = PurePosixPath(file).name
        pattern = COMPANIONS.get(file)
        if (
            file not in why
            and file not in wanted
            and (
                _top(file) in folders
                or name == ADAPTER
                or (pattern and any(fnmatch.fnmatchcase(other, pattern) for other in absent))
                or (broken and _matches(file, OF_MODULES))
            )
        ):
            part[file] = PART
    return part


def _module_folders(folder: Path) -> set[str]:
    """Top folders of the modules that sentence-transformers would load."""
    try:
        modules = parse_json(check_file(folder, MODULES).read_bytes())
    except ValueError as error:
        raise DamagedSourceError(f"{MODULES} is not valid JSON ({error})", AGAIN) from error
    listed = modules if isinstance(modules, list) else []
    paths = [module.get("path") for module in listed if isinstance(module, dict)]
    return {path.strip("/").split("/")[0] for path in paths if isinstance(path, str)} - {""}


def _code(folder: Path, files: Sequence[str]) -> set[str]:
    """Python files that an auto_map names, and those that these import, on and on."""
    known = set(readable_by_name(files, ()))
    found: set[str] = set()
    todo = [name for name in named_code(folder, ["config.json", *files]) if name in known]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += [name for name in _imports(check_file(folder, file)) if name in known]
    return found


def _imports(path: Path) -> list[str]:
    """Files that a module imports from beside it, as transformers finds them."""
    text = path.read_text(encoding="utf-8", errors="replace")
    names = re.findall(r"^\s*import\s+\.(\S+)\s*$", text, re.MULTILINE)
    names += re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.MULTILINE)
    for group in re.findall(r"^\s*from\s+\.\s+import\s+\(?([\w\s,]+)", text, re.MULTILINE):
        names += re.findall(r"\w+", group)
    return [name + ".py" for name in names]


def _as_folders(why: dict[str, str]) -> dict[str, str]:
    """Hidden and rubbish folders, and those of other weights, in a line each."""
    found: dict[str, str] = {}
    for file, reason in sorted(why.items()):
        parts = file.split("/")
        whole = reason in (OTHERS, PART) and len(parts) > 1
        at = next((n for n, part in enumerate(parts[:-1]) if _is_rubbish(part)), 0 if whole else -1)
        name = file if at < 0 else "/".join(parts[: at + 1]) + "/"
        found.setdefault(name, reason)
    return found


def _top(file: str) -> str:
    """The folder of the model's folder in which a file lies; "" for none."""
    return file.split("/")[0] if "/" in file else ""


def _is_hidden(file: str) -> bool:
    return any(_is_rubbish(part) for part in file.split("/"))


def _is_rubbish(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def _matches(file: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _matches_name(file: str, patterns: Iterable[str]) -> bool:
    """By the last part of a name, whatever its case."""
    name = PurePosixPath(file).name.lower()
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
