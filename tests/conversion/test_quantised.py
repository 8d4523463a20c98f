"""Quantised sources: without experts as they are, with `--dequantise` as plain ones."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from helpers import SMALL, hashes, pace_convert, random_ids, refuse, run_alone
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
    TorchAoConfig,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import fbgemm_fp8
from transformers.quantizers import AutoHfQuantizer

import pace_convert as pace
from pace_convert.errors import CallError, DamagedSourceError

SHAPE = {**SMALL, "hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4,
         "initializer_range": 0.1}  # fmt: skip
MIXTURES = {"memory": "reread,recall", "window": 16, "spans": 1, "span_width": 4,
            "first_tokens": 2, "recall_theta_low": 0.1}  # fmt: skip
MEMORY = {**MIXTURES, "memory": "fusion,reread,recall", "update_interval": 5, "theta_low": 0.1,
          "theta_high": 0.3, "fusion_weight": 0.5}  # fmt: skip
GROUP = 32  # weights that share a scale, of GPTQ and AWQ
BLOCK = 48  # does not divide 128, as some models' blocks do not divide their sizes


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "plain"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def fp8(plain, folder, method, block=64):
    """A folder as transformers' fine-grained FP8 and FBGEMM's have them."""
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "proj" not in name:
            tensors[name] = weight
            continue
        if method == "fp8":
            rows, columns = weight.shape
            down, across = -(-rows // block), -(-columns // block)
            scale = torch.rand(down, across) * 1e-2 + 1e-3
            spread = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)
            tensors[name + "_scale_inv"], spread = scale, spread[:, :columns]
        else:
            spread = weight.float().abs().amax(1, keepdim=True) / 448
            tensors[name + "_scale"] = spread
        tensors[name] = (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    stated = {"quant_method": method, "modules_to_not_convert": ["lm_head"]}
    if method == "fp8":
        stated |= {"weight_block_size": [block, block], "activation_scheme": "dynamic"}
    config["quantization_config"] = stated
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def torchao(plain, folder):
    from torchao.quantization import Int8WeightOnlyConfig

    stated = TorchAoConfig(Int8WeightOnlyConfig())
    return save_quantised(plain, folder, stated)


def bnb_8bit(plain, folder):
    pytest.importorskip("bitsandbytes")
    return save_quantised(plain, folder, BitsAndBytesConfig(load_in_8bit=True))


def bnb_4bit(plain, folder):
    pytest.importorskip("bitsandbytes")
    return save_quantised(plain, folder, BitsAndBytesConfig(load_in_4bit=True))


def save_quantised(plain, folder, stated):
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=stated, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    return folder


def compressed(plain, folder, scheme="W4A16"):
    """By the library's own functions, scales by the least and the greatest weight of each group."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = LlamaForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    stated = QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    apply_quantization_config(model, stated)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            size = module.quantization_scheme.weights.group_size or module.weight.shape[1]
            grouped = module.weight.unflatten(1, (-1, size))
            found = calculate_qparams(
                grouped.amin(-1), grouped.amax(-1), module.quantization_scheme.weights
            )
            for name, value in zip(("weight_scale", "weight_zero_point"), found):
                if hasattr(module, name):
                    there = getattr(module, name).data
                    there.copy_(value.reshape(there.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder.mkdir(parents=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(plain / "config.json", folder)
    compressor.update_config(str(folder))
    return folder


def packed(plain, folder, method):
    """As GPTQ's and AWQ's libraries have it: eight weights of four bits in a number, drawn at
    random, as any numbers are weights; scales and zero points of groups.
    """
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        rows, columns = tensors.pop(name).shape
        path, groups = name.removesuffix("weight"), columns // GROUP
        shape = (columns // 8, rows) if method == "gptq" else (columns, rows // 8)
        tensors[path + "qweight"] = torch.randint(-(2**31), 2**31, shape).to(torch.int32)
        tensors[path + "qzeros"] = torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32)
        tensors[path + "scales"] = (torch.rand(groups, rows) * 2e-2 + 1e-3).half()
        if method == "gptq":
            tensors[path + "g_idx"] = torch.arange(columns, dtype=torch.int32) // GROUP
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    stated = {"sym": True, "desc_act": False} if method == "gptq" else {"zero_point": True}
    config["quantization_config"] = {
        "quant_method": method,
        "bits": 4,
        "group_size": GROUP,
    } | stated
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    return folder


def mxfp4(folder):
    """As OpenAI ships gpt-oss: experts' weights of four bits, 32 of which share an exponent."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_local_experts": 3}
    config = GptOssConfig(**{**SMALL, **sizes, "num_experts_per_tok": 2, "sliding_window": 16})
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = (experts, rows, columns // 32, 16)
        tensors[name + "_blocks"] = torch.randint(0, 256, blocks).to(torch.uint8)
        tensors[name + "_scales"] = torch.randint(118, 124, blocks[:3]).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    left = ["self_attn", "mlp.router", "embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gptqmodel(plain, folder, method):
    pytest.importorskip("gptqmodel", exc_type=ImportError)
    return packed(plain, folder, method)


ALONE = """
import json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
made = model.generate(torch.arange(2, 11)[None], max_new_tokens=5, do_sample=False)
print(json.dumps({"pace_convert": "pace_convert" in sys.modules, "class": type(model).__name__,
                  "tokens": made.shape[1]}))
"""

KINDS = {
    "fp8": lambda plain, folder: fp8(plain, folder, "fp8"),
    "torchao": torchao,
    "bitsandbytes, 8 bit": bnb_8bit,
    "bitsandbytes, 4 bit": bnb_4bit,
    "compressed-tensors": compressed,
    "mxfp4": lambda plain, folder: mxfp4(folder),
    "gptq": lambda plain, folder: gptqmodel(plain, folder, "gptq"),
    "awq": lambda plain, folder: gptqmodel(plain, folder, "awq"),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")  # optimum's look
@pytest.mark.parametrize("kind", KINDS)
def test_without_experts_it_runs_as_it_is(kind, plain, tmp_path):
    source = KINDS[kind](plain, tmp_path / "source")
    out, ids = tmp_path / "out", random_ids(1, 60)
    refuse(pace_convert(source, tmp_path / "x"), 2, "--no-experts", out=tmp_path / "x")
    memory = MIXTURES if kind == "mxfp4" else MEMORY
    pace.convert(source, out, pace.ConvertOptions(no_experts=True, **memory))
    stated = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert stated[0]["quantization_config"] == stated[1]["quantization_config"]
    weights = "model.safetensors"
    assert hashes(source)[weights] == hashes(out)[weights]
    base = AutoModelForCausalLM.from_pretrained(source).eval()
    ours = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    with torch.no_grad():
        with ours.memory_disabled():
            assert torch.equal(ours(ids).logits, base(ids).logits)
            off = ours.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(off, base.generate(ids, max_new_tokens=5, do_sample=False))
        assert not torch.equal(ours(ids).logits, base(ids).logits)
        assert ours.generate(ids, max_new_tokens=5, do_sample=False).shape == off.shape
    whole, compared = pace.verify(out), pace.verify(out, source)
    assert whole.passed and whole.loaded and compared.passed and compared.logit_difference == 0
    assert pace.undo(out, tmp_path / "back").proved
    assert hashes(tmp_path / "back") == hashes(source)


def test_a_quantised_copy_loads_where_the_package_is_not(plain, tmp_path):
    source = torchao(plain, tmp_path / "source")
    pace.convert(source, tmp_path / "out", pace.ConvertOptions(no_experts=True))
    made = run_alone(ALONE, tmp_path / "out", modules=tmp_path / "modules")
    assert made == {"pace_convert": False, "class": "PaceLlamaForCausalLM", "tokens": 14}


def test_what_no_cpu_runs_has_the_names_and_shapes_of_its_quantiser(plain, tmp_path, monkeypatch):
    """FBGEMM's layers need a GPU: the module is made without memory, and the tensors fit it."""
    source, out = fp8(plain, tmp_path / "source", "fbgemm_fp8"), tmp_path / "out"
    pace.convert(source, out, pace.ConvertOptions(no_experts=True))
    whole = pace.verify(out)
    assert whole.passed and not whole.loaded and "requires a GPU" in whole.not_loaded
    with pytest.raises(CallError, match="requires a GPU"):
        pace.verify(out, source)
    assert pace.verify(out, source, logits=False).passed
    cls = get_class_from_dynamic_module("modeling_pace.PaceLlamaForCausalLM", out)
    config = cls.config_class.from_pretrained(out)
    quantiser = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    with torch.device("meta"):
        model = cls(config)
    # Its kernel, which is looked up when a layer is made.
    monkeypatch.setattr(fbgemm_fp8, "get_quantize_fp8_per_row", lambda: None)
    quantiser.preprocess_model(model)
    made = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stored = {name: tuple(v.shape) for name, v in load_file(out / "model.safetensors").items()}
    assert stored == {name: shape for name, shape in made.items() if name in stored}
    assert set(made) - set(stored) <= {name for name in made if name.endswith("input_scale_ub")}


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of BitNet's layers
@pytest.mark.parametrize("method", ["bitnet", "mxfp8", "metal", "gemma", "aqlm"])
def test_quantisers_make_of_it_what_they_make_of_the_source(method, plain, tmp_path):
    """On the meta device: layers of the same names, shapes and types, whatever the class's name."""
    if method == "aqlm":
        pytest.importorskip("aqlm")
    pace.convert(plain, tmp_path / "out", pace.ConvertOptions(no_experts=True))
    cls = get_class_from_dynamic_module("modeling_pace.PaceLlamaForCausalLM", tmp_path / "out")
    made = []
    for kind, folder in ((LlamaForCausalLM, plain), (cls, tmp_path / "out")):
        stated = {"quant_method": method, "modules_to_not_convert": ["lm_head"]}
        quantiser = AutoHfQuantizer.from_config(stated, pre_quantized=True)
        with torch.device("meta"):
            model = kind(kind.config_class.from_pretrained(folder))
        quantiser.preprocess_model(model, device_map={"": "cpu"})
        assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
        tensors = model.state_dict().items()
        made.append({name: (tuple(value.shape), value.dtype) for name, value in tensors})
    assert made[0] == made[1]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_weights_go_along_where_their_library_is_not(method, plain, tmp_path):
    """GPTQModel is not among the tests' packages: names, bytes and the words are what is tested."""
    if find_spec("gptqmodel"):
        pytest.skip("GPTQModel is here")
    source, out = packed(plain, tmp_path / "source", method), tmp_path / "out"
    refuse(pace_convert(source, tmp_path / "x", "--dequantise"), 2, f"the source is {method}")
    pace.convert(source, out, pace.ConvertOptions(no_experts=True))
    assert pace.verify(out, source, logits=False).passed
    whole = pace.verify(out)
    assert whole.passed and not whole.loaded
    assert "optimum" in whole.not_loaded.lower() or "gptq" in whole.not_loaded.lower()
    pace.undo(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


def test_dequantised_equals_the_load_of_transformers(plain, tmp_path):
    source, out = fp8(plain, tmp_path / "source", "fp8"), tmp_path / "out"
    pace.convert(source, out, pace.ConvertOptions(experts=8), dequantise=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    pace.undo(out, tmp_path / "back")
    ours = load_file(tmp_path / "back" / "model.safetensors")
    expected = theirs.state_dict()
    assert set(ours) == set(expected)
    assert all(torch.equal(expected[name], value) for name, value in ours.items())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert pace.verify(out, source, dequantise=True).passed
    with pytest.raises(CallError, match="is quantised, the conversion is not"):
        pace.verify(out, source)


def test_dequantised_mixture_equals_the_load_of_transformers(tmp_path):
    source, out = mxfp4(tmp_path / "source"), tmp_path / "out"
    pace.convert(source, out, pace.ConvertOptions(experts=8), dequantise=True)
    stated = Mxfp4Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=stated).state_dict()
    pace.undo(out, tmp_path / "back")
    ours = load_file(tmp_path / "back" / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    assert pace.verify(out, source, dequantise=True).passed
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedSourceError, match="down_proj_blocks is U8"):
        pace.convert(source, tmp_path / "x", dequantise=True)


@pytest.mark.parametrize(("method", "block"), [("fp8", BLOCK), ("fbgemm_fp8", None)])
def test_dequantised_blocks_at_the_edge_and_rows(method, block, plain, tmp_path):
    source = fp8(plain, tmp_path / "source", method, block or 64)
    out = tmp_path / "out"
    pace.convert(source, out, pace.ConvertOptions(no_experts=True), dequantise=True)
    packed = load_file(source / "model.safetensors")
    for name, value in load_file(out / "model.safetensors").items():
        weight = packed[name]
        if weight.dtype == torch.float8_e4m3fn:
            rows, columns = weight.shape
            scale = packed[name + ("_scale_inv" if block else "_scale")]
            down, across = (block, block) if block else (1, columns)
            at = [[scale[i // down, j // across] for j in range(columns)] for i in (0, rows - 1)]
            weight = weight[[0, -1]].float() * torch.tensor(at)
            value = value[[0, -1]]
        assert torch.equal(value, weight.to(torch.bfloat16))


def test_what_cannot_be_dequantised_is_refused(plain, tmp_path):
    source = torchao(plain, tmp_path / "torchao")
    refuse(
        pace_convert(source, tmp_path / "x", "--dequantise"),
        2,
        "--dequantise is for fp8, fbgemm_fp8, mxfp4",
    )
    refuse(pace_convert(plain, tmp_path / "x", "--dequantise"), 2, "the source is not quantised")
    lacking = fp8(plain, tmp_path / "fp8", "fp8")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedSourceError, match="up_proj"):
        pace.convert(lacking, tmp_path / "x", dequantise=True)
    assert not (tmp_path / "x").exists()


def test_scales_that_transformers_finds_by_model_type_are_refused(make_source, tmp_path):
    source = make_source("bloom")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CallError, match="AWQ scales the activations of a bloom"):
        pace.convert(source, tmp_path / "x", pace.ConvertOptions(no_experts=True))
