"""Promise 6: the converted repository stands alone."""

import json
import shutil

import pytest
import torch
from helpers import (
    FAMILY_CONFIGS,
    SMALL,
    convert_folder,
    family_of,
    load,
    load_alone,
    random_ids,
    run_alone,
)
from safetensors import safe_open

from pace_convert.converted.format import SEAL
from pace_convert.reference import reference_model

SHIPPED = [
    "memory_assisted.py",
    "memory_bank.py",
    "memory_clock.py",
    "memory_cache.py",
    "memory_draft.py",
    "memory_layer.py",
    "memory_saving.py",
    "memory_session.py",
    "memory_settings.py",
    "memory_stack.py",
    "modeling_pace.py",
    "pace_memory.py",
    "recall.py",
    "recall_bank.py",
    "recall_cache.py",
    "recall_settings.py",
    "recurrent_cache.py",
    "reread.py",
    "reread_bank.py",
    "reread_cache.py",
    "reread_calls.py",
    "reread_context.py",
    "reread_texts.py",
    "reread_file.py",
    "reread_finder.py",
    "reread_keys.py",
    "reread_asking.py",
    "reread_lookup.py",
    "reread_outside.py",
    "reread_words.py",
    "reread_schedule.py",
    "reread_settings.py",
]


@pytest.fixture(scope="module")
def loaded_alone(family_pairs, tmp_path_factory, request):
    """All families that are asked for, in two processes: load, generate and save; then load what
    was saved, from elsewhere.
    """
    ids, folder = random_ids(1, 40), tmp_path_factory.mktemp("alone")
    given = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    rows = dict.fromkeys(one["standing_row"] for one in given if "standing_row" in one)
    outs = {row: family_pairs(row)[1] for row in rows}
    jobs = [
        {"folder": out, "ids": ids.tolist(), "save_to": folder / "saved" / row}
        for row, out in outs.items()
    ]
    first = load_alone(jobs, modules=folder / "m1")
    shutil.move(folder / "saved", folder / "elsewhere")
    jobs = [{"folder": folder / "elsewhere" / row, "ids": ids.tolist()} for row in outs]
    second = load_alone(jobs, modules=folder / "m2")
    return dict(zip(outs, zip(first, second, strict=True), strict=True))


@pytest.mark.works("loads alone, generates, saves, loads again")
@pytest.mark.parametrize("standing_row", FAMILY_CONFIGS)
def test_stands_alone(loaded_alone, standing_row):
    first, second = loaded_alone[standing_row]
    family = family_of(standing_row)
    assert first == second
    assert first["same"] and first["type"] == f"pace_{family.model_type}"
    assert (first["class"], first["inner"]) == (
        f"Pace{family.causal_lm_class}",
        f"Pace{family.model_class}",
    )


def test_loaded_alone_is_what_is_loaded_here(qwen2_pair, tmp_path):
    ids = random_ids(1, 40)
    alone = load_alone([{"folder": qwen2_pair[1], "ids": ids.tolist()}], modules=tmp_path)[0]
    model = load(qwen2_pair[1])
    with torch.no_grad():
        assert model(ids).logits.sum().item() == pytest.approx(alone["sum"], rel=1e-12)
        with model.memory_disabled():
            assert model(ids).logits.sum().item() != pytest.approx(alone["sum"], rel=1e-9)


def test_the_tokenizer_needs_no_code_and_asks_nothing(tmp_path):
    """Neither with trust nor without; stdin is closed, and a question would be an error."""
    convert_folder(reference_model(), tmp_path / "out", experts=16)
    code = """
import json
from transformers import AutoTokenizer
load = AutoTokenizer.from_pretrained
found = [load(sys.argv[1], trust_remote_code=value) for value in (False, True)]
print(json.dumps([type(one).__module__.split(".")[0] for one in found]))
"""
    assert run_alone(code, tmp_path / "out", modules=tmp_path) == ["transformers"] * 2


def test_config_without_pace_is_the_base_model(qwen2_pair, tmp_path):
    """As AutoConfig makes one: no `pace`, no memory, no error."""
    model = load(qwen2_pair[1])
    plain = type(model)(type(model.config)(**SMALL))
    assert plain.config.pace is None
    assert plain(random_ids(1, 8)).logits.shape == (1, 8, 120)


def test_config_without_the_intermediate_size(qwen2_pair, tmp_path):
    shutil.copytree(qwen2_pair[1], tmp_path / "edited")
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    del config["pace"]["intermediate_size"]
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"pace\.intermediate_size is missing"):
        load(tmp_path / "edited")


def test_forgetting_trust_remote_code_is_an_error(qwen2_pair, tmp_path):
    code = """
import json
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print(json.dumps("loaded"))
except Exception as error:
    print("\\n" + json.dumps(str(error)))  # behind transformers' question, which finds no stdin
"""
    assert "trust_remote_code" in run_alone(code, qwen2_pair[1], modules=tmp_path)


def test_exact_files(make_source, tmp_path):
    source = make_source("qwen2")
    for name in (
        "LICENSE",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "nested/notes.txt",
        "pytorch_model.bin",
        ".git/HEAD",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}" if name.endswith(".json") else f"{name} of the source")
    out = tmp_path / "out"
    convert_folder(source, out)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == sorted(
        [
            SEAL, "LICENSE", "README.md", "README.source.md", "chat_template.jinja", "config.json",
            "config.source.json", "generation_config.json", "model.safetensors",
            "model.safetensors.index.json", "nested/notes.txt", "pace_hashes.json",
            "pace_permutation.safetensors", "tokenizer.json", *SHIPPED,
        ]
    )  # fmt: skip
    for name in ("LICENSE", "tokenizer.json", "chat_template.jinja", "nested/notes.txt"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "README.source.md").read_text() == "README.md of the source"
    assert "README.source.md" in (out / "README.md").read_text()


def test_config_is_the_sources_plus_pace(qwen2_pair):
    before, after = (json.loads((folder / "config.json").read_text()) for folder in qwen2_pair)
    assert {key: after[key] for key in before if key not in ("model_type", "architectures")} == {
        key: value for key, value in before.items() if key not in ("model_type", "architectures")
    }
    assert set(after) - set(before) == {"pace", "auto_map"}
    assert after["model_type"] == "pace_qwen2" and after["architectures"] == [
        "PaceQwen2ForCausalLM"
    ]
    assert (
        after["pace"]["intermediate_size"] == 72
        and after["pace"]["memory"]["layers"] == [1, 2]
        and after["pace"]["memory"]["slots"] == 6
    )


def test_no_memory_keeps_the_architecture(make_source, tmp_path):
    source = make_source("llama")
    convert_folder(source, tmp_path / "out", no_memory=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    from transformers import LlamaForCausalLM

    a, b = (
        LlamaForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (source, tmp_path / "out")
    )
    ids = random_ids(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(b(ids).logits, a(ids).logits, rtol=1e-9, atol=1e-9)
    assert not torch.equal(
        a.model.layers[0].mlp.gate_proj.weight, b.model.layers[0].mlp.gate_proj.weight
    )


def test_readers_of_all_safetensors_can_skip_the_permutation(qwen2_pair):
    """vLLM and SGLang read every *.safetensors that the index names; so the index is there for one
    shard too.
    """
    index = json.loads((qwen2_pair[1] / "model.safetensors.index.json").read_text())
    with safe_open(qwen2_pair[1] / "model.safetensors", "pt") as file:
        assert set(index["weight_map"]) == set(file.keys())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
