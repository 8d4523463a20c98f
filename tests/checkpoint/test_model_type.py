"""What transformers hangs on the name of a model's type or class is not lost with names of our own.

A PaceLLM of a mistral is a `pace_mistral` and a `PaceMistralForCausalLM`. `LOOKED_UP` lists every
place where transformers asks for such a name, and what becomes of it; a place that a new version
adds fails the test, until somebody has looked.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import convert_folder, load, pace_convert, random_ids, refuse
from more_families import MORE_CONFIGS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.checkpoint.tokenizer import load_tokenizer
from pace_convert.converted.opened import open_converted
from pace_convert.converted.verify import SAMPLE, verify
from pace_convert.families import FAMILIES
from pace_convert.progress import Progress

OTHERS = "of models that are not converted"
LOOKED_UP = {
    "backbone_utils.py": OTHERS,
    "cli/serving/model_manager.py": OTHERS,
    "cli/serving/utils.py": "how `transformers serve` reads tool calls; docs/compatibility.md",
    "configuration_utils.py": "kept: loading and saving, by the class",
    "conversion_mapping.py": "kept: test_weights_have_the_names_that_the_base_class_knows",
    "decision/modeling_utils.py": OTHERS,
    "exporters/exporter_dynamo.py": OTHERS,
    "fusion_mapping.py": "kept: registered under the class's own type",
    "generation/utils.py": OTHERS,
    "integrations/hub_kernels.py": "kept: registered under the class's own type",
    "modeling_gguf_pytorch_utils.py": "a GGUF file's own architecture",
    "modeling_utils.py": OTHERS,
    "models/auto/auto_factory.py": "kept: by auto_map",
    "models/auto/configuration_auto.py": "kept: by auto_map; test_a_mistral_that_is_a_ministral",
    "models/auto/tokenization_auto.py": "kept: the tokenizer's class is named in its config",
    "pipelines/any_to_any.py": OTHERS,
    "pipelines/automatic_speech_recognition.py": OTHERS,
    "pipelines/base.py": "a log line; docs/compatibility.md",
    "pipelines/text_generation.py": OTHERS,
    "pipelines/text_to_audio.py": OTHERS,
    "pipelines/zero_shot_image_classification.py": OTHERS,
    "quantizers/quantizer_awq.py": "loading an AWQ checkpoint; docs/compatibility.md",
    "tokenization_utils_tokenizers.py": "kept: test_a_mistrals_tokenizer_can_be_repaired",
    "trainer.py": "kept: test_smoothed_labels_are_shifted",
    "utils/attention_visualizer.py": OTHERS,
}
# A configuration's type, or a model's class, compared with names or used as a key.
ASKS = re.compile(
    r"config(_class|_dict)?(\.|\[\"|\.get\(\"|, \")model_type|config_class_to_model_type\("
    r"|_get_name\(\)|model\.__class__\.__name__( not)? in "
    r"|self\.__class__\.__name__\.(lower|starts)"
)


def test_every_look_up_is_known():
    root = Path(transformers.__file__).parent
    files = [path for path in root.rglob("*.py") if "testing" not in path.name]
    found = {
        str(path.relative_to(root))
        for path in files
        if not path.match("models/*/*.py") or path.match("models/auto/*.py")
        if ASKS.search(path.read_text(encoding="utf-8"))
    }
    assert found - set(LOOKED_UP) == set()
    assert {"trainer.py", "tokenization_utils_tokenizers.py", "conversion_mapping.py"} <= found


def test_no_family_asks_for_its_own_type():
    root = Path(transformers.__file__).parent / "models"
    for family in FAMILIES.values():
        module = getattr(transformers, family.causal_lm_class).__module__.split(".")[2]
        for path in (root / module).glob("*.py"):
            assert not re.search(r"\.model_type\b", path.read_text(encoding="utf-8")), path


def test_weights_have_the_names_that_the_base_class_knows(family_pairs):
    """By the class; what is known by the type `tests/families` loads, and compares."""
    by_type = {name for name in FAMILIES if get_checkpoint_conversion_mapping(name)}
    assert {"mixtral", "llava"} <= by_type <= set(MORE_CONFIGS)
    named = [
        family
        for family in FAMILIES.values()
        if _renaming(family.causal_lm_class) and family.model_type not in MORE_CONFIGS
    ]
    assert named
    for family in named:
        ours = type(load(family_pairs(family.model_type)[1])).__name__
        assert _renaming(ours) == _renaming(family.causal_lm_class)


def _renaming(name: str) -> list:
    mapping = get_checkpoint_conversion_mapping(name) or []
    return [(rule.source_patterns, rule.target_patterns) for rule in mapping]


def test_smoothed_labels_are_shifted(qwen2_pair, tmp_path):
    """The Trainer shifts them for the classes of causal models that it knows."""
    losses = []
    for folder in qwen2_pair:
        model = load(folder)
        if hasattr(model, "set_memory_enabled"):
            model.set_memory_enabled(False)
        arguments = TrainingArguments(
            str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[]
        )
        ids = random_ids(2, 20)
        losses.append(
            Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
        )
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-8)


def test_a_mistral_that_is_a_ministral(make_source, tmp_path):
    source = make_source("mistral")
    config = json.loads((source / "config.json").read_text())
    config["layer_types"] = ["sliding_attention", "full_attention"] * 2
    (source / "config.json").write_text(json.dumps(config))
    done = pace_convert(source, tmp_path / "out")
    refuse(done, 2, "has layer_types", "ministral", out=tmp_path / "out")


@pytest.fixture(scope="module")
def mistral(make_source, tmp_path_factory):
    """A Mistral with a tokenizer of more than 100,000 tokens, which splits texts as one that
    transformers repairs, and a conversion of it.
    """
    source = make_source("mistral")
    config = json.loads((source / "config.json").read_text())
    config["transformers_version"] = "4.44.0"
    (source / "config.json").write_text(json.dumps(config))
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "'t", "ll", "'ll"]
    names += [f"<filler {i}>" for i in range(100_001 - len(names))]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [("1", "2"), ("'", "t"), ("l", "l"), ("'", "ll")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    words = Regex(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    out = tmp_path_factory.mktemp("mistral") / "out"
    convert_folder(source, out)
    return source, out


def ids_of(folder, **options):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **options)(SAMPLE)[
        "input_ids"
    ]


def test_a_mistrals_tokenizer_can_be_repaired(mistral):
    """As the source's: with `fix_mistral_regex`, and only with it."""
    source, out = mistral
    plain, repaired = (ids_of(source, fix_mistral_regex=fix) for fix in (False, True))
    assert plain != repaired
    assert ids_of(out) == plain and ids_of(out, fix_mistral_regex=False) == plain
    assert ids_of(out, fix_mistral_regex=True) == repaired
    source, converted = open_source(str(source)), open_converted(out)
    assert verify(converted, source, Progress(quiet=True), logits=False).same_tokens


def test_a_repaired_tokenizer_is_saved_and_loads_again(mistral, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(
        mistral[1], trust_remote_code=True, fix_mistral_regex=True
    )
    tokenizer.save_pretrained(tmp_path)
    assert ids_of(tmp_path) == ids_of(mistral[0], fix_mistral_regex=True)


def test_a_source_whose_files_ask_for_the_repair(mistral, tmp_path):
    source = shutil.copytree(mistral[0], tmp_path / "source")
    settings = {"tokenizer_class": "TokenizersBackend", "fix_mistral_regex": True}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert_folder(source, tmp_path / "out")
    repaired = ids_of(mistral[0], fix_mistral_regex=True)
    assert ids_of(source) == ids_of(tmp_path / "out") == repaired
    assert load_tokenizer(tmp_path / "out")(SAMPLE)["input_ids"] == repaired  # and runs no code


def test_verify_finds_a_repair_that_is_lost(mistral, tmp_path):
    out = shutil.copytree(mistral[1], tmp_path / "out")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    del settings["auto_map"]
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    made = verify(
        open_converted(out), open_source(str(mistral[0])), Progress(quiet=True), logits=False
    )
    assert made.same_tokens is False and not made.passed
