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
    paper = {"enabled": True, "layers": [1], **PRESETS["paper"], "window": None, "recall": None}
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


def test_yaml_takes_what_the_command_line_takes(tmp_path):
    """Names with hyphens or underscores, and values as they are typed there."""
    (tmp_path / "o.yaml").write_text(
        "memory-layers: 3,1\ntheta-low: 1e-3\nno-match-norm: true\ntop_k: '3'\n"
        "cluster-method: exact\nexact-restarts: '2'\n"
    )
    options, _ = load_options(tmp_path / "o.yaml", {})
    assert (options.memory_layers, options.theta_low, options.top_k) == ((1, 3), 1e-3, 3)
    assert options.match_norm is False and (options.cluster_method, options.exact_restarts) == (
        "exact",
        2,
    )
    for text, layers in [("3", (3,)), ("all", "all"), ("[4, 2]", (2, 4)), ("none", "none")]:
        (tmp_path / "o.yaml").write_text(f"memory-layers: {text}")
        assert load_options(tmp_path / "o.yaml", {})[0].memory_layers == layers


def test_a_wrong_value_is_looked_for_where_it_was_given(tmp_path):
    (tmp_path / "o.yaml").write_text("slots: 7\nmemory-layer: 3\n")
    with pytest.raises(CallError, match=r"no option memory-layer$") as error:
        load_options(tmp_path / "o.yaml", {})
    assert "did you mean memory_layers?" in error.value.hint
    (tmp_path / "o.yaml").write_text("slots: 0\n")
    assert load_options(tmp_path / "o.yaml", {"slots": 3})[0].slots == 3
    with pytest.raises(CallError, match=r"^--slots: "):
        load_options(tmp_path / "o.yaml", {"slots": -1})


def test_layers_in_words():
    assert resolve_layers(ConvertOptions(memory_layers="all").memory_layers, 3) == (0, 1, 2)
    assert resolve_layers("second", 5) == (0, 2, 4)
    assert ConvertOptions(memory_layers=3).memory_layers == (3,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: papers", "o.yaml: preset: "),
        ("preset: [paper]", "o.yaml: preset: "),
        ("match_norm: 1", "o.yaml: match_norm: "),
        ("outlier-norm: -1", "o.yaml: outlier-norm: "),
        ("slotz: 7", "o.yaml: there is no option slotz"),
        ("slots: zero", "o.yaml: slots: "),
        ("- 1", "not a mapping"),
        ("a: [", "can't read"),
        ("theta_low: 0.9", "above"),
        ("exact_restarts: 3", "--exact-restarts goes with --cluster-method exact"),
        ("ray_address: auto", "--ray-address goes with --executor ray"),
        ("device: tpu", "o.yaml: device: "),
        ("jobs: 0", "o.yaml: jobs: "),
        ("memory-layers: [1, x]", "o.yaml: memory-layers: give auto, none, all, second or 0-based"),
        ("memory_layers: -1", "o.yaml: memory_layers: give auto"),
        ("slots: 3\nslots: 4", "o.yaml: slots stands twice$"),
        ("top-k: 3\ntop_k: 4", "o.yaml: top_k stands twice, as top-k too"),
        ("no-match-norm: 3", "o.yaml: no-match-norm is 3, neither true nor false"),
        ("match_norm: true\nno-match-norm: true", "stands twice, as match_norm too"),
        ("revision: main", "o.yaml: revision is no option of the method"),
        ("push-to-hub: a/b", "o.yaml: push-to-hub is no option of the method"),
    ],
)
def test_wrong_yaml_is_named(tmp_path, text, message):
    (tmp_path / "o.yaml").write_text(text)
    with pytest.raises(CallError, match=message):
        load_options(tmp_path / "o.yaml", {})


def test_a_preset_is_no_option_that_somebody_gave():
    assert ConvertOptions(preset="paper", memory_layers="none").memory_layers == "none"
