"""Promise 7: conversion changes no weight; and `verify` notices where one was changed."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    ACTIVE,
    FAMILY_CONFIGS,
    active_thresholds,
    convert_folder,
    family_of,
    load,
    random_ids,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.conversion.plan import make_plan
from pace_convert.converted.format import read_permutation
from pace_convert.converted.opened import open_converted
from pace_convert.converted.verify import verify
from pace_convert.options import ConvertOptions
from pace_convert.progress import Progress

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


# One of each layout in every dtype, in one file and in several; the other rows once.
LAYOUTS = ("llama", "phi3", "gpt2", "opt")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = [(row, dtype, shards) for row in LAYOUTS for dtype in DTYPES for shards in (False, True)]
CASES += [(row, torch.bfloat16, True) for row in FAMILY_CONFIGS if row not in LAYOUTS]


@pytest.mark.works("convert, verify")
@pytest.mark.parametrize(("row", "dtype", "shards"), CASES)
def test_inverse_permutation_gives_the_source(make_source, tmp_path, row, dtype, shards):
    source = make_source(row, dtype=dtype, shards=shards, tie_word_embeddings=shards)
    assert (len(list(source.glob("*.safetensors"))) > 1) == shards
    convert_folder(source, tmp_path / "out")
    result = check(source, tmp_path / "out")
    assert result.tensors == len(tensors_of(source)) and result.nbytes > 0
    for permutation, _ in read_permutation(tmp_path / "out").values():
        assert not np.array_equal(permutation, np.arange(len(permutation)))


def halves(tensor, p):
    return torch.cat([half[p] for half in tensor.chunk(2)])


# What the permutation does to a layer's tensors, written out for each layout.
REORDERED = {
    "llama": (
        "model.layers.{}.mlp.",
        {
            "gate_proj.weight": lambda w, p: w[p],
            "up_proj.weight": lambda w, p: w[p],
            "down_proj.weight": lambda w, p: w[:, p],
            "gate_proj.bias": lambda b, p: b[p],
            "up_proj.bias": lambda b, p: b[p],
            "down_proj.bias": lambda b, p: b,
        },
    ),
    "phi3": (
        "model.layers.{}.mlp.",
        {"gate_up_proj.weight": halves, "down_proj.weight": lambda w, p: w[:, p]},
    ),
    "gpt2": (
        "transformer.h.{}.mlp.",
        {
            "c_fc.weight": lambda w, p: w[:, p],
            "c_fc.bias": lambda b, p: b[p],
            "c_proj.weight": lambda w, p: w[p],
            "c_proj.bias": lambda b, p: b,
        },
    ),
    "opt": (
        "model.decoder.layers.{}.",
        {
            "fc1.weight": lambda w, p: w[p],
            "fc1.bias": lambda b, p: b[p],
            "fc2.weight": lambda w, p: w[:, p],
            "fc2.bias": lambda b, p: b,
        },
    ),
}


@pytest.mark.parametrize("row", REORDERED)
def test_tensors_of_each_layout(family_pairs, row):
    source, out = family_pairs(row)
    before, after = tensors_of(source), tensors_of(out)
    path, expected = REORDERED[row]
    for layer, (permutation, _) in enumerate(read_permutation(out).values()):
        p = torch.from_numpy(permutation).long()
        for name, reorder in expected.items():
            name = path.format(layer) + name
            assert torch.equal(after.pop(name), reorder(before.pop(name), p)), name
    for name in before:
        assert torch.equal(after[name], before[name]), name


def test_what_has_neurons_is_permuted_and_nothing_else(family_pair):
    """By size: in the tests' models no other axis is as long as the FFN's (twice that where gate
    and up are fused).
    """
    source = open_source(str(family_pair[0]))
    plan = make_plan(source, ConvertOptions(**ACTIVE))
    sizes = (plan.intermediate_size, 2 * plan.intermediate_size)
    axes = {
        (name, axis)
        for name, info in source.tensors.items()
        for axis, n in enumerate(info.shape)
        if n in sizes
    }
    assert {(tensor.name, tensor.axis) for tensor in plan.ffn} == axes


@pytest.mark.works("same activations, reordered")
@torch.no_grad()
def test_activations_are_the_sources_reordered(family_pair):
    """The FFN's activation h of the converted model, undone, is the source's: up to rounding, in
    every layer.
    """
    source, out = family_pair
    family, ids, seen = open_converted(out).family, random_ids(2, 30), []
    for model in (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval(),
        load(out),
    ):
        stack = model.base_model.get_submodule(family.stack)
        inputs = []
        for layer in range(4):
            projection = stack.get_submodule(family.projection.format(layer))
            projection.register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0])
            )
        with (
            model.memory_disabled()
            if hasattr(model, "memory_disabled")
            else contextlib.nullcontext()
        ):
            logits = model(ids).logits
        seen.append((inputs, logits))
    for before, after, (permutation, _) in zip(
        seen[0][0], seen[1][0], read_permutation(out).values(), strict=True
    ):
        torch.testing.assert_close(after, before[..., permutation], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen[1][1], seen[0][1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("row", ["gpt2", "opt", "bloom", "gptj", "falcon"])
def test_names_without_the_base_models_prefix(family_pairs, tmp_path, row):
    """As in gpt2's own files (h.0.mlp.c_fc.weight) and in the older OPT ones
    (decoder.layers.0.fc1.weight).
    """
    source = tmp_path / "source"
    shutil.copytree(family_pairs(row)[0], source)
    prefix = family_of(row).base + "."
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors_of(source).items()}
    assert not any(name.startswith(prefix) for name in bare)
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    convert_folder(source, tmp_path / "out", **active_thresholds(row))
    check(source, tmp_path / "out")
    ids = random_ids(1, 40)
    with torch.no_grad():
        assert torch.equal(
            load(tmp_path / "out")(ids).logits, load(family_pairs(row)[1])(ids).logits
        )


def test_experts_that_do_not_divide(make_source, tmp_path):
    source = make_source("qwen2")
    convert_folder(source, tmp_path / "out", experts=7)
    check(source, tmp_path / "out")
    for _, sizes in read_permutation(tmp_path / "out").values():
        assert sorted(set(sizes.tolist())) == [10, 11] and sizes.sum() == 72


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
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

    with pytest.raises(CallError, match=r"memory_bank\.py is not as this version ships it"):
        verify(open_converted(tmp_path / "out"), open_source(str(source)), QUIET)
    result = verify(open_converted(tmp_path / "out"), open_source(str(source)), QUIET, logits=False)
    assert result.edited_files == ("memory_bank.py",)


def test_converting_twice_gives_the_same_bytes(make_source, tmp_path):
    source = make_source("mistral", shards=True)
    for out in ("a", "b"):
        convert_folder(source, tmp_path / out / "same-name")
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_expert_order_does_not_depend_on_the_dtype_of_storage(make_source, tmp_path):
    """bf16 weights stored as fp32 are the same weights."""
    source = make_source("qwen2", dtype=torch.bfloat16)
    wide = tmp_path / "wide"
    wide.mkdir()
    save_file(
        {k: v.float() for k, v in tensors_of(source).items()},
        wide / "model.safetensors",
        metadata={"format": "pt"},
    )
    (wide / "config.json").write_text(
        json.dumps({**json.loads((source / "config.json").read_text()), "dtype": "float32"})
    )
    permutations = []
    for name, folder in (("a", source), ("b", wide)):
        convert_folder(folder, tmp_path / name, experts=ACTIVE["experts"])
        permutations.append(read_permutation(tmp_path / name).values())
    for (a, _), (b, _) in zip(*permutations):
        assert np.array_equal(a, b)
