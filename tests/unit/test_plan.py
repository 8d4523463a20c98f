"""Resolution of options that depend on the model."""

import pytest

from pace_convert.conversion.plan import resolve_layers
from pace_convert.errors import CallError
from pace_convert.options import ConvertOptions, load_options


@pytest.mark.parametrize(
    ("layers", "expected"), [(28, (12, 26)), (32, (14, 30)), (6, (2, 4)), (4, (1, 2)), (2, (0,)), (1, (0,))]
)
def test_auto_layers_keep_qwen2s_relative_depths(layers, expected):
    assert resolve_layers("auto", layers) == expected


def test_layers_as_the_command_line_gives_them():
    assert ConvertOptions(memory_layers="3, 1,3").memory_layers == (1, 3)
    assert ConvertOptions(memory_layers="none").memory_layers == "none"
    assert resolve_layers("none", 4) == ()


def test_yaml_is_overridden_by_the_command_line(tmp_path):
    (tmp_path / "o.yaml").write_text("slots: 7\nmemory_layers: [0, 2]\nmomentum: 0.25\njobs: 2\ndevice: cpu\n")
    options, run = load_options(tmp_path / "o.yaml", {"slots": 9, "jobs": 3})
    assert (options.slots, options.momentum, options.memory_layers) == (9, 0.25, (0, 2))
    assert (run.jobs, run.device) == (3, "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
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
