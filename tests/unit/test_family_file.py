"""A family that is not in the table, described in a file."""

import json

import pytest
import torch
import transformers
import yaml
from helpers import ACTIVE, GPT, SMALL, hashes, load, load_alone, random_ids

import pace_convert as pace
from pace_convert.converted.opened import open_converted
from pace_convert.errors import CallError, DamagedSourceError
from pace_convert.families import FAMILIES
from pace_convert.family_file import read_family

# Two that transformers has, with layers and keys of their own; and Llama's facts under a new name.
SPECS = {
    "gpt_neo": {
        "model_type": "gpt_neo", "name": "GPTNeo", "ffn": {"inputs": ["mlp.c_fc"],
        "output": "mlp.c_proj"}, "base": "transformer", "blocks": "h",
        "layer_keys": ["num_layers"], "size_keys": ["intermediate_size"],
        "width_keys": ["hidden_size"],
    },
    "persimmon": {"model_type": "persimmon", "name": "Persimmon", "like": "gpt_neox",
                  "base": "model"},
    "diffllama": {"model_type": "diffllama", "name": "DiffLlama", "like": "llama"},
}  # fmt: skip
CONFIGS = {
    "gpt_neo": {**{k: GPT[k] for k in ("vocab_size", "pad_token_id", "bos_token_id")},
                "hidden_size": 32, "num_layers": 4, "num_heads": 4, "intermediate_size": 72,
                "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 512,
                "eos_token_id": None, "initializer_range": 0.3},
    "persimmon": SMALL,
    "diffllama": SMALL,
}  # fmt: skip


@pytest.fixture(autouse=True)
def not_in_the_table(monkeypatch):
    for model_type in SPECS:
        monkeypatch.delitem(FAMILIES, model_type, raising=False)


@pytest.fixture
def made(request, tmp_path):
    """Source and file of a family."""
    name = SPECS[request.param]["name"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[request.param])
    source, file = tmp_path / "source", tmp_path / "family.yaml"
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(source)
    file.write_text(yaml.safe_dump(SPECS[request.param]))
    return source, file


@pytest.mark.parametrize(
    "made",
    [
        "diffllama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SPECS if name != "diffllama"),
    ],
    indirect=True,
)
def test_converts_verifies_loads_and_undoes_without_the_file(made, tmp_path):
    source, file = made
    out, ids = tmp_path / "out", random_ids(1, 30)
    pace.convert(source, out, pace.ConvertOptions(**ACTIVE), family_spec=file)
    file.unlink()
    assert pace.verify(out).loaded
    compared = pace.verify(out, source)
    assert compared.passed and compared.permuted >= 8 and compared.logits_match
    [alone] = load_alone([{"folder": out, "ids": ids.tolist()}], tmp_path / "modules")
    ours, base = load(out), load(source)
    with torch.no_grad():
        got = ours(ids).logits
        assert alone["sum"] == pytest.approx(got.sum().item())
        with ours.memory_disabled():
            off = ours(ids).logits
    assert torch.allclose(off, base(ids).logits) and not torch.allclose(got, off)
    ours.save_pretrained(tmp_path / "saved")
    assert open_converted(tmp_path / "saved").family.model_type == alone["type"][5:]
    assert pace.undo(out, tmp_path / "back").proved
    assert hashes(tmp_path / "back") == hashes(source)


@pytest.mark.parametrize("made", ["diffllama"], indirect=True)
def test_an_unknown_type_gets_the_file_that_does(made, tmp_path):
    source, file = made
    with pytest.raises(CallError, match="'diffllama' is not supported") as error:
        pace.convert(source, tmp_path / "x")
    assert "named like llama's" in error.value.hint and not (tmp_path / "x").exists()
    file.write_text(error.value.hint.partition("FILE with ")[2].partition(" in it")[0])
    pace.convert(source, tmp_path / "out", pace.ConvertOptions(experts=8), family_spec=file)
    assert pace.verify(tmp_path / "out", source, logits=False).passed


@pytest.mark.parametrize("made", ["diffllama"], indirect=True)
def test_a_type_that_transformers_does_not_have(made, tmp_path):
    source, file = made
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "madeup"}))
    with pytest.raises(CallError, match="'madeup' is not supported") as error:
        pace.convert(source, tmp_path / "x")
    assert "named like llama's, but transformers has no" in error.value.hint
    file.write_text("model_type: madeup\nname: Madeup\n")
    with pytest.raises(CallError, match="no causal language model of the type 'madeup'"):
        pace.convert(source, tmp_path / "x", family_spec=file)


@pytest.mark.parametrize("made", ["diffllama"], indirect=True)
@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"nmae": "X"}, "there is no nmae; did you mean name?"),
        ({"ffn": {"input": ["a"], "output": "b"}}, "there is no input; did you mean inputs?"),
        ({"like": "lama"}, "like is 'lama', which is no family"),
        ({"name": "Diff Llama"}, "name: 'Diff Llama' is no name"),
        ({"base": 'model\nimport os'}, "is no name, and no path"),
        ({"name": "Llama"}, "transformers' class of a diffllama is DiffLlamaForCausalLM"),
        ({"model_type": "persimmon"}, "is for a persimmon, the source is a diffllama"),
        ({"ffn": {"inputs": ["mlp.fc1"], "output": "mlp.fc2"}}, "has no model.layers.0.mlp.fc1"),
        ({"layer_keys": ["depth"]}, "config.json: depth is None"),
        ({"size_keys": ["hidden_size"]}, "axis 0 should be the model's 32 neurons"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_work(made, tmp_path, facts, words):
    source, file = made
    file.write_text(yaml.safe_dump({**SPECS["diffllama"], **facts}))
    with pytest.raises((CallError, DamagedSourceError)) as error:
        pace.convert(source, tmp_path / "x", family_spec=file)
    assert words in error.value.message and not (tmp_path / "x").exists()


@pytest.mark.parametrize("made", ["diffllama"], indirect=True)
def test_a_forged_record_runs_nothing(made, tmp_path):
    source, file = made
    out = tmp_path / "out"
    pace.convert(source, out, pace.ConvertOptions(experts=8), family_spec=file)
    config = json.loads((out / "config.json").read_text())
    config["pace"]["family"]["base"] = "model)\nimport os\n("
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedSourceError, match=r"pace\.family: base"):
        open_converted(out)


def test_what_is_no_file_of_facts(tmp_path):
    file = tmp_path / "family.yaml"
    for text, words in (
        ("- a", "no mapping"),
        ("a: [", "can't read"),
        ("name: X", "lacks model_type"),
    ):
        file.write_text(text)
        with pytest.raises(CallError, match=words):
            read_family(file)
