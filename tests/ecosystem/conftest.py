"""The reference model with a memory that acts within a paragraph, for the tools that need a
tokenizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import convert_folder, load
from transformers import AutoTokenizer

from pace_convert.reference import reference_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference_out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(reference_model(), folder / "source")
    settings = json.loads((folder / "source" / "generation_config.json").read_text())
    del settings["max_new_tokens"]  # made for one-word answers
    (folder / "source" / "generation_config.json").write_text(json.dumps(settings))
    convert_folder(
        folder / "source",
        folder / "out",
        experts=16,
        slots=20,
        update_interval=16,
        fusion_weight=0.6,
    )
    return folder / "out"


@pytest.fixture(scope="session")
def reference(reference_out):
    """(model in float64, tokenizer)"""
    return load(reference_out), AutoTokenizer.from_pretrained(reference_out, trust_remote_code=True)
