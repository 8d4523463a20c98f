"""Answer prompts with a checkpoint; reads a job as JSON from stdin, prints JSON.

Run by path in a process of its own, where `pace_convert` is not imported: what it loads must stand
alone. Job: {"model": folder, "batches": [[prompt, ...], ...]}, the prompts of a batch being equally
long.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging


@torch.no_grad()
def answer(model, tokenizer, prompts):
    """The first new token of each prompt, and what the memory did."""
    inputs = tokenizer(prompts, return_tensors="pt")
    cache = DynamicCache(config=model.config)
    length = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=1)
    summary = model.memory_summary(cache) if hasattr(model, "memory_summary") else {}
    return {
        "answers": tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True),
        "memory": summary,
    }


def main():
    logging.disable_progress_bar()
    job = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], trust_remote_code=True, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=True)
    json.dump([answer(model, tokenizer, prompts) for prompts in job["batches"]], sys.stdout)


if __name__ == "__main__":
    main()
