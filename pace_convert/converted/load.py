"""The one way to load a model, and whether the Python that a converted folder would run is what
this version ships.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import CONFIG, Source
from ..checkpoint.dequantised import quantisation_of
from ..checkpoint.files import read_json
from ..checkpoint.own_code import own_model_code
from ..checkpoint.selection import ADAPTER
from ..device import DType, load_dtype
from ..errors import CallError, DamagedSourceError, PaceError, one_line
from ..families import FAMILIES
from ..family_spec import FamilySpec
from .format import MODELING
from .opened import Converted
from .shipped import auto_map, modeling_files

GENERATION = "generation_config.json"


def edited_code(converted: Converted, source: Source | None = None) -> list[str]:
    """Files that are not what this version ships: modeling files, and config.json where it names
    other classes.

    source: what was converted; other Python files and classes must be as they are there. Without it
    they are not looked at: nothing that this version ships imports them.
    """
    folder = converted.files.folder
    shipped = modeling_files(converted.family) if converted.needs_code else {}
    edited = [name for name, text in shipped.items() if not _reads(folder / name, text.encode())]
    if source is not None:
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
        others = [name for name in names if name not in shipped]
        edited += [
            name
            for name in others
            if not _reads(source.folder / name, (folder / name).read_bytes())
        ]
    if _names_others(converted, source):
        edited.append("config.json (auto_map)")
    return edited


def _names_others(converted: Converted, source: Source | None) -> bool:
    """Whether config.json names other classes than the conversion wrote there."""
    classes = converted.files.config.get("auto_map")
    if not converted.needs_code:  # then there are the source's, and none that would be the model
        if source is None:
            return own_model_code(converted.files.config) is not None
        return (classes or {}) != (source.config.get("auto_map") or {})
    expected = auto_map(source.config if source else {}, converted.family)
    names = list(classes) if source and isinstance(classes, dict) else list(expected)
    return not isinstance(classes, dict) or any(
        classes.get(name) != expected.get(name) for name in names
    )


def refuse_edited(edited: list[str], trust_remote_code: bool, instead: str = "") -> None:
    """Raises CallError where something was edited and is not trusted. instead: what else can be
    done, for the hint.
    """
    if edited and not trust_remote_code:
        raise CallError(
            f"{edited[0]} is not as this version ships it, so it is not run",
            f"read it, then give --trust-remote-code{', ' + instead if instead else ''}",
        )


def refuse_own_code(source: Source, trust_remote_code: bool, instead: str = "") -> None:
    """Raises CallError where a model's own code makes its logits and is not trusted. instead: as
    above.
    """
    code = own_model_code(source.config)
    if code and not trust_remote_code:
        raise CallError(
            f"{source.name} has model code of its own ({code}), which is not run unasked",
            f"read it, then give --trust-remote-code{', ' + instead if instead else ''}",
        )


def runs_own_code(files: Source | Converted) -> bool:
    """Whether model code of the folder's own would be loaded, and not that of a conversion."""
    if isinstance(files, Converted):
        return not files.needs_code and own_model_code(files.files.config) is not None
    return own_model_code(files.config) is not None


def load_silently() -> None:
    """From now on transformers shows no bar when it loads a model, and says nothing but errors: it
    would name what a model without its head leaves out.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_model(
    files: Source | Converted,
    *,
    device: str = "cpu",
    head: bool = True,
    layers: int | None = None,
    trust_remote_code: bool = False,
    dtype: DType = "auto",
) -> Any:
    """The model of a folder that is on this machine, in eval mode, on a device that
    `resolve_device` has named.

    dtype: as `load_dtype` has it; of quantised weights it is what their config.json says. head:
    False for the decoder without its vocabulary head. layers: of a conversion only so many, the
    first, without fusion and recall. No Python of a folder runs but a conversion's modeling files,
    and those only as this version ships them, and, with `trust_remote_code`, edited ones and the
    model code of a folder that is no conversion. Raises CallError for both without it, PaceError
    where the model does not load.
    """
    source = files.files if isinstance(files, Converted) else files
    if isinstance(files, Converted):
        refuse_edited(edited_code(files), trust_remote_code)
    own_code = runs_own_code(files)
    if own_code:
        refuse_own_code(source, trust_remote_code)
    load_silently()
    with in_words(files, "load"):
        packed = quantisation_of(source.config) is not None  # then layers have types of their own
        cls = model_class(files, head)
        shorter = {} if layers is None else {"config": _first_layers(cls, source.folder, layers)}
        model = cls.from_pretrained(
            source.folder,
            dtype="auto" if packed else load_dtype(source.nbytes, device, dtype),
            device_map=device if packed else None,
            local_files_only=True,
            trust_remote_code=own_code,
            **shorter,
        )
        if packed:
            return model.eval()
        return model.eval().to(device)


def _first_layers(cls: Any, folder: Path, layers: int) -> Any:
    """The configuration of a conversion with its first layers alone."""
    config = cls.config_class.from_pretrained(folder, local_files_only=True)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    memory = {**config.pace["memory"], "layers": [], "enabled": True, "recall": None}
    config.pace = {**config.pace, "memory": memory}
    return config


def quantiser_problem(config: dict) -> str:
    """Why quantised weights can't be loaded on this machine, in transformers' words; "" where they
    can, or are plain.
    """
    if quantisation_of(config) is None:
        return ""
    from transformers.quantizers import AutoHfQuantizer

    try:
        stated = copy.deepcopy(config["quantization_config"])
        AutoHfQuantizer.from_config(stated, pre_quantized=True).validate_environment()
    except (ImportError, RuntimeError, ValueError) as error:
        return one_line(" ".join(str(error).split())) or type(error).__name__
    return ""


@contextlib.contextmanager
def in_words(files: Source | Converted, what: str) -> Iterator[None]:
    """Whatever a library raises becomes a PaceError that names the file. what: what the model does
    not do then, "load" or "run".
    """
    source = files.files if isinstance(files, Converted) else files
    try:
        yield
    except PaceError:
        raise
    except Exception as error:  # each class fails in its own way, and so do edited files
        lines = (line.strip() for line in str(error).splitlines())
        reason = " ".join(line for line in lines if line)[:300] or type(error).__name__
        hint = "check its files"
        if isinstance(files, Converted):
            hint = "`pace verify` says what differs from the source"
        where = _to_blame(files, error)
        raise PaceError(f"{source.name} does not {what}: {where}{reason}", hint) from error


def _to_blame(files: Source | Converted, error: Exception) -> str:
    """The file that an error of loading or running a model comes from, and a colon; "" where it is
    none's fault.
    """
    import torch
    from safetensors import SafetensorError

    folder = (files.files if isinstance(files, Converted) else files).folder
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return ""
    paths = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    if (folder / ADAPTER).is_file() and any("peft" in (*p.parts, p.stem) for p in paths):
        return f"{ADAPTER}: "
    if isinstance(error, SafetensorError):
        return "its weights: "
    edited = edited_code(files) if isinstance(files, Converted) else []
    if paths and paths[-1].name in edited:
        return f"{paths[-1].name}: "
    return f"{GENERATION if generation_problem(folder) else CONFIG}: "


def generation_problem(folder: Path) -> str | None:
    """What transformers says of generation_config.json; None where that is as it should be."""
    from transformers import GenerationConfig

    if not (folder / GENERATION).is_file():
        return None
    try:
        read_json(folder, GENERATION)
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except DamagedSourceError as error:
        return error.message
    except Exception as error:  # in its own way too
        return f"{GENERATION}: {' '.join(str(error).split())[:300] or type(error).__name__}"
    return None


def model_class(files: Source | Converted, head: bool = True) -> Any:
    """The class to load a model with: a conversion's own, or the Auto class of transformers."""
    if isinstance(files, Converted) and files.needs_code:
        return _shipped_class(files, head)
    config = files.files.config if isinstance(files, Converted) else files.config
    return _own_class(FAMILIES.get(config["model_type"]), head)


def _own_class(family: FamilySpec | None, head: bool) -> Any:
    """The Auto class of transformers, whose own classes are loaded."""
    import transformers

    if not head:
        return transformers.AutoModel
    return getattr(transformers, family.auto_class if family else "AutoModelForCausalLM")


def _shipped_class(converted: Converted, head: bool) -> Any:
    """The class in the modeling files.

    Not an Auto class with trust_remote_code: that runs what auto_map names, and a custom_generate/
    that came along from the source.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    family = converted.family
    name = f"Pace{family.causal_lm_class if head else family.model_class}"
    return get_class_from_dynamic_module(
        f"{MODELING.removesuffix('.py')}.{name}", converted.files.folder
    )


def _reads(path: Path, content: bytes) -> bool:
    """Whether a file is there and holds this, byte for byte."""
    return path.is_file() and path.read_bytes() == content
