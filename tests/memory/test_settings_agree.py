"""A conversion's options and a checkpoint's own files allow the same memory parameters."""

import math
import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pace_convert.modeling.memory_settings import MemorySettings
from pace_convert.options import EXPERT_OPTIONS, RECALL_OPTIONS, WINDOW_OPTIONS, ConvertOptions

PARAMETERS = sorted(
    set(ConvertOptions.model_fields)
    - {*EXPERT_OPTIONS, *WINDOW_OPTIONS, *RECALL_OPTIONS, "memory", "memory_layers", "preset"}
    - {"no_memory"}
)
KNOWN = ", ".join(["enabled", "layers", *MemorySettings.parameters()])
VALUES = st.one_of(
    st.integers(-3, 3),
    st.sampled_from(
        [
            *(10**400, -(10**400), 10**12, 65536, 65537, 1 << 20, (1 << 20) + 1, 1e29, -100.0, 101),
            *(-1.0, 0.0, 1.0, math.nextafter(1.0, 2.0), math.nextafter(-1.0, -2.0)),
        ]
    ),
    st.floats(),
    st.floats(-1.5, 1.5),
    st.booleans(),
    st.sampled_from(["token", "expert", "neuron", "1", "", None, (1,), []]),
)


def settings_accept(**values):
    try:
        MemorySettings.from_config({"memory": values, "experts": {"count": 4}})
    except ValueError:
        return False
    return True


def options_accept(**values):
    try:
        ConvertOptions(**values)
    except ValidationError:
        return False
    return True


def test_the_parameters_and_their_defaults_are_the_same():
    by_name = {field.name: field.default for field in fields(MemorySettings)}
    assert set(PARAMETERS) == set(by_name) - {"enabled", "layers", "experts"}
    assert {name: getattr(ConvertOptions(), name) for name in PARAMETERS} == {
        name: by_name[name] for name in PARAMETERS
    }


@pytest.mark.parametrize("name", PARAMETERS)
@given(value=VALUES)
@example(value=math.nan)
@example(value=math.inf)
@example(value=True)
def test_each_value_is_allowed_by_both_or_by_none(name, value):
    assert settings_accept(**{name: value}) == options_accept(**{name: value})


@given(low=st.floats(-1.1, 1.1), high=st.floats(-1.1, 1.1))
def test_thresholds_in_the_wrong_order_are_refused_by_both(low, high):
    expected = -1 <= low <= high <= 1
    values = {"theta_low": low, "theta_high": high}
    assert (settings_accept(**values), options_accept(**values)) == (expected, expected)


@given(st.lists(st.one_of(st.integers(-2, 5), st.booleans(), st.floats(0, 2)), max_size=4))
def test_layers(layers):
    expected = all(type(layer) is int and layer >= 0 for layer in layers)
    assert (settings_accept(layers=layers), options_accept(memory_layers=layers)) == (
        expected,
        expected,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slots": 0}, "memory: slots is 0, not a whole number from 1 to 65536"),
        ({"top_k": True}, "memory: top_k is True, not a whole number from 1 to 65536"),
        ({"momentum": -3}, "memory: momentum is -3, not a finite number from 0 to 1"),
        (
            {"mix_weight": math.inf},
            "memory: mix_weight is inf, not a finite number from -100 to 100",
        ),
        ({"theta_low": 0.9}, "memory: theta_low 0.9 is above theta_high 0.75"),
        ({"layers": 3}, "memory: layers is 3, not a list of 0-based layer numbers such as (3, 9)"),
        ({"enabled": "no"}, "memory: enabled is 'no', neither true nor false"),
        ({"granularity": "neuron"}, "memory: granularity is 'neuron', not token or expert"),
        (
            {"layers": "all"},
            "memory: layers is 'all', not a list of 0-based layer numbers such as (3, 9)",
        ),
        ({"slot": 4}, f"memory: unknown parameter slot; there are {KNOWN}"),
        ({"experts": 4}, f"memory: unknown parameter experts; there are {KNOWN}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_messages_name_parameter_value_and_bounds(values, message):
    with pytest.raises(ValueError) as error:
        MemorySettings.from_config({"memory": values})
    assert str(error.value) == message


def test_what_was_written_before_a_parameter_existed_means_what_it_meant():
    written = {"enabled": True, "layers": [1], "slots": 9}
    settings = MemorySettings.from_config({"memory": written})
    assert (settings.slots, settings.match_norm, settings.outlier_norm) == (9, False, 0.0)
    assert (
        MemorySettings.from_config({"memory": {**written, "match_norm": True}}).match_norm is True
    )
    assert MemorySettings.from_config({}) == MemorySettings()


def test_options_load_no_torch():
    code = "import sys, pace_convert.options; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
