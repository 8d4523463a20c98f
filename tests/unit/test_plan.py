"""Resolution of options that depend on the model."""

import pytest

from pace_convert.conversion.plan import resolve_layers
from pace_convert.errors import CallError
from pace_convert.options import PRESETS, ConvertOptions, load_options


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(28, (12, 26)), (32, (14, 30)), (6, (2, 4)), (4, (1, 2)), (2, (0,)), (1, (0,))],
)
def test_auto_layers_keep_qwen2s_relative_depths(layers, expected):
    assert resolve_layers("auto", layers) == expected


def test_layers_as_the_command_line_gives_them():
    assert ConvertOptions(memory_layers="3, 1,3").memory_layers == (1, 3)
    assert ConvertOptions(memory_layers="none").memory_layers == "none"
    assert resolve_layers("none", 4) == ()


def test_yaml_is_overridden_by_the_command_line(tmp_path):
    (tmp_path / "o.yaml").write_text(
        "slots: 7\nmemory_layers: [0, 2]\nmomentum: 0.25\njobs: 2\ndevice: cpu\n"
    )
    options, run = load_options(tmp_path / "o.yaml", {"slots": 9, "jobs": 3})
    assert (options.slots, options.momentum, options.memory_layers) == (9, 0.25, (0, 2))
    assert (run.jobs, run.device) == (3, "cpu")


def test_a_preset_sets_the_memory_and_what_is_given_goes_first(tmp_path):
    paper = {"enabled": True, "layers": [1], **PRESETS["paper"], "window": None}
    assert (
        ConvertOptions(preset="paper").memory_config((1,))
        == paper
        != ConvertOptions().memory_config((1,))
    )
    assert ConvertOptions(preset="default") == ConvertOptions()
    (tmp_path / "o.yaml").write_text("preset: paper\nslots: 7\nfusion_weight: 0.3\n")
    options, _ = load_options(tmp_path / "o.yaml", {"slots": 9, "match_norm": True})
    assert options.memory_config((1,)) == {
        **paper,
        "slots": 9,
        "fusion_weight": 0.3,
        "match_norm": True,
    }
    options, _ = load_options(tmp_path / "o.yaml", {"preset": "default"})
    assert options.memory_config((1,)) == {
        **ConvertOptions().memory_config((1,)),
        "slots": 7,
        "fusion_weight": 0.3,
    }
    with pytest.raises(CallError, match="--preset is for the memory, which --no-memory leaves out"):
        load_options(None, {"preset": "paper", "no_memory": True})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: papers", "--preset"),
        ("preset: [paper]", "--preset"),
        ("match_norm: 1", "--match-norm"),
        ("outlier_norm: -1", "--outlier-norm"),
        ("slotz: 7", "--slotz"),
        ("slots: zero", "--slots"),
        ("- 1", "not a mapping"),
        ("a: [", "can't read"),
        ("theta_low: 0.9", "above"),
        ("exact_restarts: 3", "--exact-restarts goes with --cluster-method exact"),
        ("ray_address: auto", "--ray-address goes with --executor ray"),
        ("device: tpu", "--device"),
        ("jobs: 0", "--jobs"),
    ],
)
def test_wrong_yaml_is_named(tmp_path, text, message):
    (tmp_path / "o.yaml").write_text(text)
    with pytest.raises(CallError, match=message):
        load_options(tmp_path / "o.yaml", {})
