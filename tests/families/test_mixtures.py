"""Experts inside a mixture's experts: one permutation each, whichever names the checkpoint has, and
the way back.
"""

import contextlib

import numpy as np
import pytest
import torch
import transformers
from helpers import convert_folder, family_of, load, random_ids
from more_families import MORE_CONFIGS
from safetensors.torch import load_file, save_file

from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.conversion.plan import make_plan
from pace_convert.conversion.undo import undo
from pace_convert.converted.format import read_permutation
from pace_convert.converted.integrity import check_integrity
from pace_convert.converted.opened import open_converted
from pace_convert.converted.verify import verify
from pace_convert.errors import CallError, DamagedSourceError
from pace_convert.evaluation.subjects import Subject, check_arm
from pace_convert.inspect.quality import layer_quality
from pace_convert.inspect.report import inspect
from pace_convert.options import ConvertOptions
from pace_convert.progress import Progress

QUIET = Progress(quiet=True)
# One of each way to name experts, and whether the tensors are transformers' own, of all of them.
CASES = [
    ("mixtral", False), ("mixtral", True), ("qwen2_moe", False), ("qwen2_moe", True),
    ("deepseek_v3", True), ("granitemoe", False), ("gpt_oss", False),
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def pair(request, tmp_path_factory):
    row, packed = request.param
    family, folder = family_of(row), tmp_path_factory.mktemp(row)
    torch.manual_seed(0)
    config = getattr(transformers, family.config_class)(**MORE_CONFIGS[row])
    model = getattr(transformers, family.causal_lm_class)(config)
    for name, parameter in model.named_parameters():
        if "bias" in name:  # they begin as zeros
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "source", save_original_format=not packed)
    convert_folder(folder / "source", folder / "out", memory="reread", window=64)
    return folder / "source", folder / "out"


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_every_expert_has_an_order_of_its_own(pair):
    orders = read_permutation(pair[1])
    last = [name for name in orders if name.startswith("layers.3.experts.")]
    assert len(last) == 4
    for one in last:
        assert not np.array_equal(orders[one].permutation, np.arange(24))
    assert not np.array_equal(orders[last[0]].permutation, orders[last[1]].permutation)
    assert len(inspect(open_converted(pair[1]), QUIET)["layers"]) == 4


def test_quality_is_of_all_its_experts_together(pair, tmp_path):
    """The mean over a layer's FFNs, of the rows that were clustered; and the page of it."""
    converted, page = open_converted(pair[1]), tmp_path / "page.html"
    facts = inspect(converted, QUIET, quality=True, page=page)
    before = tensors(pair[0])
    first = {tensor.group: tensor for tensor in reversed(converted.ffn())}
    explained = []
    for group, order in converted.orders.items():
        tensor = first[group]
        if tensor.layer == 1:
            rows = (
                before[tensor.name] if tensor.index is None else before[tensor.name][tensor.index]
            )
            rows = rows.T if tensor.axis else rows
            half = slice(0, None, 2) if tensor.interleaved else slice(len(rows) // tensor.parts)
            rows = rows[half].float().numpy()[order.permutation].copy()
            explained.append(layer_quality(rows, order.sizes).experts.explained)
    found = facts["layers"][1]["quality"]
    assert found["experts"]["explained"] == pytest.approx(np.mean(explained), abs=1e-6)
    assert found["by_expert"] is None or len(explained) == 1
    assert "Variance explained" in page.read_text()


def test_what_routes_is_left_alone(pair):
    """Only tensors with an axis over an expert's neurons differ from the source's."""
    before, after = tensors(pair[0]), tensors(pair[1])
    touched = {t.name for t in open_converted(pair[1]).ffn()}
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name not in touched), name
    routing = [name for name in before if "gate.weight" in name or "router" in name]
    assert routing and not touched & set(routing)


@torch.no_grad()
def test_it_computes_what_the_source_does(pair):
    ids, made = random_ids(2, 30), []
    for folder in pair:
        model = load(folder)
        off = getattr(model, "memory_disabled", contextlib.nullcontext)
        with off():
            made.append(model(ids).logits)
    torch.testing.assert_close(made[1], made[0], rtol=1e-8, atol=1e-8)


def test_the_loss_that_balances_a_router_is_the_sources(pair):
    ids, made = random_ids(2, 30), []
    for folder in pair:
        model = load(folder).train()
        if "output_router_logits" not in model.config.to_dict():
            pytest.skip("its class has no such loss")
        output = model(ids, labels=ids, output_router_logits=True)
        output.loss.backward()
        made.append([output.aux_loss, output.loss])
    for got, expected in zip(made[1], made[0]):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_undo_gives_the_source(pair, tmp_path):
    restored = undo(open_converted(pair[1]), tmp_path / "original", QUIET)
    assert restored.proved and not restored.changed
    original = (tmp_path / "original" / "model.safetensors").read_bytes()
    assert original == (pair[0] / "model.safetensors").read_bytes()


def test_verify_finds_a_weight_of_one_expert(pair, tmp_path):
    out = tmp_path / "out"
    convert_folder(pair[0], out, memory="reread", window=64)
    name = [t.name for t in open_converted(out).ffn()][-1]
    weights = tensors(out)
    weights[name].view(-1)[-1] += 1e-3
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    result = verify(open_converted(out), open_source(str(pair[0])), QUIET, logits=False)
    assert result.different == (name,) and not result.passed


def test_a_lost_permutation_is_noticed(pair):
    converted = open_converted(pair[1])
    converted.orders.popitem()
    with pytest.raises(DamagedSourceError, match="one permutation per FFN"):
        converted.ffn()


def plan(make_source, row, **options):
    source = open_source(str(make_source(row)))
    return make_plan(source, ConvertOptions(experts=8, **options))


def test_fusion_is_where_all_tokens_pass(make_source):
    with pytest.raises(CallError, match="no FFN sees all of them"):
        plan(make_source, "mixtral", memory="fusion")
    assert plan(make_source, "mixtral").memory_layers == ()
    assert plan(make_source, "deepseek_v3").memory_layers == (1, 2)
    with pytest.raises(CallError, match="layer 0 has no FFN that all tokens pass"):
        plan(make_source, "deepseek_v3", memory_layers=(0, 2))
    with pytest.raises(CallError, match="24 neurons in an expert"):
        source = open_source(str(make_source("qwen2_moe")))
        make_plan(source, ConvertOptions(experts=30))


def test_who_asks_for_fusion_is_told_why_there_is_none(pair):
    if "fusion" not in open_converted(pair[1]).family.refused:
        return
    with pytest.raises(ValueError, match="no FFN sees all of them"):
        load(pair[1]).set_memory(layers=(1,))
    with pytest.raises(CallError, match=r"has no arm ce\+pa: .* no FFN sees all of them"):
        check_arm(Subject(str(pair[1]), "ce+pa"))


@pytest.mark.parametrize("pair", [("mixtral", False), ("granitemoe", False)], indirect=True)
@torch.no_grad()
def test_saved_under_transformers_own_names(pair, tmp_path):
    """`save_original_format=False`: it loads, it verifies, and the way back is the source's
    weights, bit for bit.
    """
    model = load(pair[1], torch.float32)
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    saved, ids = load(tmp_path / "saved", torch.float32), random_ids(2, 30)
    assert torch.equal(saved(ids).logits, model(ids).logits)
    assert check_integrity(open_converted(tmp_path / "saved"), QUIET).passed
    undo(open_converted(tmp_path / "saved"), tmp_path / "original", QUIET)
    expected = load(pair[0], torch.float32).state_dict()
    got = load(tmp_path / "original", torch.float32).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
