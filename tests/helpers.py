"""What several tests share: the families' tiny shapes, and short ways to convert and to load."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import bad_inputs
import forked
import torch
import transformers

from pace_convert.checkpoint.checkpoint import Source, open_source, trained_length
from pace_convert.conversion.convert import carry_out, prepare
from pace_convert.families import FAMILIES
from pace_convert.family_spec import FamilySpec
from pace_convert.options import MEMORY_PARAMETERS, WINDOW_OPTIONS, ConvertOptions
from pace_convert.progress import Progress

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # so that layers matter and activations differ
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HEAD = {**SMALL, "head_dim": 8}
# A window that a short text leaves behind, and both kinds of layers.
WINDOW = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2}
GPT = {
    **{
        key: SMALL[key]
        for key in (
            "vocab_size",
            "initializer_range",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        )
    },
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
}
BLOOM = {
    key: value
    for key, value in SMALL.items()
    if key not in ("intermediate_size", "num_key_value_heads")
}
# A row is "model_type" or "model_type-variant". No other size may equal intermediate_size or twice
# that.
FAMILY_CONFIGS = {
    "qwen2": SMALL,
    "qwen3": HEAD,
    "llama": {**SMALL, "mlp_bias": True},
    "llama-3": {
        **SMALL,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {**SMALL, "sliding_window": None},
    "mistral-window": {**SMALL, "sliding_window": 7},
    "ministral": {**HEAD, **WINDOW},
    "gemma": HEAD,
    "gemma2": {**HEAD, **WINDOW},
    "gemma3_text": {**HEAD, **WINDOW},
    "phi3": SMALL,
    "glm": HEAD,
    "glm4": HEAD,
    "olmo": SMALL,
    "olmo2": SMALL,
    "olmo3": {**SMALL, **WINDOW},
    "gpt_neox": SMALL,
    "gpt2": GPT,
    "gpt2-inner": {**GPT, "n_inner": 72},
    "gptj": {**GPT, "rotary_dim": 4},
    "bloom": BLOOM,
    "opt": {**SMALL, "ffn_dim": 72},
    "opt-350m": {
        **SMALL,
        "ffn_dim": 72,
        "word_embed_proj_dim": 24,
        "do_layer_norm_before": False,
        "enable_bias": False,
    },
    "falcon": BLOOM,
    "falcon-new": {
        **BLOOM,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "bias": True,
        "ffn_hidden_size": 72,
    },
    "falcon-alibi": {
        **BLOOM,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "starcoder2": {**SMALL, "sliding_window": 7},
    "granite": SMALL,
    "smollm3": SMALL,
    "cohere": SMALL,
    "cohere2": {**SMALL, **WINDOW},
    "phi": SMALL,
    "stablelm": SMALL,
    "seed_oss": HEAD,
    "helium": HEAD,
    "nemotron": HEAD,
    "exaone4": {**SMALL, **WINDOW},
    "apertus": SMALL,
    "arcee": HEAD,
    "hunyuan_v1_dense": HEAD,
}


# Rows that differ in what a memory meets: where h is, norms, positions, windows, heads; mixtures
# with and without a shared FFN, images, recurrent layers.
KINDS = (
    "qwen2", "llama-3", "mistral-window", "gemma3_text", "phi3", "olmo2", "gpt_neox", "gpt2",
    "bloom", "opt-350m", "falcon-new", "starcoder2", "cohere2",
    "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "gemma3", "qwen2_5_vl", "llava",
    "qwen3_next", "recurrent_gemma", "mamba2",
)  # fmt: skip


def family_of(row: str) -> FamilySpec:
    return FAMILIES[row if row in FAMILIES else row.partition("-")[0]]


# Blocks of a few tokens and wide thresholds: a memory that reuses, mixes and keeps within a short
# text.
ACTIVE = {
    "experts": 8, "slots": 6, "update_interval": 5, "theta_low": 0.1, "theta_high": 0.3, "top_k": 2,
    "bottom_k": 1, "fusion_weight": 0.2,
}  # fmt: skip


def active_thresholds(row: str) -> dict:
    """Without a gate activations lean to one side and are more alike."""
    if row == "opt-350m":
        return {"theta_low": 0.85, "theta_high": 0.92}
    if row == "olmo2" or family_of(row).ffn.kind.startswith("plain"):
        return {"theta_low": 0.55, "theta_high": 0.75}
    return {}


def without_recall(opened: Source, options: dict) -> tuple[str, ...] | str:
    """All of the memory that a default conversion of this source has beside recall."""
    family = FAMILIES.get(opened.config.get("model_type"))
    window = ConvertOptions(**{name: options[name] for name in WINDOW_OPTIONS if name in options})
    trained = trained_length(opened.config.get("text_config", opened.config))
    has = {
        "fusion": options.get("memory_layers") != "none",
        "reread": window.window_config(1, trained) is not None,
    }
    refused = family.refused if family else {}
    return tuple(name for name, there in has.items() if there and name not in refused) or "auto"


def convert_folder(source: Path, out: Path, **options) -> None:
    """Convert with an active memory unless `options` say otherwise, and without recall, which acts
    on short texts too.
    """
    opened = open_source(str(source))
    memory = (
        {} if options.get("no_memory") else {"memory": without_recall(opened, options), **ACTIVE}
    )
    chosen = {"experts": ACTIVE["experts"], **memory, **options}
    if chosen.get("no_experts"):
        del chosen["experts"]
    if "fusion" not in chosen.get("memory", "fusion"):
        chosen = {name: value for name, value in chosen.items() if name not in MEMORY_PARAMETERS}
    carry_out(prepare(opened, out, ConvertOptions(**chosen)), Progress(quiet=True))


def load(folder: Path, dtype: torch.dtype = torch.float64, auto: str = "", **kwargs):
    """A model in float64, where no rounding can flip a threshold."""
    config = json.loads((Path(folder) / "config.json").read_text())
    family = FAMILIES.get(config["model_type"].removeprefix("pace_"))
    kind = getattr(transformers, auto or (family.auto_class if family else "AutoModelForCausalLM"))
    if family and family.mixture:  # grouped matrix products know no float64
        kwargs["experts_implementation"] = "eager"
    return kind.from_pretrained(folder, dtype=dtype, trust_remote_code=True, **kwargs).eval()


def hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, of every file below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def random_ids(rows: int, length: int, seed: int = 0, vocabulary: int = 120) -> torch.Tensor:
    return torch.randint(
        2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def pace_convert(*args, command=("convert",), cwd=None) -> subprocess.CompletedProcess:
    """The real command in a process of its own."""
    return forked.run([*command, *args], cwd)


def refuse(done, code, *words, out=None):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("rror: ") :]
    assert len(error.strip().splitlines()) <= 2, error
    for word in words:
        assert word in error, error
    bad_inputs.note(done, error)
    if out is not None:
        assert not out.exists()


# A process where importing pace_convert fails, as on a machine that does not have it.
ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('pace_convert', 'modeling'):
            raise ImportError(name + ' is not installed')
sys.meta_path.insert(0, Absent())
"""


def run_alone(code: str, *args: object, modules: Path) -> dict:
    environment = {"HF_MODULES_CACHE": str(modules), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE + code, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Takes JSON jobs {folder, ids, save_to?, auto?, dtype?}: one process, because starting one takes
# longer than all its jobs.
LOAD = """
import gc, json, torch, transformers
from transformers import AutoConfig, AutoModel, logging
logging.set_verbosity_error()
torch.set_num_threads(1)
done = []
for job in json.loads(sys.argv[1]):
    folder, ids = job["folder"], torch.tensor(job["ids"])
    print(folder, file=sys.stderr)
    dtype, auto = job.get("dtype", "float64"), job.get("auto", "AutoModelForCausalLM")
    options = {"trust_remote_code": True, "dtype": getattr(torch, dtype)}
    model = getattr(transformers, auto).from_pretrained(folder, **options).eval()
    inner = AutoModel.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
        base = model.base_model if model.base_model is not model else model.model  # of Llama 4
        same = torch.equal(base(ids).last_hidden_state, inner(ids).last_hidden_state)
    if "save_to" in job:
        model.save_pretrained(job["save_to"])
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    done.append({"sum": logits.sum().item(), "tokens": tokens.tolist(), "same": same,
        "class": type(model).__name__, "type": config.model_type, "inner": type(inner).__name__})
print(json.dumps({"pace_convert": "pace_convert" in sys.modules, "done": done}))
"""


def load_alone(jobs: list[dict], modules: Path) -> list[dict]:
    result = run_alone(LOAD, json.dumps(jobs, default=str), modules=modules)
    assert not result["pace_convert"]
    return result["done"]


def memory_of(cache):
    """The entry of the fusion memory in a cache, of whatever module its model was loaded from."""
    return next(layer for layer in cache.layers if hasattr(layer, "memories"))


def in_float64(prepared, folder):
    """A model as `prepared` makes it, in float64 where its attention can do that."""
    model = prepared(folder)
    eager = ("PaceGemma2ForCausalLM", "PaceGPTJForCausalLM", "PaceBloomForCausalLM")
    return prepared(folder, torch.float32) if type(model).__name__ in eager else model


def generated(model, prompts, new, **more):
    """Greedy answers to prompts of unlike lengths, in one batch that is padded on the left."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **more
    )
    return made[:, width:].tolist()
