"""pace tune --tunes recall: what it fits predicts what the model then does, it writes what gains on
held-out text, and nothing where nothing is gained.
"""

import json
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import convert_folder, pace_convert, refuse

from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.converted.opened import open_converted
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.evaluation.tune import recall_choose
from pace_convert.evaluation.tune.data import LIKELIHOOD
from pace_convert.evaluation.tune.recall_fit import FITTED, Recalled, fit, gains, recalled
from pace_convert.evaluation.tune.recall_record import record
from pace_convert.modeling.recall_settings import NEWER, RecallSettings
from pace_convert.reference import reference_model
from pace_convert.reference.words import CODES, NAMES

WORDS = ["the", "code", "of", "ada", "is", "river", ".", "hill", "and", "bob"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune") / "out"
    convert_folder(reference_model(), folder, experts=16, memory="fusion,recall", recall_beyond=2)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences that come again and again within a window, others in each: what recall is for."""
    rng, lines = np.random.default_rng(0), []
    for _ in range(44):
        own = [" ".join(rng.choice(WORDS, 9)) for _ in range(3)]
        lines += [str(rng.choice(own)) for _ in range(12)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(lines))
    return path


def tune(out, text, *more):
    return pace_convert(out, "--on", text, "--tunes", "recall", "--length", "96", *more,
        command=("tune",))  # fmt: skip


def test_what_was_fitted_is_what_the_model_does(out):
    """Gains by the recorded pass are those of the model with these settings."""
    reader, ids = load(Subject(str(out), "base"), "cpu"), [5, 9, 7, 5, 9, 7, 5, 9, 8, 7, 5, 9] * 4
    path = f"model.{open_converted(out).family.ffn_input}"
    made = record(reader.model, path, torch.tensor(ids), (1, 2), 48)
    base = reader.log_probs(ids)
    torch.testing.assert_close(made.log_probs, torch.tensor(base).float(), rtol=1e-4, atol=1e-4)
    settings = RecallSettings(
        (1, 2),
        12.0,
        -2.0,
        1.5,
        0.1,
        -1.0,
        48,
        gate_agreement=0.2,
        run_weight=0.5,
        model_weight=0.4,
        beyond=2,
    )  # keys of this model are much alike
    expected = gains(recalled(made, settings), settings)
    reader.model.set_memory_enabled(True)
    reader.model.set_memory(layers=())
    reader.model.set_window()
    reader.model.set_recall(**vars(settings))
    gained = torch.tensor(reader.log_probs(ids)) - torch.tensor(base)
    assert gained.abs().max() > 0.1
    torch.testing.assert_close(expected, gained.float(), rtol=1e-2, atol=2e-3)  # keys in fp16


@pytest.mark.parametrize("behind", [1, 7, 600])
def test_of_an_answer_what_counts_is_recorded(out, behind):
    """The same as of the whole text, and of its last tokens alone; in calls of 512 tokens."""
    reader, ids = load(Subject(str(out), "base"), "cpu"), torch.tensor([5, 9, 7, 8, 9, 5, 5] * 90)
    path = f"model.{open_converted(out).family.ffn_input}"
    whole = record(reader.model, path, ids, (2,), 48)
    part = record(reader.model, path, ids, (2,), 48, behind=behind)
    assert len(part.log_probs) == len(part.known) == len(ids) - behind
    settings = RecallSettings((2,), beyond=2)
    for a, b in zip(
        vars(recalled(part, settings)).values(), vars(recalled(whole, settings)).values()
    ):
        torch.testing.assert_close(a, b[behind - 1 :])


def test_the_gate_is_the_most_likely_one():
    """No other gate nearby gains more on what it was fitted to."""
    torch.manual_seed(0)
    best = torch.rand(500)
    good = torch.rand(500) < best
    log_q = torch.where(good, torch.tensor(-0.1), torch.tensor(-torch.inf))
    agreed = torch.where(good, -0.5, -3.0) * torch.rand(500)
    text = Recalled(
        torch.full((500,), -2.0), log_q, best, torch.rand(500) * 400 + 1, torch.ones(500), agreed
    )
    made = fit([text], RecallSettings())
    gain = gains(text, made).mean()
    assert gain > 0.3 and made.gate_slope > 0 and made.gate_agreement > 0
    assert made.gate_confidence == 0
    for name in FITTED:
        for more in (0.3, -0.3):
            other = replace(made, **{name: getattr(made, name) + more})
            assert gains(text, other).mean() <= gain + 1e-6
    without = fit([text], RecallSettings(), FITTED[:3])
    assert without.gate_agreement == 0 and gains(text, without).mean() < gain


def test_a_gate_that_errs_nowhere_is_one_that_can_be():
    best = torch.linspace(0, 1, 400)
    log_q = torch.where(best > 0.5, torch.tensor(0.0), torch.tensor(-torch.inf))
    one, none = torch.ones(400), torch.zeros(400)
    text = Recalled(torch.full((400,), -3.0), log_q, best, one, one, none)
    assert fit([text], RecallSettings()).gate_slope > 10


def test_what_gains_is_written(out, text, tmp_path):
    folder = shutil.copytree(out, tmp_path / "out")
    before = json.loads((folder / "config.json").read_text())["pace"]["memory"]["recall"]
    done = tune(folder, text, "--dry-run", "--out", tmp_path / "dry")
    assert done.returncode == 0, done.stderr
    assert "Nothing was written (--dry-run)" in done.stdout
    assert json.loads((folder / "config.json").read_text())["pace"]["memory"]["recall"] == before
    done = tune(folder, text, "--out", tmp_path / "found", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    row = facts["finalists"][0]
    assert facts["written"] and row["held_out"]["low"] > 0 and row["worst"] > -0.002
    pace = json.loads((folder / "config.json").read_text())["pace"]
    assert pace["memory"]["recall"] == row["recall"] != before
    assert pace["tuned_recall"]["held_out"] == {
        n: row["held_out"][n] for n in ("mean", "low", "high")
    }
    card = (folder / "README.md").read_text()
    assert "Found by `pace tune`" in card and str(row["recall"]["gate_bias"]) in card
    again = tune(folder, text, "--out", tmp_path / "again")
    assert again.returncode == 0 and "as it is gains as much, or more" in again.stdout
    assert json.loads((folder / "config.json").read_text())["pace"] == pace
    open_converted(open_source(str(folder)).folder)  # is whole, and what it says can be
    assert pace_convert(folder, "--source", reference_model(), command=("verify",)).returncode == 0
    shown = pace_convert(folder, command=("inspect",)).stdout
    assert "recall, " in shown and f"above a similarity of {row['recall']['theta_low']}" in shown


def test_where_nothing_is_gained_off_is_recommended(out, tmp_path):
    """Every word once in a window: nothing that has followed comes again."""
    text, rng = tmp_path / "text.txt", np.random.default_rng(1)
    words = [word for _ in range(44) for word in rng.permutation(NAMES[:96])]
    text.write_text("".join(f" {word}" for word in words))
    done = tune(out, text, "--out", tmp_path / "found")
    assert done.returncode == 0, done.stderr
    assert "Recommended: off" in done.stdout
    assert "tuned_recall" not in json.loads((out / "config.json").read_text())["pace"]


def test_a_conversion_that_is_calibrated(tmp_path):
    """On questions: the answer stood behind the same words before, but that of every eighth, which
    recall makes less likely.
    """
    rng, data = np.random.default_rng(2), tmp_path / "questions.jsonl"
    rows = []
    for number in range(48):
        words = [str(word) for word in rng.choice([*NAMES, *CODES], 16, replace=False)]
        seen, begun = " ".join(words[:12]), " ".join(words[:8])
        answer = words[8:12] if number % 8 else words[12:]
        rows.append({"prompt": f"{seen} . {seen} . {begun}", "answer": " ".join(answer)})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, out = reference_model(), tmp_path / "out"
    for options, words in (
        (("--no-memory",), "--calibrate is for the memory"),
        (("--memory", "fusion"), "--calibrate fits recall"),
        (("--memory", "auto"), "no such file"),
    ):
        on = data if "auto" not in options else tmp_path / "absent.jsonl"
        refuse(pace_convert(source, out, *options, "--calibrate", on), 2, words, out=out)
    done = pace_convert(
        source, out, "--experts", 16, "--recall-beyond", 2, "--calibrate", data, "--json"
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["event"] == "calibrated" and last["written"]
    assert last["finalists"][0]["worst"] < -0.002
    pace = json.loads((out / "config.json").read_text())["pace"]
    assert pace["memory"]["recall"] == last["winner"]["recall"] and "tuned_recall" in pace
    assert recall_choose.OF_ANSWERS in recall_choose.recall_text(last)


@pytest.mark.parametrize("worst, written", [(-0.01, True), (0.0, False)])
def test_what_costs_a_document_is_no_rival(monkeypatch, worst, written):
    """The model's own recall gains more in the mean than what was found: is it kept?"""
    rows = iter([(0.02, 0.0), (0.03, worst)])

    def row(name, *_):
        mean, least = next(rows)
        return {"name": name, "held_out": {"mean": mean, "low": 0.01}, "worst": least}

    monkeypatch.setattr(recall_choose, "_row", row)
    memory = {"recall": asdict(RecallSettings())}
    monkeypatch.setattr(recall_choose, "names_of", lambda _: set(vars(RecallSettings())))
    trial = recall_choose.Trial(RecallSettings(), 0.02)
    data = SimpleNamespace(as_dict=dict, metric=LIKELIHOOD)
    options, converted = SimpleNamespace(model="x", seed=0), SimpleNamespace(layers=4)
    facts = recall_choose._judged(options, converted, data, memory, [trial], [])
    assert (facts["winner"] is not None) == written


def test_a_folder_of_an_earlier_version_gets_what_it_knows(out, tmp_path):
    """Its own files have no order and no model's opinion: nothing is fitted that goes by them."""
    folder, newer = shutil.copytree(out, tmp_path / "out"), {*NEWER}
    rules = folder / "recall_settings.py"
    lines = rules.read_text().splitlines(keepends=True)
    rules.write_text("".join(x for x in lines if x.split(":")[0].strip() not in newer))
    names = recall_choose.names_of(open_converted(folder))
    assert names == set(vars(RecallSettings())) - newer
    settings = recall_choose.settings_of({"layers": [2]}, names)
    assert settings.layers == (2,) and all(getattr(settings, name) == 0 for name in newer)
    reader = load(Subject(str(out), "base"), "cpu")
    path = f"model.{open_converted(out).family.ffn_input}"
    made = record(reader.model, path, torch.tensor([5, 9, 7, 8] * 20), (1, 2), 48)
    text = recall_choose.Read(SimpleNamespace(prompt=[5]), made)
    for trial in recall_choose.search([text], settings, names):
        assert all(getattr(trial.settings, name) == 0 for name in newer)
        written = recall_choose._written(trial.rounded, names)
        assert set(written) == names - {"outside"}  # it has its own
    earlier = {"sharpness": 9.0, "outside": [40.0, -25.0, 22.0, 0.0, 3.0, 0.4]}
    settings = recall_choose.settings_of(earlier, names)
    assert recall_choose._written(settings, names)["outside"] == tuple(earlier["outside"])
