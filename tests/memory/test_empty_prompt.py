"""Of an empty prompt a PaceLLM says what its base says, and goes on working."""

import pytest
import torch
from helpers import load, random_ids

EMPTY = {
    "ids": {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
    "ids of a tokenizer": {"input_ids": torch.zeros(1, 0), "attention_mask": torch.zeros(1, 0)},
    "rows": {"input_ids": torch.zeros(2, 0, dtype=torch.long)},
    "no rows": {"input_ids": torch.zeros(0, 3, dtype=torch.long)},
    "embeddings": {"inputs_embeds": torch.zeros(1, 0, 32, dtype=torch.float64)},
    "nothing": {},
}


@torch.no_grad()
def said(model, call: str, inputs: dict) -> object:
    try:
        if call == "generate":
            return model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
        return model(**inputs).logits.shape
    except Exception as error:  # whatever it is
        return type(error), str(error)


@pytest.mark.parametrize("row", ["qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("inputs", EMPTY.values(), ids=EMPTY.keys())
def test_it_says_what_the_base_says(family_pairs, row, inputs):
    source, out = family_pairs(row)
    base, model, ids = load(source), load(out), random_ids(1, 20)
    expected = said(model, "generate", {"input_ids": ids})
    for call in ("generate", "forward"):
        assert said(model, call, inputs) == said(base, call, inputs)
        assert said(model, "generate", {"input_ids": ids}) == expected
