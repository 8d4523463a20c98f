"""Small sources to be damaged, one copy for each test."""

import shutil
from pathlib import Path

import pytest
from damage import SIZES


@pytest.fixture(scope="session")
def pristine(make_source) -> dict[bool, Path]:
    """In one file, and in several."""
    return {
        shards: make_source("qwen2", shards=shards, shard_size="8KB", **SIZES)
        for shards in (False, True)
    }


@pytest.fixture
def source(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine[False], tmp_path / "source"))


@pytest.fixture
def sharded(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine[True], tmp_path / "source"))
