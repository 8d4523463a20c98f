"""Tiny random models of the real classes, and their conversions, made once per test run."""

from __future__ import annotations

import functools
from pathlib import Path

import bad_inputs
import pytest
import torch
import transformers
from helpers import FAMILY_CONFIGS, KINDS, active_thresholds, convert_folder, family_of
from more_families import MORE_CONFIGS


def pytest_addoption(parser):
    parser.addoption(
        "--write-bad-inputs",
        action="store_true",
        help="write docs/bad_inputs.md anew from the tests that run",
    )


def pytest_configure(config):
    bad_inputs.writing = config.getoption("--write-bad-inputs")
    if bad_inputs.writing and hasattr(config, "workerinput"):
        raise pytest.UsageError("--write-bad-inputs needs all tests in one process: leave -n out")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """By default the kinds of families have all tests and the others those of `every_family`; with
    -m slow the others have all of them.
    """
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        rows = [
            given[name]
            for name in ("family_pair", "family", "standing_row", "family_row")
            if name in given
        ]
        others = [row for row in rows if row not in KINDS]
        if others and not item.get_closest_marker("every_family"):
            item.add_marker(pytest.mark.slow)


def pytest_sessionfinish(exitstatus):
    if bad_inputs.writing and exitstatus == 0:
        bad_inputs.write()


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_module_cache(tmp_path_factory):
    """Remote code is imported from here and not from the user's cache."""
    import transformers.dynamic_module_utils as dynamic

    folder = tmp_path_factory.mktemp("hf-modules")
    before, dynamic.HF_MODULES_CACHE = dynamic.HF_MODULES_CACHE, str(folder)
    yield
    dynamic.HF_MODULES_CACHE = before


@pytest.fixture(scope="session")
def make_source(tmp_path_factory):
    """make_source("qwen2", dtype=..., shards=..., **config) -> a folder in source format."""

    def make(
        family: str,
        dtype: torch.dtype = torch.float32,
        shards: bool = False,
        shard_size: str = "60KB",
        **overrides,
    ) -> Path:
        folder = tmp_path_factory.mktemp(family) / "source"
        spec = family_of(family)
        sizes = {**FAMILY_CONFIGS, **MORE_CONFIGS}[family]
        config = getattr(transformers, spec.config_class)(**{**sizes, **overrides})
        torch.manual_seed(0)
        model = getattr(transformers, spec.causal_lm_class)(config).to(dtype)
        model.save_pretrained(folder, max_shard_size=shard_size if shards else "5GB")
        return folder

    return make


@pytest.fixture(scope="session")
def family_pairs(make_source, tmp_path_factory):
    """family_pairs(row) -> (source, converted); a memory that acts within a few tokens."""

    @functools.cache
    def pair(row: str) -> tuple[Path, Path]:
        source = make_source(row)
        out = tmp_path_factory.mktemp("out") / "converted"
        convert_folder(source, out, **active_thresholds(row))
        return source, out

    return pair


@pytest.fixture(scope="session", params=list(FAMILY_CONFIGS))
def family_pair(request, family_pairs) -> tuple[Path, Path]:
    return family_pairs(request.param)


@pytest.fixture(scope="session")
def qwen2_pair(family_pairs) -> tuple[Path, Path]:
    return family_pairs("qwen2")
