"""A loaded model is a Python object like any other: it can be copied, saved whole, and handed to a
process.
"""

import copy
import multiprocessing
import pickle

import pytest
import torch
from helpers import load, random_ids
from transformers import AutoModel


def through_a_file(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
}


@pytest.mark.works("copy.deepcopy, pickle and torch.save of a model")
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["qwen2", "opt", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@torch.no_grad()
def test_a_copy_is_the_model_and_leads_a_life_of_its_own(family_pairs, tmp_path, how, family, used):
    model = load(family_pairs(family)[1])
    ids = random_ids(2, 30)
    if used:  # its layers are hooked then
        model(ids)
    twin = COPIES[how](model, tmp_path)
    assert type(twin) is type(model) and torch.equal(twin(ids).logits, model(ids).logits)
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(twin.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    before = model(ids).logits
    twin.set_memory(slots=2, fusion_weight=0.9, theta_low=-1.0)
    assert torch.equal(model(ids).logits, before) and not torch.equal(twin(ids).logits, before)
    twin.set_memory_enabled(False)
    with model.memory_disabled():
        assert torch.equal(twin(ids).logits, model(ids).logits)


def test_the_decoder_alone_too(qwen2_pair):
    model = AutoModel.from_pretrained(qwen2_pair[1], trust_remote_code=True).eval()
    twin = pickle.loads(pickle.dumps(model))
    ids = random_ids(1, 20)
    assert torch.equal(twin(ids).last_hidden_state, model(ids).last_hidden_state)


def answer(model, ids, queue):
    torch.set_num_threads(1)
    queue.put(model(ids).logits.sum().item())


@pytest.mark.works("a model handed to a spawned process")
@torch.no_grad()
def test_a_spawned_process_takes_it(qwen2_pair):
    model = load(qwen2_pair[1])
    ids = random_ids(1, 30)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer, args=(model, ids, queue))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert queue.get(timeout=10) == pytest.approx(model(ids).logits.sum().item(), rel=1e-12)
