"""The reference model, converted once for all evaluations."""

import pytest
from helpers import convert_folder

from pace_convert.evaluation import subjects
from pace_convert.reference import reference_model


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "ref"
    convert_folder(
        reference_model(),
        out,
        experts=16,
        slots=100,
        update_interval=64,
        theta_low=0.25,
        theta_high=0.75,
        top_k=5,
    )
    return out


@pytest.fixture(autouse=True)
def nothing_cached():
    """What was opened is known by path and test runs reuse paths."""
    yield
    for function in (subjects._open, subjects._state, subjects._load):
        function.cache_clear()
