"""The built wheel works outside the clone, in a virtual environment of its own."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    names = ["pace_convert", "modeling", "templates", "pyproject.toml", "README.md", "LICENSE"]
    tree.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True)
        else:
            shutil.copyfile(ROOT / name, tree / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(tree),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def binaries(wheel, tmp_path_factory):
    """A fresh environment with the wheel; its dependencies are this environment's, so nothing is
    downloaded.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--no-index", "-q", wheel], check=True
    )
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([python, "-c", where], folder).strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(command, folder):
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_what_travels_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "modeling/memory_bank.py",
        "templates/report.css.jinja",
        "inspect/page.py",
        "reference/model/model.safetensors",
        "cli/main.py",
    ):
        assert f"pace_convert/{name}" in names
    assert all(name.startswith(("pace_convert/", "pace_convert-")) for name in names)


def test_converts_with_the_wheel(binaries, tmp_path):
    where = (
        "import pace_convert, pace_convert.reference as r; "
        "print(pace_convert.__file__); print(r.reference_model())"
    )
    package, reference = run([binaries / "python", "-c", where], tmp_path).split()
    assert str(binaries.parent) in package and str(binaries.parent) in reference
    run([binaries / "pace-convert", reference, "out", "--experts", "16"], tmp_path)
    assert "verified" in run([binaries / "pace", "verify", "out", "--source", reference], tmp_path)
