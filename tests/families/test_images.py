"""Multimodal models that read images: in a batch of different lengths as alone, ids of images are
never recalled, and a text with an image is not read again.
"""

import pytest
import torch
from helpers import convert_folder, load, random_ids
from more_families import IMAGE_TOKEN, MORE_CONFIGS
from test_families_work import CAPACITY, GATE, WINDOW, close, logits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PIXELS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# Tokens that an image of 8 x 8 pixels takes, and the arguments that bring it.
TOKENS = {
    "aya_vision": 1, "gemma3": 4, "idefics3": 1, "internvl": 1, "llava": 4, "llava_next": 10,
    "mistral3": 4, "qwen2_vl": 1, "qwen2_5_vl": 1, "qwen3_vl": 1, "smolvlm": 1,
}  # fmt: skip


def images(row, which):
    """Arguments for these of the two images, one for each row."""
    pixels = PIXELS[which]
    if row.startswith("qwen"):
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
        grid = torch.tensor([[1, 2, 2]] * len(pixels))
        return {"pixel_values": patches.reshape(-1, 48), "image_grid_thw": grid}
    if row in ("smolvlm", "idefics3"):
        return {"pixel_values": pixels[:, None]}
    if row == "llava_next":  # the whole image, and its only part
        pixels = torch.stack([pixels, pixels], 1)
    named = row in ("mistral3", "llava_next")
    sizes = {"image_sizes": torch.tensor([[8, 8]] * len(pixels))} if named else {}
    return {"pixel_values": pixels, **sizes}


def inputs(row, prompts, which):
    """Arguments of rows of these ids, padded on the left, with an image each."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt, 1
    types = (ids == IMAGE_TOKEN).long()
    kind = "token_type_ids" if row == "gemma3" else "mm_token_type_ids"
    kind = kind if row == "gemma3" or row.startswith("qwen") else ""
    more = {kind: types} if kind else {}
    return {"input_ids": ids, "attention_mask": mask, **more, **images(row, which)}


def prompt(row, before, behind):
    """Ids with an image among them, twice the same words around it."""
    words = random_ids(1, before, seed=before, vocabulary=20)[0]
    image = torch.full((TOKENS[row],), IMAGE_TOKEN)
    return torch.cat([words, image, random_ids(1, behind, seed=before, vocabulary=20)[0]])


@pytest.fixture(scope="module", params=TOKENS)
def family_row(request):
    return request.param


@pytest.fixture(scope="module")
def model(family_row, make_source, tmp_path_factory):
    source, out = make_source(family_row), tmp_path_factory.mktemp("out") / "converted"
    convert_folder(source, out, memory="fusion,reread,recall", **WINDOW, **GATE)
    made = load(out)
    if family_row == "gemma3":  # its projection begins as zeros
        torch.nn.init.normal_(made.model.multi_modal_projector.mm_input_projection_weight)
    return made


def test_a_batch_of_different_lengths_is_read_as_alone(family_row, model):
    prompts = [prompt(family_row, 7, 20), prompt(family_row, 12, 9)]
    options = {
        "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    together = model.generate(**inputs(family_row, prompts, [0, 1]), **options)
    for i, one in enumerate(prompts):
        alone = model.generate(**inputs(family_row, [one], [i]), **options)
        for got, expected in zip(together.logits, alone.logits):
            close(got[i], expected[0])
    other = model.generate(**inputs(family_row, [prompts[0]], [1]), **options)
    assert (other.logits[0][0] - together.logits[0][0]).abs().max() > 1e-6  # the image is seen
    with model.memory_disabled():
        base = model.generate(**inputs(family_row, [prompts[0]], [0]), **options)
    assert (base.logits[0][0] - together.logits[0][0]).abs().max() > 1e-3


def test_no_id_of_an_image_is_recalled(family_row, model):
    one = inputs(family_row, [prompt(family_row, 7, 7)], [0])
    settings = model.memory_settings
    model.set_memory(layers=())  # fusion changes predictions of everything
    mixed = logits(model, **one).log_softmax(-1)
    with model.memory_disabled():
        base = logits(model, **one).log_softmax(-1)
    model.set_memory(layers=settings.layers)
    assert (mixed - base).abs().max() > 1e-2
    assert (mixed - base)[..., IMAGE_TOKEN].max() < 1e-9


def test_beyond_the_window_an_image_is_refused(family_row, model):
    with pytest.raises(ValueError, match="a part is an image or a video"):
        model.generate(
            **inputs(family_row, [prompt(family_row, 7, CAPACITY)], [0]),
            max_new_tokens=2,
            pad_token_id=0,
        )


def test_the_processor_is_the_sources(make_source, tmp_path):
    source = make_source("llava")
    words = {**{f"w{i}": i for i in range(IMAGE_TOKEN)}, "<image>": IMAGE_TOKEN}
    splitting = Tokenizer(models.WordLevel(words, unk_token="w0"))
    splitting.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitting, additional_special_tokens=["<image>"]
    )
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    LlavaProcessor(
        CLIPImageProcessorPil(**sizes), tokenizer, patch_size=4, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    ).save_pretrained(source)  # fmt: skip
    convert_folder(source, tmp_path / "out", memory="recall")
    read = [
        AutoProcessor.from_pretrained(folder, trust_remote_code=True)(
            images=PIXELS[0], text="w1 <image> w2", return_tensors="pt"
        )
        for folder in (source, tmp_path / "out")
    ]
    assert read[1]["input_ids"].tolist() == [[1, *[IMAGE_TOKEN] * 4, 2]]
    assert torch.equal(read[1]["pixel_values"], read[0]["pixel_values"])
    assert "AutoModelForImageTextToText" in (tmp_path / "out" / "README.md").read_text()


def test_sizes_are_those_of_the_tests_of_families():
    assert set(TOKENS) < set(MORE_CONFIGS)
