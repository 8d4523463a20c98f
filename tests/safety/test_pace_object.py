"""What config.json's `pace` may say is one thing: what can't be is refused in a sentence by every
command, and what they take loads.
"""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from damage import edit_json
from helpers import convert_folder, pace_convert, refuse

from pace_convert.converted.format import PERMUTATION
from pace_convert.converted.load import load_model
from pace_convert.converted.opened import open_converted
from pace_convert.errors import PaceError
from pace_convert.inspect.report import inspect
from pace_convert.modeling.memory_layer import LayerMemory, needed_bytes
from pace_convert.modeling.memory_settings import MemorySettings
from pace_convert.progress import Progress

VALUES = [
    10**12, 10**9, 65536, 7, 2, 1, 0, -1, 1e29, 0.5, -0.5, "NaN", "", "a", None, True, [], [10**9],
    [-1], ["a"], [0, 0], {}, "ABSENT",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(pristine, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    convert_folder(pristine[False], out, experts=4)
    return out


@pytest.fixture
def out(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def places(whole: Path) -> list[tuple[str, ...]]:
    pace = json.loads((whole / "config.json").read_text())["pace"]
    inner = [(name, key) for name in ("memory", "experts") for key in pace[name]]
    return [*((name,) for name in pace), *inner]


def change(out: Path, place: tuple[str, ...], value: object) -> None:
    def edit(config: dict) -> None:
        at = config["pace"]
        for name in place[:-1]:
            at = at[name]
        if value == "ABSENT":
            del at[place[-1]]
        else:
            at[place[-1]] = value

    edit_json(out / "config.json", edit)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_what_is_opened_loads_and_is_shown(whole, out, tmp_path, every):
    """Every value of `pace`, replaced by what no conversion writes; or of these pairs each n-th."""
    taken = 0
    before = (out / "config.json").read_text()
    for place, value in list(product(places(whole), VALUES))[::every]:
        (out / "config.json").write_text(before)
        change(out, place, value)
        try:
            converted = open_converted(out)
        except PaceError as error:
            where = error.message
            known = ("config.json: pace", "is not a PaceLLM", PERMUTATION, "model_type")
            assert any(words in where for words in known), (place, value, where)
            continue
        taken += 1
        facts = inspect(converted, Progress(quiet=True), page=tmp_path / "page.html")
        assert facts["memory"]["slots"] <= 65536
        if place[0] == "memory":
            assert load_model(converted) is not None, (place, value)
    assert taken > 50 // every


@pytest.mark.parametrize(
    "values",
    [{"slots": 10**12}, {"top_k": 10**9}, {"layers": [10**9]}, {"slots": "many"}, {"slots": None}],
    ids=str,
)
def test_every_command_refuses_it(out, tmp_path, values):
    edit_json(out / "config.json", lambda config: config["pace"]["memory"].update(values))
    page = tmp_path / "page.html"
    for command in ("verify", "inspect", "undo", "inspect --html"):
        more = {"undo": [tmp_path / "original"], "inspect --html": ["--html", page]}
        done = pace_convert(out, *more.get(command, []), command=(command.split()[0],))
        refuse(done, 1, "config.json: pace")
    with pytest.raises(PaceError, match=r"config\.json: pace"):
        load_model(open_converted(out))


def test_the_files_of_a_checkpoint_refuse_it_themselves():
    for values in ({"slots": 10**12}, {"top_k": 10**9}, {"reuse_weight": 1e29}):
        with pytest.raises(ValueError, match=f"memory: {next(iter(values))} is"):
            MemorySettings.from_config({"memory": values})
    with pytest.raises(ValueError, match="no such layer"):
        MemorySettings(layers=(10**4,)).check_model(28, 18944)


def test_memory_is_counted_before_it_is_allocated():
    settings = MemorySettings(layers=(0, 1), slots=65536)
    with pytest.raises(ValueError, match=r"memory: 65536 slots .* need [\d.]+ GB in 2 layers"):
        LayerMemory(64, settings, torch.empty(1, 1 << 20))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("experts", [1, 4])
def test_the_count_is_what_is_allocated(rows, experts):
    settings = MemorySettings(layers=(0,), slots=50, update_interval=32, experts=experts)
    memory = LayerMemory(rows, settings, torch.empty(1, 64))
    state = memory.state

    def nbytes(part) -> int:
        if isinstance(part, torch.Tensor):
            return part.nbytes
        return sum(nbytes(getattr(part, name)) for name in part.__dataclass_fields__)

    # The bank before its latest block is the same one at first.
    made = 2 * nbytes(state.bank) + nbytes(state.draft) + memory.ring.nbytes
    assert needed_bytes(rows, settings, 64, 4) == pytest.approx(made, rel=0.02)
