"""Sources damaged at random: each ends in a conversion that verifies and can be undone, or in a
clean error.

And so are conversions.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from damage import INDEX, SINGLE, SIZES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pace_convert.checkpoint.checkpoint import Source, open_source
from pace_convert.conversion.convert import carry_out, prepare
from pace_convert.conversion.undo import undo
from pace_convert.converted.integrity import check_integrity
from pace_convert.converted.opened import open_converted
from pace_convert.converted.verify import verify
from pace_convert.errors import MAX_LINE, CallError, PaceError
from pace_convert.families import FAMILIES
from pace_convert.inspect.facts import facts_of
from pace_convert.options import ConvertOptions, RunOptions
from pace_convert.progress import Progress
from pace_convert.reference.tokenizer import build_tokenizer

QUIET, OPTIONS, HERE = (
    Progress(quiet=True),
    ConvertOptions(experts=4),
    RunOptions(device="cpu", jobs=1),
)
SECONDS = 60  # of one case; most take a twentieth of a second

Files = dict[str, bytes]
NASTY = [
    0, -1, 1, 2, 3, 4, 7, 16, 24, 48, 10**9, -(10**9), 10**30, 0.5, -0.0, 1e308, True, False, None,
    "", "x", "2", "../x", "/etc/passwd", "\x1b[2J", "a\nb", "\ud800", "a" * 3000, [], {}, [1], [[]],
    {"a": 1}, [None, "x"], ["Qwen2ForCausalLM"], {"quant_method": "gptq"},
]  # fmt: skip
LITERALS = [
    "NaN",
    "-Infinity",
    "1e999",
    "1" * 5000,
    "[" * 5000,
    '{"a": 1, "a": 2}',
    "01",
    "'x'",
    "tru",
    '"\\ud800"',
    "\x00",
]
KEYS = sorted(
    {
        key
        for spec in FAMILIES.values()
        for key in (*spec.layer_keys, *spec.size_keys, *spec.width_keys)
    }
    | {
        "model_type",
        "architectures",
        "auto_map",
        "quantization_config",
        "text_config",
        "pace",
        "num_experts",
        "layer_types",
    }
    | {
        "is_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "__metadata__",
        "weight_map",
        "metadata",
    }
)
NAMES = [
    "README.md", "readme.md", "LICENSE", "notes/a.txt", "README.md/x", "config.source.json",
    "memory_bank.py", "journal.jsonl", "lock", "tokenizer_config.json", "tokenizer.json",
    "generation_config.json", "pytorch_model.bin", "a\nb", "\x1b[2J", "b\\c", INDEX, SINGLE,
    ".pace-unfinished/x", "pace_permutation.safetensors", "other.safetensors",
    "custom_generate/generate.py", "config.json",
]  # fmt: skip
CARDS = [
    b"---\nlicense: &a [*a]\n---\n",
    b"---\n" + b"[" * 3000 + b"\n---\n",
    b"---\nlicense: \xff\n---\n",
    b"---\nlanguage: [a, {b: c}]\n---\n",
]
values = (
    st.sampled_from(NASTY)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(0, 50), max_size=3)
)


def bytes_changed(draw: Callable, data: bytes, end: int) -> bytes:
    """A few bytes among the first `end` replaced, removed, or put in."""
    at = draw(st.integers(0, end))
    return data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 3)) :]


def json_changed(draw: Callable, data: bytes) -> bytes:
    """A JSON object with one key set, removed or given as a literal that is not JSON; or other
    bytes.
    """
    value = json.loads(data)
    key = draw(st.sampled_from([*value, *KEYS]))
    kind = draw(st.sampled_from(["set", "set", "remove", "literal", "inside", "bytes"]))
    if kind == "bytes":
        return bytes_changed(draw, data, len(data))
    if kind == "inside" and isinstance(value.get(key), dict) and value[key]:
        inner = draw(st.sampled_from(sorted(value[key])))
        value[key][inner] = draw(values)
    elif kind == "remove":
        value.pop(key, None)
    else:
        value[key] = "LITERAL" if kind == "literal" else draw(values)
    literal = draw(st.sampled_from(LITERALS)) if kind == "literal" else ""
    return json.dumps(value, skipkeys=True).replace('"LITERAL"', literal).encode()


def entry_changed(draw: Callable, header: dict, name: str) -> None:
    """One tensor of a header: some changes leave a sound file with other contents."""
    entry, other = header[name], draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    kind = draw(
        st.sampled_from(
            [
                "field",
                "rename",
                "remove",
                "twin",
                "swap",
                "turn",
                "flatten",
                "integers",
                "halves",
                "offsets",
            ]
        )
    )
    if kind == "field":
        entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(values)
    elif kind == "rename":
        header[
            draw(
                st.sampled_from(
                    [name.upper(), "x" * 2000, "a\nb", "lm_head.weight", name + ".bias"]
                )
                | st.text(max_size=4)
            )
        ] = header.pop(name)
    elif kind == "remove":
        del header[name]
    elif kind == "twin":
        header[other + "x"] = entry
    elif kind == "swap":
        header[name], header[other] = header[other], header[name]
    elif kind == "turn":
        entry["shape"] = entry["shape"][::-1]
    elif kind == "flatten":
        entry["shape"] = draw(
            st.sampled_from(
                [
                    [1, *entry["shape"]],
                    [*entry["shape"], 1],
                    [0, *entry["shape"]],
                    entry["shape"][:-1],
                ]
            )
        )
    elif kind == "integers":
        entry["dtype"] = draw(st.sampled_from(["I32", "U32", "F32", "F8_E4M3", "BF16", "BOOL"]))
    elif kind == "halves":
        entry["dtype"], entry["shape"] = (
            draw(st.sampled_from(["F16", "BF16"])),
            [*entry["shape"][:-1], 2 * entry["shape"][-1]],
        )
    else:
        entry["data_offsets"] = [
            at + draw(st.sampled_from([-4, 0, 4, 2**40])) for at in entry["data_offsets"]
        ]


def shard_changed(draw: Callable, data: bytes) -> bytes:
    """Header, header's length, or data."""
    end = 8 + int.from_bytes(data[:8], "little")
    kind = draw(st.sampled_from(["entry", "entry", "entry", "bytes", "length", "cut", "data"]))
    if kind == "bytes":
        return bytes_changed(draw, data, end)
    if kind == "length":
        return draw(st.sampled_from([0, 1, 5, end, 2**31, 2**63])).to_bytes(8, "little") + data[8:]
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=2))
    if kind == "data":
        return data[:end] + bytes_changed(draw, data[end:], len(data) - end)
    header = json.loads(data[8:end])
    entry_changed(draw, header, draw(st.sampled_from(sorted(set(header) - {"__metadata__"}))))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def folder_changed(draw: Callable, files: Files, links: dict[str, str]) -> None:
    """A file put in, taken away, or made a link or a pipe."""
    name = draw(st.sampled_from([*NAMES, *files]))
    kind = draw(st.sampled_from(["add", "remove", "link", "card"]))
    if kind == "card":
        files["README.md"] = draw(st.sampled_from(CARDS))
        return
    content = files.pop(name, b"{}")
    if kind == "link":
        links[name] = draw(
            st.sampled_from(
                [
                    "/etc/passwd",
                    "/dev/zero",
                    name.split("/")[-1],
                    "gone",
                    "config.json",
                    "..",
                    ".",
                    "PIPE",
                ]
            )
        )
    elif kind == "add":
        files[name] = bytes_changed(draw, content, len(content))


@st.composite
def damaged(draw: Callable, bases: list[Files]) -> tuple[Files, dict[str, str]]:
    """Files by name, and links."""
    files, links = dict(draw(st.sampled_from(bases))), {}
    for _ in range(draw(st.integers(1, 3))):
        kinds = {
            "folder": lambda: folder_changed(draw, files, links),
            "shard": lambda: change(draw, files, ".safetensors", shard_changed),
            "json": lambda: change(draw, files, ".json", json_or_bytes),
        }
        kinds[draw(st.sampled_from(["shard", "json", "json", "folder"]))]()
    return files, links


def json_or_bytes(draw: Callable, data: bytes) -> bytes:
    try:
        return json_changed(draw, data)
    except (ValueError, AttributeError, TypeError, RecursionError):  # damaged before
        return bytes_changed(draw, data, len(data))


def change(
    draw: Callable, files: Files, ending: str, how: Callable[[Callable, bytes], bytes]
) -> None:
    names = sorted(name for name in files if name.endswith(ending))
    # Most of what can go wrong goes wrong there.
    names += [name for name in ("config.json", INDEX) if name in names] * 2
    if names:
        name = draw(st.sampled_from(names))
        try:
            files[name] = how(draw, files[name])
        except (
            ValueError,
            AttributeError,
            TypeError,
            KeyError,
            OverflowError,
        ):  # damaged before, past reading
            files[name] = bytes_changed(draw, files[name], len(files[name]))


@pytest.fixture(scope="module")
def bases(make_source) -> list[Files]:
    gpt2 = {"n_layer": 2, "n_embd": 16, "n_inner": 24, "vocab_size": 40, "n_positions": 16}
    opt = {
        **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    }
    folders = [
        make_source("qwen2", **SIZES),
        make_source("qwen2", shards=True, shard_size="8KB", **SIZES),
        make_source("phi3", shards=True, shard_size="8KB", **SIZES),
        make_source("gpt2", **gpt2),
        make_source("opt", **opt),
    ]
    build_tokenizer(512).save_pretrained(folders[0])
    return [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]


def put(folder: Path, files: Files, links: dict[str, str]) -> None:
    for name, target in links.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path) if target == "PIPE" else path.symlink_to(target)
    for name, data in files.items():
        path = folder / name
        if (
            not any(part.is_symlink() or part.is_file() for part in (path, *path.parents))
            and not path.exists()
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


@contextmanager
def in_time() -> Iterator[None]:
    """What hangs is a failure."""

    def stop(*_: object) -> None:
        raise AssertionError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_clean(error: PaceError) -> bool:
    return (
        error.message.isprintable() and error.hint.isprintable() and len(error.message) <= MAX_LINE
    )


def try_source(files: Files, links: dict[str, str]) -> bool:
    """Whether it was converted."""
    with tempfile.TemporaryDirectory() as folder, in_time():
        source, out, original = (Path(folder) / name for name in ("source", "out", "original"))
        source.mkdir()
        put(source, files, links)
        try:
            opened = open_source(str(source))
            carry_out(prepare(opened, out, OPTIONS, HERE), QUIET)
        except PaceError as error:
            assert is_clean(error) and not out.exists()
            return False
        converted = open_converted(out)
        assert check_integrity(converted).problems == ()
        assert verify(converted, open_source(str(source)), QUIET, logits=False).passed
        for name in undo(converted, original, QUIET, jobs=1).files:
            assert (original / name).read_bytes() == (source / name).read_bytes(), name
        return True


def try_converted(source: Source, files: Files, links: dict[str, str]) -> bool:
    """Whether it could still be undone. A folder outside stays as it is."""
    with tempfile.TemporaryDirectory() as folder, in_time():
        out, original = Path(folder) / "a" / "out", Path(folder) / "a" / "original"
        out.mkdir(parents=True)
        put(out, files, links)
        try:
            converted = open_converted(out)
            facts_of(converted)
            with suppress(CallError):  # of another family
                verify(converted, source, QUIET, logits=False)
            problems = check_integrity(converted).problems
            assert all(len(problem) < 10_000 for problem in problems)
            undo(converted, original, QUIET, jobs=1)
        except PaceError as error:
            assert is_clean(error) and not original.exists()
            return False
        finally:
            assert [path.name for path in Path(folder).iterdir()] == ["a"]
        return True


def fuzz(bases: list[Files], cases: int, try_one: Callable[[Files, dict[str, str]], bool]) -> None:
    outcomes = []

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=cases <= 200,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(damaged(bases))
    def run(case: tuple[Files, dict[str, str]]) -> None:
        outcomes.append(try_one(*case))

    run()
    good = sum(outcomes)
    print(f"{len(outcomes)} cases: {good} taken, {len(outcomes) - good} refused")
    assert len(outcomes) / 20 < good < len(outcomes)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_sources_damaged_at_random(bases, cases):
    fuzz(bases, cases, try_source)


@pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_conversions_damaged_at_random(bases, cases, tmp_path):
    converted = []
    for number, files in enumerate(bases):
        source, out = tmp_path / f"{number}", tmp_path / f"out{number}"
        source.mkdir()
        put(source, files, {})
        opened = open_source(str(source))
        options = OPTIONS.model_copy(update={"no_memory": bool(number % 2)})
        carry_out(prepare(opened, out, options, HERE), QUIET)
        converted.append({str(path.relative_to(out)): path.read_bytes() for path in out.iterdir()})
    fuzz(converted, cases, partial(try_converted, open_source(str(tmp_path / "0"))))
