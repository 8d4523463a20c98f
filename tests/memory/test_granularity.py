"""Expert-granular memory (docs/method.md) on whole models.

Each cortical expert is compared and fused on its own, with the same promises.
"""

import pytest
import torch
from helpers import convert_folder, load, random_ids
from transformers import DynamicCache


@pytest.fixture(scope="module")
def models(make_source, tmp_path_factory):
    """The same weights with both granularities."""
    source, folder = make_source("qwen2"), tmp_path_factory.mktemp("granularity")
    for granularity in ("token", "expert"):
        convert_folder(source, folder / granularity, granularity=granularity)
    return {granularity: load(folder / granularity) for granularity in ("token", "expert")}


@torch.no_grad()
def test_experts_find_other_things_than_tokens(models):
    ids, logits, summaries = random_ids(2, 60), {}, {}
    for granularity, model in models.items():
        output = model(ids, use_cache=True)
        logits[granularity], summaries[granularity] = (
            output.logits,
            model.memory_summary(output.past_key_values)[1],
        )
    torch.testing.assert_close(
        logits["token"][:, :5], logits["expert"][:, :5], rtol=1e-9, atol=1e-9
    )
    assert (logits["token"] - logits["expert"])[:, 6:].abs().max() > 1e-3
    for granularity, experts in (("token", 1), ("expert", 8)):
        counts = [
            sum(summaries[granularity][name][row] for name in ("kept", "mixed", "reused"))
            for row in (0, 1)
        ]
        assert counts == [60 * experts, 60 * experts] and min(summaries[granularity]["reused"]) > 0


@pytest.mark.works("expert-granular memory, padded batch, split calls")
@torch.no_grad()
def test_placement_changes_nothing(models):
    model, lengths = models["expert"], (40, 17)
    ids, mask = torch.zeros(2, 40, dtype=torch.long), torch.zeros(2, 40, dtype=torch.long)
    for i, length in enumerate(lengths):
        ids[i, 40 - length :], mask[i, 40 - length :] = random_ids(1, length, seed=i)[0], 1
    cache, parts = DynamicCache(config=model.config), []
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for a, b in ((0, 13), (13, 14), (14, 31), (31, 40)):
        kwargs = {
            "attention_mask": mask[:, :b],
            "position_ids": positions[:, a:b],
            "past_key_values": cache,
        }
        parts.append(model(ids[:, a:b], **kwargs).logits)
    for i, length in enumerate(lengths):
        alone = model(random_ids(1, length, seed=i)).logits[0]
        torch.testing.assert_close(
            torch.cat(parts, 1)[i, 40 - length :], alone, rtol=1e-8, atol=1e-8
        )


def test_generates_with_other_caches_and_chunks(models):
    ids = random_ids(2, 23)
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    plain = models["expert"].generate(ids, **kwargs)
    assert torch.equal(
        models["expert"].generate(
            ids, cache_implementation="static", disable_compile=True, **kwargs
        ),
        plain,
    )
    assert torch.equal(models["expert"].generate(ids, prefill_chunk_size=4, **kwargs), plain)
    assert not torch.equal(models["token"].generate(ids, **kwargs), plain)
