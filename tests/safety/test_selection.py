"""What of a model folder goes with a conversion: what a model is known to have, each with all that
it refers to. What is left out is named, and a secret never leaves.
"""

import json

import pytest
from damage import edit_json
from helpers import hashes, pace_convert, refuse
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from pace_convert import verify
from pace_convert.checkpoint.checkpoint import SINGLE, open_source
from pace_convert.checkpoint.secrets import find_secret, is_secret_name
from pace_convert.converted.format import left_out_of

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


def put(source, *names: str, content: str = "{}") -> None:
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(content)


def convert(source, out, *options) -> tuple[set[str], str]:
    """Names of all files of OUT, and what was said."""
    done = pace_convert(source, out, "--experts", 4, *options)
    assert done.returncode == 0, done.stderr
    return set(hashes(out)), done.stderr


def adapter(source) -> None:
    put(source, "adapter_config.json", content='{"base_model_name_or_path": "acme/gone"}')
    put(source, "adapter_model.safetensors")


def dense(source) -> None:
    put(source, "modules.json", content=json.dumps(MODULES))
    put(source, "config_sentence_transformers.json", "sentence_bert_config.json")
    put(source, "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")


@pytest.mark.parametrize(
    ("companion", "left_out"),
    [
        (adapter, {"adapter_config.json", "adapter_model.safetensors"}),
        (
            dense,
            {
                "1_Pooling/", "2_Dense/", "modules.json", "config_sentence_transformers.json",
                "sentence_bert_config.json",
            },
        ),
        (lambda s: put(s, "onnx/config.json", "onnx/tokenizer.json", "onnx/a.onnx"), {"onnx/"}),
        (
            lambda s: put(s, "original/params.json", "original/consolidated.00.pth"),
            {"original/"},
        ),
        (
            lambda s: put(s, "params.json", "consolidated.safetensors"),
            {"params.json", "consolidated.safetensors"},
        ),
        (
            lambda s: put(s, "tf_model.h5", "tf_model.h5.index.json", "openvino_config.json",
                          "openvino_model.bin", "openvino_model.xml"),
            {
                "tf_model.h5", "tf_model.h5.index.json", "openvino_config.json",
                "openvino_model.bin", "openvino_model.xml",
            },
        ),
    ],
    ids=["adapter", "dense", "onnx", "original", "consolidated", "root"],
)  # fmt: skip
def test_half_a_companion_is_none(source, tmp_path, companion, left_out):
    companion(source)
    put(source, "docs/picture.png", "additional_chat_templates/tools.jinja")
    out = tmp_path / "out"
    files, said = convert(source, out)
    assert {"docs/picture.png", "additional_chat_templates/tools.jinja"} < files
    assert not {name for name in files if name.startswith(tuple(left_out))}
    card = (out / "README.md").read_text()
    assert set(left_out_of(out)) == left_out
    for name in left_out:
        assert name in said and f"`{name}`" in card, name
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


def test_undo_and_verify_know_what_was_left_out(source, tmp_path):
    adapter(source)
    before = hashes(source)
    out = tmp_path / "out"
    convert(source, out)
    whole = pace_convert(out, command=("verify",))
    compared = pace_convert(out, "--source", source, "--no-logits", command=("verify",))
    undone = pace_convert(out, tmp_path / "original", command=("undo",))
    for done in (whole, compared, undone):
        assert done.returncode == 0 and "adapter_model.safetensors" in done.stdout, done.stderr
    assert "Not among them" in undone.stdout
    back = hashes(tmp_path / "original")
    assert set(before) - set(back) == {"adapter_config.json", "adapter_model.safetensors"}
    assert back.items() < before.items()
    assert verify(out).left_out == ("adapter_config.json", "adapter_model.safetensors")


def test_modules_without_weights_of_their_own_are_whole(source, tmp_path):
    put(source, "modules.json", content=json.dumps(MODULES[:2]))
    put(source, "1_Pooling/config.json")
    files, said = convert(source, tmp_path / "out")
    assert {"modules.json", "1_Pooling/config.json"} < files and "left out" not in said


def test_include_takes_a_companion_whole(source, tmp_path):
    dense(source)
    out = tmp_path / "out"
    files, said = convert(source, out, "--include", "2_Dense/config.json")
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} < files
    assert "left out" not in said
    assert (
        verify(out).passed
        and pace_convert(out, tmp_path / "original", command=("undo",)).returncode == 0
    )
    assert hashes(tmp_path / "original") == hashes(source)


def test_include_of_an_adapter(source, tmp_path):
    adapter(source)
    done = pace_convert(source, tmp_path / "out", "--experts", 4, "--include", "adapter_*")
    refuse(done, 2, "adapter_config.json", "merge the adapter", out=tmp_path / "out")


def test_include_that_fits_nothing(source, tmp_path):
    done = pace_convert(source, tmp_path / "out", "--experts", 4, "--include", "*.xyz")
    refuse(done, 2, "--include *.xyz fits no file", out=tmp_path / "out")


def test_going_on_with_another_include_is_another_conversion(source, tmp_path):
    put(source, "a.xyz")
    out = tmp_path / "out"
    convert(source, out)
    done = pace_convert(source, out, "--experts", 4, "--include", "*.xyz", "--resume")
    assert done.returncode == 2 and "a.xyz" not in hashes(out)
    files, _ = convert(source, out, "--include", "*.xyz", "--overwrite")
    assert "a.xyz" in files and left_out_of(out) == ()


SECRETS = [
    ".env", ".netrc", ".ssh/id_ed25519", ".aws/credentials", "id_rsa", "key.pem",
    "credentials.json", "hf_token.txt",
]  # fmt: skip
RUBBISH = ["__pycache__/a.pyc", "sitecustomize.py", "torch.py", "notes.xyz", ".hidden/a.json"]


def test_secrets_and_rubbish_stay_behind(source, tmp_path):
    put(source, *SECRETS, *RUBBISH)
    put(source, ".git/config", ".gitattributes", ".cache/x")
    before = {*hashes(source)}
    files, said = convert(source, tmp_path / "out")
    assert not files & {*SECRETS, *RUBBISH, ".git/config", ".gitattributes"}
    for name in (".env", ".ssh/", "id_rsa", "key.pem", "credentials.json", "torch.py", "notes.xyz"):
        assert name in said, name
    assert "may be a secret" in said and ".git/" not in said
    assert before - {*SECRETS, *RUBBISH, ".git/config", ".gitattributes", ".cache/x"} < {
        *files, SINGLE
    }  # fmt: skip


def test_what_a_model_is_known_to_have_goes_along(source, tmp_path):
    known = [
        "chat_template.jinja", "tokenizer.model.v3", "merges.txt", "qwen.tiktoken", "LICENSE",
        "NOTICE.txt", "USE_POLICY.md", "GEMMA_TERMS.html", "TERMS_OF_USE.html",
        "added_tokens.json", "img/a.png", "mergekit_config.yml",
        "special_tokens_map.json", "preprocessor_config.json", "custom_generate/generate.py",
    ]  # fmt: skip
    put(source, *known)
    files, said = convert(source, tmp_path / "out")
    assert set(known) < files and "left out" not in said


def test_python_goes_along_where_an_auto_map_needs_it(source, tmp_path):
    put(source, "tokenizer_config.json", content=json.dumps(
        {"auto_map": {"AutoTokenizer": ["tokenization_x.Slow", None]}}))  # fmt: skip
    put(source, "tokenization_x.py", content="from .words import list_of\nfrom . import more\n")
    put(source, "words.py", "more.py", "other.py", content="import os\n")
    opened = open_source(str(source))
    assert {"tokenization_x.py", "words.py", "more.py"} < set(opened.side_files)
    assert "other.py" in opened.left_out


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("special_tokens_map.json", False), ("tokenizer.json", False), ("tokens.json", False),
        ("added_tokens.json", False), ("monkey.txt", False), ("README.md", False),
        ("a/.env.local", True), ("Credentials.JSON", True), ("my_secret.txt", True),
    ],
)  # fmt: skip
def test_names_of_secrets(name, secret):
    assert is_secret_name(name) == secret


@pytest.mark.parametrize(
    "content",
    [
        "-----BEGIN OPENSSH PRIVATE KEY-----\nabc", "token: hf_" + "a1B2" * 9,
        "ghp_" + "a" * 36, "aws = AKIA" + "A1B2" * 4, "key=AIza" + "x" * 35,
    ],
)  # fmt: skip
def test_contents_of_secrets(tmp_path, content):
    (tmp_path / "notes.txt").write_text("a\n" + content + "\n")
    assert "notes.txt holds what looks like" in find_secret(tmp_path, ["notes.txt"])


def test_the_models_own_files_are_no_secrets(qwen2_pair):
    names = [name for name in hashes(qwen2_pair[1]) if not name.endswith(".safetensors")]
    assert find_secret(qwen2_pair[1], names) is None
    assert load_file(qwen2_pair[1] / SINGLE)


def test_a_modules_file_that_is_none(source, tmp_path):
    put(source, "modules.json", content="[" * 10_000)
    done = pace_convert(source, tmp_path / "out", "--experts", 4)
    refuse(done, 1, "modules.json is not valid JSON", out=tmp_path / "out")
    edit_json(source / "config.json", lambda config: config)
