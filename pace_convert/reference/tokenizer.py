"""The reference model's tokenizer: a Qwen2 byte-level BPE in which every word of the task is one
token.

It has to be a Qwen2Tokenizer: transformers loads that class for `model_type` qwen2 whatever the
files say.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from .task import as_text
from .words import ASSISTANT, END, PAD, SPECIAL, USER, VOCABULARY

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<assistant> {{ message['content'] }}<end>"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(max_length: int) -> Qwen2Tokenizer:
    """A BPE trained on the word list until each " word" is one token, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([word for word in VOCABULARY if word not in SPECIAL], trainer)
    model = json.loads(bpe.to_str())["model"]
    # What `tokenizers` takes, whatever the annotation says.
    merges: Any = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def word_ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """Token id of every word as `task.as_text` writes it. Raises ValueError if a word is not one
    token.
    """
    ids = {}
    for word in VOCABULARY:
        tokens = tokenizer.encode(as_text([word]), add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(f"{word!r} is {len(tokens)} tokens")
        ids[word] = tokens[0]
    return ids
