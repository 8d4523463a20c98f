"""A GGUF file as a source gives what transformers' own dequantised load gives, bit for bit."""

import json
import os
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from helpers import ACTIVE, hashes, pace_convert, random_ids, refuse
from hub_server import Hub, Repository
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import pace_convert as pace
from pace_convert.checkpoint import unpacked
from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.errors import DamagedSourceError, Stopped

WIDTH, NEURONS, LAYERS, VOCABULARY = 64, 96, 4, 300
HEADS = {"attn_q": 4, "attn_k": 2, "attn_v": 2}
HEAD = {"qwen3": 128}  # transformers takes its default for Qwen3, whatever the file says; else 16
# Of each architecture what its files have beyond Llama's: norms and biases of a layer.
ARCHITECTURES = {
    "llama": (),
    "qwen2": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": ("attn_q_norm.weight", "attn_k_norm.weight"),
    "gemma2": ("post_attention_norm.weight", "post_ffw_norm.weight"),
    "gemma3": ("attn_q_norm.weight", "attn_k_norm.weight", "post_attention_norm.weight",
               "post_ffw_norm.weight"),
}  # fmt: skip


def size_of(name: str, head: int) -> int:
    if name.endswith(".bias"):
        return HEADS[name.removesuffix(".bias")] * head
    return head if "_q_norm" in name or "_k_norm" in name else WIDTH


def add_tokenizer(writer, architecture):
    """A byte-level BPE of single characters and one merge; for Gemma pieces with scores."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = architecture.startswith("gemma")
    single = [f"<0x{i:02X}>" for i in range(256)] if pieces else sorted(ByteLevel.alphabet())
    known = ["<bos>", "<eos>", "<unk>", "<pad>", *single, *("▁", "t", "h", "th")[-1 - 3 * pieces :]]
    names = known + [f"<extra{i}>" for i in range(VOCABULARY - len(known))]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types([3] * 4 + [6 if pieces else 1] * 256 + [1] * (VOCABULARY - 260))
    writer.add_token_merges(["t h"])
    writer.add_token_scores([-float(i) for i in range(VOCABULARY)])
    for number, kind in enumerate(("bos", "eos", "unk", "pad")):
        getattr(writer, f"add_{kind}_token_id")(number)


def write_gguf(path, architecture, quantised="Q8_0", leave_out=()):
    rng, head = np.random.default_rng(0), HEAD.get(architecture, 16)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(HEADS["attn_q"])
    writer.add_head_count_kv(HEADS["attn_k"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(VOCABULARY)
    add_tokenizer(writer, architecture)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")

    def add(name, *shape):
        if name in leave_out:
            return
        values = (rng.standard_normal(shape) * 0.3).astype(np.float32)
        kind = gguf.GGMLQuantizationType[quantised]
        if len(shape) == 1 or quantised == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, WIDTH)
    add("output_norm.weight", WIDTH)
    if architecture == "llama":
        add("output.weight", VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        for name, count in HEADS.items():
            add(f"blk.{layer}.{name}.weight", count * head, WIDTH)
        add(f"blk.{layer}.attn_output.weight", WIDTH, HEADS["attn_q"] * head)
        add(f"blk.{layer}.ffn_gate.weight", NEURONS, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", NEURONS, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, NEURONS)
        for name in ("attn_norm.weight", "ffn_norm.weight", *ARCHITECTURES[architecture]):
            add(f"blk.{layer}.{name}", size_of(name, head))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-llama.gguf", "llama")


@pytest.mark.slow
def test_a_file_of_a_hub_repository(llama, tmp_path):
    environment = {
        "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "none"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def run(url, *args):
        command = [sys.executable, "-c", "from pace_convert.cli.main import pace; pace()"]
        return subprocess.run(
            [*command, *map(str, args)], capture_output=True, text=True,
            env={**kept, **environment, "HF_ENDPOINT": url},
        )  # fmt: skip

    out = tmp_path / "out"
    with Hub({"acme/tiny-gguf": Repository(llama.parent)}) as hub:
        source = ("acme/tiny-gguf", out, "--no-experts")
        refuse(
            run(hub.url, "convert", *source, "--gguf-file", "none.gguf"), 2, "none.gguf", out=out
        )
        done = run(hub.url, "convert", *source, "--gguf-file", llama.name)
        assert done.returncode == 0, done.stderr
        assert hub.downloaded() == {llama.name}
        verified = run(
            hub.url, "verify", out, "--source", source[0], "--gguf-file", llama.name, "--json"
        )
        assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["different"] == []
    assert 'base_model: "acme/tiny-gguf"' in (out / "README.md").read_text()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_load_of_transformers(architecture, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", architecture)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    out = tmp_path / "out"
    pace.convert(path, out, pace.ConvertOptions(**ACTIVE))
    ours = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.bfloat16)
    pace.undo(out, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    expected = theirs.state_dict()
    assert set(expected) - set(plain) <= {"lm_head.weight"} and len(plain) > 9 * LAYERS
    assert all(torch.equal(expected[name], value) for name, value in plain.items())
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").to(torch.float32)
    ids, theirs = random_ids(1, 4), theirs.to(torch.float32)
    assert torch.equal(same(ids).logits, theirs(ids).logits)
    ours.set_recall(False)
    assert torch.allclose(ours.float()(ids).logits, theirs(ids).logits, rtol=1e-3, atol=1e-3)
    verified = pace.verify(out, path)
    assert verified.passed and verified.logits_match and verified.same_tokens


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0"])
def test_plain_files_keep_their_type(kind, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", kind)
    kept = {"Q4_0": "BF16"}.get(kind, kind)
    assert {info.dtype for info in open_source(str(path)).tensors.values()} == {kept}


def test_tokenizer_and_chat_template_come_along(llama, tmp_path):
    out = tmp_path / "out"
    pace.convert(llama.parent, out, pace.ConvertOptions(no_experts=True), gguf_file=llama.name)
    ours = AutoTokenizer.from_pretrained(out)
    theirs = AutoTokenizer.from_pretrained(llama.parent, gguf_file=llama.name)
    said = [{"role": "user", "content": "the thin th"}]
    assert ours.apply_chat_template(said) == theirs.apply_chat_template(said)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["PaceLlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert "tiny-llama.gguf" in (out / "README.md").read_text()


def test_several_shards_and_a_kill_while_unpacking(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked, "SHARD_BYTES", 60_000)
    options = pace.ConvertOptions(experts=8)
    pace.convert(llama, tmp_path / "whole", options)
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 3
    written = unpacked.write_whole

    def stop(path, content):
        if "00003" in path.name:
            raise KeyboardInterrupt
        written(path, content)

    monkeypatch.setattr(unpacked, "write_whole", stop)
    with pytest.raises(Stopped):
        pace.convert(llama, tmp_path / "out", options)
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(unpacked, "write_whole", written)
    pace.convert(llama, tmp_path / "out", options, resume=True)
    sealed = {".pace-conversion.json", "README.md"}
    whole, out = hashes(tmp_path / "whole"), hashes(tmp_path / "out")
    assert {n: h for n, h in whole.items() if n not in sealed} == {
        n: h for n, h in out.items() if n not in sealed
    }
    pace.undo(tmp_path / "out", tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


def test_what_cannot_be_a_source_is_refused(llama, tmp_path):
    (tmp_path / "none.gguf").write_bytes(b"GGU")
    refuse(pace_convert(tmp_path / "none.gguf", tmp_path / "x"), 1, "is not a GGUF file")
    refuse(pace_convert(llama, tmp_path / "x", "--gguf-file", "a.gguf"), 2, "is a file")
    refuse(pace_convert(tmp_path, tmp_path / "x", "--gguf-file", "a.gguf"), 2, "has no a.gguf")
    refuse(pace_convert(tmp_path, tmp_path / "x"), 2, "give --gguf-file, like none.gguf")
    cut = tmp_path / "cut.gguf"
    shutil.copy(llama, cut)
    with cut.open("r+b") as file:
        file.truncate(llama.stat().st_size // 2)
    refuse(pace_convert(cut, tmp_path / "x"), 2, "can't read cut.gguf")
    lacking = write_gguf(tmp_path / "lacking.gguf", "llama", leave_out=("blk.2.ffn_up.weight",))
    with pytest.raises(DamagedSourceError, match="lacks the tensor model"):
        open_source(str(lacking))
    other = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    other.add_context_length(512)
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    refuse(pace_convert(tmp_path / "other.gguf", tmp_path / "x"), 2, "is a mamba")
    assert not (tmp_path / "x").exists()
