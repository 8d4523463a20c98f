"""A quantised source as a plain one: which methods there are for, and the plain checkpoint that
comes of it, one tensor at a time.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import CallError
from ..writing import write_json
from .fp8 import SCALES, Fp8
from .mxfp4 import Mxfp4
from .packed import Packed, Weights
from .shards import TensorInfo
from .unpacked import Unpacking, lay_out

METHODS = (*SCALES, "mxfp4")
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def quantisation_of(config: dict) -> str | None:
    """The method by which a model is quantised, as its config.json says; None where it is not."""
    stated = config.get("quantization_config")
    if not stated:
        return None
    return str(stated.get("quant_method", "unknown")) if isinstance(stated, dict) else "unknown"


def unpack_quantised(source: Packed) -> tuple[dict, dict[str, TensorInfo], Unpacking]:
    """config.json of the plain model, where its tensors will lie, and how they are made.

    Raises CallError for a source that is not quantised by one of METHODS, DamagedSourceError for
    one that lacks scales.
    """
    method = quantisation_of(source.config)
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise CallError(
            f"--dequantise is for {known}; the source is {method or 'not quantised'}",
            "give --no-experts to leave its weights as they are" if method else "leave it out",
        )
    dtype = NAMES.get(str(source.config.get("dtype") or source.config.get("torch_dtype")), "BF16")
    weights = Weights(source)
    made: Fp8 | Mxfp4
    if method in SCALES:
        made = Fp8(source, weights, SCALES[method], dtype)
    else:
        made = Mxfp4(source, weights, dtype)
    config = {key: v for key, v in source.config.items() if key != "quantization_config"}
    folder = TemporaryDirectory(prefix="pace-plain-")
    for name in source.side_files:
        target = Path(folder.name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / name, target)
    write_json(Path(folder.name, "config.json"), config)
    tensors, headers = lay_out(made.shapes())
    what = f"{method}, dequantised"
    return config, tensors, Unpacking(what, source.states, folder, headers, made.bits)
