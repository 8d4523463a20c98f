"""The arms of a converted folder are what their names say."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from helpers import convert_folder, random_ids

from pace_convert.errors import CallError
from pace_convert.evaluation.arms import ARMS, REREADING, window_settings
from pace_convert.evaluation.bm25 import Bm25Reader
from pace_convert.evaluation.reader import Reader
from pace_convert.evaluation.rereading import RereadingReader
from pace_convert.evaluation.subjects import Subject, load, reach, reread_settings, subjects_of
from pace_convert.evaluation.variants import variants
from pace_convert.reference.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def pairs(make_source, tmp_path_factory):
    """family -> (source, converted); each with a tokenizer."""
    made = {}

    def pair(family):
        if family not in made:
            source, out = make_source(family), tmp_path_factory.mktemp("arms") / family
            build_tokenizer(512).save_pretrained(source)
            convert_folder(source, out, theta_low=0.0, theta_high=0.2)
            made[family] = source, out
        return made[family]

    return pair


@torch.no_grad()
def logits(folder, arm, length=40, **memory):
    subject = load(Subject(str(folder), arm, tuple(memory.items())), "cpu")
    return subject.model(random_ids(2, length)).logits.clone()


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi3", "opt", "falcon", "starcoder2"])
@torch.no_grad()
def test_base_is_the_source_bit_for_bit(pairs, family):
    source, out = pairs(family)
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weights = load(Subject(str(out), "base"), "cpu").model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.state_dict().items())
    assert torch.equal(logits(out, "base"), expected(random_ids(2, 40)).logits)


def test_weights_are_read_as_the_type_that_is_asked_for(pairs):
    """Rotary frequencies stay fp32, and the same answers in another type are other results."""
    _, out = pairs("qwen2")
    auto, half = Subject(str(out)), Subject(str(out), dtype="bfloat16")
    assert auto.key() != half.key() and load(auto, "cpu").model.dtype == torch.float32
    model = load(half, "cpu").model
    assert model.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_arms_differ_where_they_should(pairs):
    _, out = pairs("qwen2")
    made = {arm: logits(out, arm, 120) for arm in (*ARMS, "pace")}  # what is near is not recalled
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(made["ce"], made["base"], **close)
    torch.testing.assert_close(made["pa"], made["ce+pa"], **close)
    for arm in ("window", "reread", "bm25"):  # in a text that they hold whole
        assert torch.equal(made[arm], made["base"])
    assert torch.equal(made["reread+recall"], made["recall"])
    assert torch.equal(made["pace"], made["ce+pa"])
    for one, other in (
        ("base", "pa"),
        ("base", "recall"),
        ("pa", "ce+pa-expert"),
        ("pa-expert", "ce+pa-expert"),
        ("pa", "pa-expert"),
    ):
        assert (made[one] - made[other]).abs().max() > 1e-3, (one, other)


def test_parameters_are_switched_and_do_not_stay(pairs):
    _, out = pairs("qwen2")
    plain = logits(out, "pace")
    changed = logits(out, "pace", fusion_weight=0.9, layers=(0,))
    assert not torch.equal(plain, changed)
    assert torch.equal(logits(out, "pace"), plain)


@torch.no_grad()
def test_no_parameter_leaks_where_config_json_has_none(pairs, tmp_path):
    """A folder from before there were match_norm and outlier_norm, with a default left out too."""
    folder = shutil.copytree(pairs("qwen2")[1], tmp_path / "before")
    config = json.loads((folder / "config.json").read_text())
    for name in ("match_norm", "outlier_norm", "noise_weight"):
        del config["pace"]["memory"][name]
    (folder / "config.json").write_text(json.dumps(config))

    def settings(**memory):
        return load(Subject(str(folder), memory=tuple(memory.items())), "cpu").model.memory_settings

    plain = settings()
    assert (plain.match_norm, plain.outlier_norm, plain.noise_weight) == (False, 0.0, 0.1)
    for name, value in (("match_norm", True), ("outlier_norm", 3.0), ("noise_weight", 0.4)):
        assert settings(**{name: value}) == replace(plain, **{name: value})
        assert settings() == plain


WINDOW = (("window", 16), ("span_width", 4), ("spans", 2), ("first_tokens", 4))


def test_arms_that_re_read_measure_that_alone(pairs):
    """No fusion in them, and no window in the arms of fusion; nothing stays for the next arm."""
    _, out = pairs("qwen2")
    own = load(Subject(str(out)), "cpu").model.window_settings
    kinds = {
        "window": (RereadingReader, 0),
        "reread": (RereadingReader, 2),
        "bm25": (Bm25Reader, 2),
    }
    for arm, (kind, spans) in kinds.items():
        reader = load(Subject(str(out), arm, window=WINDOW), "cpu")
        model, settings = reader.model, reader.settings
        assert type(reader) is kind and model.memory_settings.layers == ()
        assert (settings.window, settings.spans, settings.first) == (16, spans, 4)
        assert settings.layer == own.layer and settings.key_size == own.key_size
        assert (model.window_settings is None) == (not model.memory_enabled) == (arm == "bm25")
        assert reader.context is None
    for arm in ("base", "ce", "pa", "ce+pa-expert"):
        reader = load(Subject(str(out), arm), "cpu")
        assert type(reader) is Reader and reader.model.window_settings is None
        assert reader.model.memory_enabled == ("pa" in arm) and reader.context == 512
        assert reader.model.memory_settings.layers
    pace = load(Subject(str(out)), "cpu")
    assert pace.model.window_settings == own and type(pace) is RereadingReader


def test_base_and_re_reading_need_the_same_weights(pairs):
    names = ("base", *REREADING)
    assert len({Subject(str(pairs("qwen2")[1]), arm).weights for arm in names}) == 1


@torch.no_grad()
def test_beyond_the_working_context_they_differ(pairs):
    _, out = pairs("qwen2")
    ids = random_ids(1, 120).tolist()[0]
    base, window, reread, bm25 = (
        load(Subject(str(out), arm, window=WINDOW), "cpu").log_probs(ids)
        for arm in ("base", "window", "reread", "bm25")
    )
    whole = 4 + 2 * 16  # what a window alone holds, the first context's end
    assert base[:whole] == pytest.approx(window[:whole], rel=1e-4)
    for one, other in ((base, window), (window, reread), (reread, bm25), (base, bm25)):
        assert max(abs(a - b) for a, b in zip(one, other)) > 1e-3


def test_how_far_a_subject_reaches(pairs):
    source, out = pairs("qwen2")
    assert [reach(Subject(str(out), arm)) for arm in ("base", "pa", "window", "bm25", "pace")] == [
        512, 512, None, None, None,
    ]  # fmt: skip
    assert reach(Subject(str(source))) == 512
    without = Subject(str(out), window=(("window", "none"),))
    assert reach(without) == 512 and type(load(without, "cpu")) is Reader


def test_variants_of_the_window(pairs):
    _, out = pairs("qwen2")
    texts = ["window=90,spans=1", "window=90,slots=3,query_half_life=8", "window=none"]
    made = variants(str(out), texts, False)
    assert [subject.name for subject in made] == [
        "pace window=90 spans=1", "pace slots=3 window=90 query_half_life=8.0", "pace window=none",
    ]  # fmt: skip
    assert len({subject.key() for subject in [*made, Subject(str(out))]}) == 4
    first, second, none = (load(subject, "cpu") for subject in made)
    settings = reread_settings(made[1])
    assert (settings.window, settings.query_half_life) == (90, 8.0)
    assert second.model is first.model and none.model.memory_settings.layers
    for text, words in (
        ("window=8", "not a whole number from 16"), ("spans=x", "no whole number"),
        ("stand_out=x", "no number"), ("vote=all", "not one of"),
        ("reread_layer=9", "has 4 layers"), ("window=500", "more than the 512"),
        ("window=1k,2k", "no such parameter"),
    ):  # fmt: skip
        with pytest.raises(CallError) as error:
            variants(str(out), [text], False)
        assert words in error.value.message, text


def test_windows_that_cannot_be():
    with pytest.raises(ValueError, match="no window of its own"):
        window_settings(None, {"spans": 3}, 4, 512)
    made = window_settings(None, {"window": 128, "spans": 1}, 8, None)
    assert (made.window, made.spans, made.layer) == (128, 1, 2)
    assert window_settings(None, {}, 4, 512) is None
    with pytest.raises(ValueError, match="unknown parameter colour"):
        window_settings({"colour": 1}, {}, 4, 512)


def test_a_key_is_the_same_for_what_scores_the_same(pairs, tmp_path):
    _, out = pairs("qwen2")
    shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copy2)
    subjects = [
        Subject(str(out)),
        Subject(str(out), "ce"),
        Subject(str(out), memory=(("slots", 7),)),
        Subject(str(out), "base"),
    ]
    keys = [subject.key() for subject in subjects]
    assert len(set(keys)) == len(keys)
    assert Subject(str(out), label="other").key() == keys[0]
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert Subject(str(tmp_path / "copy")).key() != keys[0]


def test_what_cannot_be_compared_is_refused(pairs, make_source, tmp_path):
    source, out = pairs("qwen2")
    with pytest.raises(CallError, match="not a PaceLLM"):
        subjects_of(str(source), [], ["ce"])
    convert_folder(source, tmp_path / "plain", no_memory=True)
    assert [
        subject.arm for subject in subjects_of(str(tmp_path / "plain"), [], ["base", "ce"])
    ] == ["base", "ce"]
    for arm in ("pa", *REREADING):
        with pytest.raises(CallError, match=re.escape(f"so it has no arm {arm}")):
            subjects_of(str(tmp_path / "plain"), [], [arm])
    convert_folder(source, tmp_path / "whole", window="none")
    with pytest.raises(CallError, match="no window of its own, so the arm reread needs one"):
        subjects_of(str(tmp_path / "whole"), [], ["base", "reread"])
    given = (("window", 64),)
    assert subjects_of(str(tmp_path / "whole"), [], ["reread"], window=given)[0].window == given
    with pytest.raises(CallError, match="working context of 2192 tokens"):
        subjects_of(str(out), [], ["reread"], window=(("window", 1000),))
    shutil.copytree(out, tmp_path / "edited")
    with (tmp_path / "edited" / "memory_bank.py").open("a") as file:
        file.write("\n")
    with pytest.raises(CallError, match=r"memory_bank\.py is not as this version ships it"):
        subjects_of(str(tmp_path / "edited"), [], ["pace"])
    with pytest.raises(CallError, match="two models are called"):
        subjects_of(str(out), [str(out)], ["pace"])
