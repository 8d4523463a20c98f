"""pace tune: what it measures is what it says, it finds what is there to find, and writes only what
has won.
"""

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import ACTIVE, convert_folder, hashes, pace_convert, refuse

from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.conversion.convert import is_finished
from pace_convert.conversion.plan import make_plan
from pace_convert.converted.format import Difference, Tuned
from pace_convert.converted.opened import open_converted
from pace_convert.converted.retune import write_memory
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.evaluation.tune.data import LIKELIHOOD, DataRequest, read_data
from pace_convert.evaluation.tune.search import PARTS, SearchSpace, best, repair, search
from pace_convert.evaluation.tune.similarity import LEVELS, LayerSimilarity, similarities
from pace_convert.modeling.memory_settings import MemorySettings
from pace_convert.options import ConvertOptions
from pace_convert.progress import Progress
from pace_convert.reference import reference_model

QUIET = Progress(quiet=True)
MEMORY = {**ConvertOptions(update_interval=64).memory_config((1, 2))}
TUNED = Tuned(
    data="book.txt", sha256="0" * 64, metric=LIKELIHOOD, trials=3, seed=0, held_in_items=20,
    held_out_items=20,
    held_in=Difference(mean=0.2, low=0.1, high=0.3), held_out=Difference(mean=0.1, low=0.05,
    high=0.15),
    date="2026-01-01", version="0",
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The reference model with a memory that acts from token 16 on."""
    folder = tmp_path_factory.mktemp("tune") / "out"
    convert_folder(reference_model(), folder, experts=16, update_interval=16, slots=8)
    return folder


@pytest.fixture
def text(tmp_path):
    words = np.random.default_rng(0).choice(
        ["the", "code", "of", "ada", "is", "river", "."], 40 * 48
    )
    (tmp_path / "text.txt").write_text(" ".join(words))
    return tmp_path / "text.txt"


def test_statistics_agree_with_a_direct_computation(out):
    """The slots by hand: with nothing merged, the bank after a block holds its M most novel
    tokens.
    """
    reader, converted = load(Subject(str(out), "ce"), "cpu"), open_converted(out)
    memory = {**converted.pace["memory"], "slots": 4, "update_interval": 4}
    ids = torch.randint(5, 1000, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    found = similarities(reader, converted, ids, memory)
    seen = {}
    hooks = [
        reader.model.model.layers[i].mlp.down_proj.register_forward_pre_hook(
            lambda module, args, i=i: seen.update({i: args[0][0].double().numpy()}), prepend=True
        )
        for i in range(4)
    ]
    with torch.no_grad():
        reader.model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    for layer, h in seen.items():
        expected, blocks = [], []
        for first in (4, 8):  # M = U: every block fills the whole bank
            keys, tokens = h[first - 4 : first], h[first : first + 4]
            expected += cosine(tokens, keys).max(1).tolist()
            parts = [
                cosine(a, b).max(1) for a, b in zip(np.split(tokens, 16, 1), np.split(keys, 16, 1))
            ]
            blocks += np.stack(parts, 1).flatten().tolist()
        np.testing.assert_allclose(found[layer][0], expected, atol=1e-5)
        np.testing.assert_allclose(found[layer][1], blocks, atol=1e-5)


def cosine(a, b):
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("documents", [1, 50])
def test_the_halves_share_nothing(out, tmp_path, documents):
    rng = np.random.default_rng(1)
    for i in range(documents):
        (tmp_path / f"{i}.txt").write_text(
            " ".join(rng.choice(["ada", "river", "is", "of"], 48 * 50 // documents))
        )
    reader = load(Subject(str(out), "ce"), "cpu")
    data = read_data(DataRequest(str(tmp_path), 16, 24, (), 1000, 0), reader)
    assert len(data.held_in) >= 20 and len(data.held_out) >= 20
    assert not {(i.unit, i.prompt, i.target) for i in data.held_in} & {
        (i.unit, i.prompt, i.target) for i in data.held_out
    }
    if documents > 1:
        assert not {item.unit for item in data.held_in} & {item.unit for item in data.held_out}
    assert all(
        len(item.prompt) == 16 and len(item.target) == 8 for item in (*data.held_in, *data.held_out)
    )
    assert read_data(DataRequest(str(tmp_path), 16, 24, (), 1000, 0), reader) == data


@dataclass(frozen=True)
class Planted:
    """Best with layer 2 alone and a fusion weight of 0.4; everything else is noise. slow: seconds a
    call.
    """

    slow: float = 0.0

    def __call__(self, memory, part):
        time.sleep(self.slow)
        value = 1.0 - abs(memory["fusion_weight"] - 0.4) - (memory["layers"] != [2]) * 0.5
        return [value + 0.01 * i for i in range(part, 20, PARTS)]


def space():
    statistics = tuple(LayerSimilarity(i, LEVELS, LEVELS, 0.5, 0.1) for i in range(4))
    return SearchSpace(MEMORY, statistics, (0, 1, 2, 3), (64, 32))


def test_finds_a_planted_optimum_and_has_the_current_one_among_its_trials(tmp_path):
    trials = search(tmp_path / "log", space(), Planted(), QUIET, trials=60, seed=0, jobs=1)
    assert len(trials) == 60 and any(trial.pruned for trial in trials)
    assert trials[0].memory == MEMORY
    found = best(trials, 3)
    assert found[0].memory["layers"] == [2] and abs(found[0].memory["fusion_weight"] - 0.4) < 0.05
    assert found[0].difference >= found[1].difference and found[0].memory != found[1].memory
    assert all(trial.memory["theta_low"] <= trial.memory["theta_high"] for trial in trials)
    for trial in trials:  # what is tried is what a model takes
        MemorySettings.from_config({"experts": {"count": 16}, "memory": trial.memory})


def test_goes_on_after_a_kill_to_the_same_trials(tmp_path):
    whole = search(tmp_path / "whole", space(), Planted(), QUIET, trials=12, seed=0, jobs=1)
    context = multiprocessing.get_context("fork")
    how = {"trials": 12, "seed": 0, "jobs": 1}
    process = context.Process(
        target=search, args=(tmp_path / "log", space(), Planted(0.02), QUIET), kwargs=how
    )
    process.start()
    while not (tmp_path / "log").exists() or (tmp_path / "log").read_text().count('"scores"') < 4:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with (tmp_path / "log").open("a") as file:
        file.write('{"op_code": 4, "wor')
    repair(tmp_path / "log")
    assert search(tmp_path / "log", space(), Planted(), QUIET, trials=12, seed=0, jobs=1) == whole


def test_a_written_winner_verifies_loads_and_undoes(out, tmp_path):
    folder = shutil.copytree(out, tmp_path / "out")
    memory = {
        **open_converted(folder).pace["memory"],
        "layers": [0, 3],
        "fusion_weight": 0.5,
        "granularity": "expert",
    }
    for _ in range(2):  # after a kill it is written again
        assert write_memory(open_converted(folder), memory, TUNED)
    changed = {name for name, digest in hashes(folder).items() if hashes(out)[name] != digest}
    assert (
        changed == {"config.json", "README.md", "pace_hashes.json", ".pace-conversion.json"}
        and hashes(folder).keys() == hashes(out).keys()
    )
    assert load(Subject(str(folder)), "cpu").model.memory_settings.layers == (0, 3)
    done = pace_convert(folder, "--source", reference_model(), command=("verify",))
    assert done.returncode == 0 and done.stdout.endswith("verified\n"), done.stdout
    done = pace_convert(folder, command=("inspect",))
    assert "3 trials on book.txt" in done.stdout and "+0.1 (+0.05 to +0.15)" in done.stdout
    card = (folder / "README.md").read_text()
    assert (
        "layers 0, 3" in card
        and "| fusion_weight | 0.5 |" in card
        and "Found by `pace tune`" in card
    )
    source = open_source(str(reference_model()))
    given = {**ACTIVE, "experts": 16, "slots": 8, "update_interval": 16}
    options = ConvertOptions(memory=("fusion", "reread"), **given)
    assert is_finished(source, folder, make_plan(source, options))
    assert pace_convert(folder, tmp_path / "back", command=("undo",)).returncode == 0
    assert hashes(tmp_path / "back") == hashes(reference_model())


def test_an_edited_card_stays(out, tmp_path):
    folder = shutil.copytree(out, tmp_path / "out")
    (folder / "README.md").write_text("mine")
    assert not write_memory(open_converted(folder), open_converted(folder).pace["memory"], TUNED)
    assert (folder / "README.md").read_text() == "mine"


def test_a_damaged_record_is_refused(out, tmp_path):
    folder = shutil.copytree(out, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["pace"]["tuned"] = {"data": 1}
    (folder / "config.json").write_text(json.dumps(config))
    refuse(pace_convert(folder, command=("inspect",)), 1, "config.json: pace")


def test_where_the_base_wins_nothing_is_written(out, tmp_path, text):
    """Words in random order: there is nothing to remember. The same command again changes nothing
    either.
    """
    before = hashes(out)
    arguments = [
        out,
        "--on",
        text,
        "--length",
        "48",
        "--trials",
        "3",
        "--items",
        "40",
        "--out",
        tmp_path / "tune",
        "--json",
    ]
    done = pace_convert(*arguments, command=("tune",))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["data"]["held_in"] == facts["data"]["held_out"] == 20 and len(facts["trials"]) == 3
    assert (facts["winner"] is None) == (not facts["written"])
    if facts["winner"] is None:
        assert hashes(out) == before
    again = pace_convert(*arguments, command=("tune",))
    assert json.loads(again.stdout) == facts
    assert (tmp_path / "tune" / "similarity.png").stat().st_size > 5000
    refuse(
        pace_convert(*arguments, "--seed", "1", command=("tune",)),
        2,
        "holds another search: --seed was 0 and is 1",
        "--out",
    )


def test_begins_with_what_a_folder_from_before_a_parameter_does(out, tmp_path, text):
    folder = shutil.copytree(out, tmp_path / "before")
    config = json.loads((folder / "config.json").read_text())
    del config["pace"]["memory"]["match_norm"], config["pace"]["memory"]["outlier_norm"]
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["--on", text, "--length", "48", "--trials", "1", "--items", "40", "--dry-run"]
    done = pace_convert(folder, *arguments, "--out", tmp_path / "tune", "--json", command=("tune",))
    assert done.returncode == 0, done.stderr
    memory = {**config["pace"]["memory"], "match_norm": False, "outlier_norm": 0.0}
    facts = json.loads(done.stdout)
    assert facts["before"] == facts["trials"][0]["memory"] == memory


def test_bad_calls(out, tmp_path, text):
    def tune(*arguments):
        return pace_convert(out, *arguments, "--out", tmp_path / "tune", command=("tune",))

    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    refuse(tune("--on", tmp_path / "absent.txt"), 2, "no such file")
    refuse(tune("--on", tmp_path / "latin.txt"), 2, "not UTF-8")
    refuse(tune("--on", tmp_path / "q.jsonl"), 2, "line 2", "answer")
    refuse(tune("--on", text, "--length", "16"), 2, "never act", "--update-interval")
    refuse(tune("--on", text, "--length", "1000"), 2, "at least 40", "--length")
    (tmp_path / "short.jsonl").write_text('{"prompt": "ada", "answer": " river"}\n')
    refuse(tune("--on", tmp_path / "short.jsonl"), 2, "never acts", "--update-interval")
