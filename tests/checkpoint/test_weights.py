"""Promise 7: conversion changes no weight; and `verify` notices where one was changed."""

import json

import numpy as np
import pytest
import torch
from helpers import ACTIVE, convert_folder
from safetensors.torch import load_file, save_file

from pace_convert.converted import open_converted
from pace_convert.families import FAMILIES
from pace_convert.progress import Progress
from pace_convert.source import open_source
from pace_convert.verify import verify
from pace_convert.writer import read_permutation

QUIET = Progress(quiet=True)


def tensors_of(folder):
    merged = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        merged.update(load_file(shard))
    return merged


def check(source, out):
    result = verify(open_converted(out), open_source(str(source)), QUIET)
    assert result.passed and not result.edited_files and result.logits_match, result
    return result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [False, True])
def test_inverse_permutation_gives_the_source(make_source, tmp_path, family, dtype, shards):
    source = make_source(family, dtype=dtype, shards=shards, tie_word_embeddings=shards)
    assert (len(list(source.glob("*.safetensors"))) > 1) == shards
    convert_folder(source, tmp_path / "out")
    result = check(source, tmp_path / "out")
    assert result.tensors == len(tensors_of(source)) and result.nbytes > 0

    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for layer, (permutation, _) in enumerate(read_permutation(tmp_path / "out")):
        mlp = f"model.layers.{layer}.mlp."
        p = torch.from_numpy(permutation).long()
        assert torch.equal(after[mlp + "gate_proj.weight"], before[mlp + "gate_proj.weight"][p])
        assert torch.equal(after[mlp + "up_proj.weight"], before[mlp + "up_proj.weight"][p])
        assert torch.equal(after[mlp + "down_proj.weight"], before[mlp + "down_proj.weight"][:, p])
        if family == "llama":
            assert torch.equal(after[mlp + "gate_proj.bias"], before[mlp + "gate_proj.bias"][p])
            assert torch.equal(after[mlp + "down_proj.bias"], before[mlp + "down_proj.bias"])
        assert not np.array_equal(permutation, np.arange(len(permutation)))


def test_experts_that_do_not_divide(make_source, tmp_path):
    source = make_source("qwen2")
    convert_folder(source, tmp_path / "out", experts=7)
    check(source, tmp_path / "out")
    for _, sizes in read_permutation(tmp_path / "out"):
        assert sorted(set(sizes.tolist())) == [10, 11] and sizes.sum() == 72


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_verify_finds_one_changed_weight(qwen2_pair, make_source, tmp_path, name):
    source = make_source("qwen2")
    convert_folder(source, tmp_path / "out")
    weights = tensors_of(tmp_path / "out")
    weights[name][3, 1] += 1e-3
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    result = verify(open_converted(tmp_path / "out"), open_source(str(source)), QUIET)
    assert result.different == (name,) and not result.passed


def test_edited_modeling_files_are_not_run(make_source, tmp_path):
    source = make_source("qwen2")
    convert_folder(source, tmp_path / "out")
    with (tmp_path / "out" / "memory_bank.py").open("a") as file:
        file.write("raise SystemExit('edited code ran')\n")
    from pace_convert.errors import CallError

    with pytest.raises(CallError, match=r"memory_bank\.py is not the file this version ships"):
        verify(open_converted(tmp_path / "out"), open_source(str(source)), QUIET)
    result = verify(open_converted(tmp_path / "out"), open_source(str(source)), QUIET, logits=False)
    assert result.edited_files == ("memory_bank.py",)


def test_converting_twice_gives_the_same_bytes(make_source, tmp_path):
    source = make_source("mistral", shards=True)
    for out in ("a", "b"):
        convert_folder(source, tmp_path / out / "same-name")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_expert_order_does_not_depend_on_the_dtype_of_storage(make_source, tmp_path):
    """bf16 weights stored as fp32 are the same weights."""
    source = make_source("qwen2", dtype=torch.bfloat16)
    wide = tmp_path / "wide"
    wide.mkdir()
    save_file({k: v.float() for k, v in tensors_of(source).items()}, wide / "model.safetensors", metadata={"format": "pt"})
    (wide / "config.json").write_text(json.dumps({**json.loads((source / "config.json").read_text()), "dtype": "float32"}))
    permutations = []
    for name, folder in (("a", source), ("b", wide)):
        convert_folder(folder, tmp_path / name, experts=ACTIVE["experts"])
        permutations.append(read_permutation(tmp_path / name))
    for (a, _), (b, _) in zip(*permutations):
        assert np.array_equal(a, b)
