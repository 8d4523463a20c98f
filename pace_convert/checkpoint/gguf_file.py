"""A GGUF file as a source: config, tokenizer and names of tensors as transformers makes them of it,
each tensor dequantised by the `gguf` library when it is asked for.

transformers' own load holds the whole model; the pieces of it that work on one tensor are used
here, so that the result is the same bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CallError, DamagedSourceError, PaceError, one_line
from ..families import FAMILIES
from ..family_spec import FamilySpec
from .files import read_json
from .unpacked import Unpacking, lay_out

if TYPE_CHECKING:
    import torch

    from .shards import TensorInfo

# Those whose names and weights are tested against transformers' own load.
TESTED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")
KINDS = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def open_gguf(path: Path) -> tuple[dict, dict[str, TensorInfo], Unpacking]:
    """config.json, where the tensors will lie, and how they are made.

    Raises CallError for a file that can't be a source, DamagedSourceError for one that is broken.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise DamagedSourceError(f"{path.name} is not a GGUF file", "download it again")
    folder = TemporaryDirectory(prefix="pace-gguf-")
    try:
        config = _config(path)
        family = _family(path, config)
        model, made = _Tensors.open(path, family, config)
        config.dtype = made.dtype
        _write_small_files(path, config, family, Path(folder.name))
    except BaseException:
        folder.cleanup()
        raise
    tensors, headers = lay_out(made.shapes(model))
    state = path.stat()
    states = {path.name: (state.st_size, state.st_mtime_ns)}
    what = f"GGUF {path.name}"
    found = read_json(Path(folder.name), "config.json")
    return found, tensors, Unpacking(what, states, folder, headers, made.bits)


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise CallError(
            "a GGUF source needs the gguf library", "pip install 'pace-convert[gguf]'"
        ) from error
    except Exception as error:  # in its own way for each kind of file
        raise CallError(
            f"transformers can't read {path.name}: {_reason(error)}",
            "give a safetensors checkpoint of the model",
        ) from error


def _family(path: Path, config: Any) -> FamilySpec:
    if config.model_type not in TESTED:
        raise CallError(
            f"{path.name} is a {config.model_type}: GGUF sources can be {', '.join(TESTED)}",
            "give a safetensors checkpoint of the model",
        )
    return FAMILIES[config.model_type]


def _write_small_files(path: Path, config: Any, family: FamilySpec, folder: Path) -> None:
    """config.json, generation_config.json, and the tokenizer with its chat template."""
    from transformers import AutoTokenizer, GenerationConfig

    config.architectures = [family.causal_lm_class]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise PaceError(
            f"transformers can't make a tokenizer of {path.name}: {_reason(error)}",
            "give a safetensors checkpoint of the model",
        ) from error


class _Tensors:
    """The tensors of a file, by the names that they have in a checkpoint."""

    def __init__(self, by_name: dict[str, Any], processor: Any, dtype: torch.dtype) -> None:
        self.by_name, self.processor, self.dtype = by_name, processor, dtype

    @classmethod
    def open(cls, path: Path, family: FamilySpec, config: Any) -> tuple[Any, _Tensors]:
        """With the model that they are for, without memory for its weights. Raises
        DamagedSourceError.
        """
        import torch
        import transformers
        from gguf import GGUFReader
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            load_gguf_checkpoint,
        )

        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        parsed = load_gguf_checkpoint(path, return_tensors=False)["config"]
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed)
        with torch.device("meta"):
            model = getattr(transformers, family.causal_lm_class)(config)
        names = get_gguf_hf_weights_map(model, processor)
        by_name = {names[t.name]: t for t in reader.tensors if t.name in names}
        tied = set(model.all_tied_weights_keys)
        missing = sorted(set(model.state_dict()) - set(by_name) - tied)
        if missing:
            raise DamagedSourceError(
                f"{path.name} lacks the tensor {missing[0]}", "download it again"
            )
        for name, value in model.state_dict().items():
            if name in by_name and by_name[name].n_elements != value.numel():
                raise DamagedSourceError(
                    f"{path.name}: {by_name[name].name} is not of the shape {list(value.shape)} "
                    "that transformers reads in the file's facts",
                    "give a safetensors checkpoint of the model",
                )
        return model, cls(by_name, processor, _stored_type(reader))

    def shapes(self, model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of each, in the model's order."""
        return {
            name: (KINDS[str(self.dtype)], tuple(value.shape))
            for name, value in model.state_dict().items()
            if name in self.by_name
        }

    def bits(self, name: str) -> np.ndarray:
        """A tensor's values as transformers makes them, cast to the stored type."""
        import torch
        from gguf import dequantize

        tensor = self.by_name[name]
        values = self.processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name
        ).weights
        cast = torch.from_numpy(np.array(values)).to(self.dtype).contiguous()
        return cast.view(torch.uint8).numpy()  # numpy has no bf16


def _stored_type(reader: Any) -> torch.dtype:
    """The file's own where all of it is plain, the half one if there are two; else bf16."""
    import torch

    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    if kinds == {"F32"}:
        return torch.float32
    return torch.float16 if kinds <= {"F16", "F32"} else torch.bfloat16


def _reason(error: Exception) -> str:
    return one_line(str(error))[:200] or type(error).__name__
