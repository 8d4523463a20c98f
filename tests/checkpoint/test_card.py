"""The model card: metadata that the Hub accepts; true; the same each time; and nobody's edits are
lost.
"""

import shutil
from dataclasses import replace

import pytest
from helpers import convert_folder
from hub_server import metadata_errors
from huggingface_hub import ModelCard

from pace_convert.checkpoint.checkpoint import HubAddress, open_source
from pace_convert.conversion.convert import prepare
from pace_convert.conversion.new_card import inherited_metadata, model_card
from pace_convert.conversion.plan import make_plan
from pace_convert.converted.card import is_untouched, pinned_commit, published
from pace_convert.converted.verify import Verification
from pace_convert.errors import CallError
from pace_convert.options import ConvertOptions

CAUSAL = "AutoModelForCausalLM"


def card_of(out):
    text = (out / "README.md").read_text()
    return ModelCard(text).data.to_dict(), text


@pytest.fixture(scope="module")
def source(make_source):
    """With a card written by hand, terms of access, a licence file."""
    folder = make_source("qwen2")
    (folder / "README.md").write_bytes(
        b"\xef\xbb\xbf---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\n"
        b"language: [en, no]\nextra_gated_prompt: |\n  TERMS: agree\nextra_gated_fields:\n"
        b"  Name: text\n---\n# hello\nWritten by hand.\n"
    )
    (folder / "LICENSE").write_text("the licence")
    (folder / "NOTICE").write_text("the notice")
    return folder


@pytest.fixture(scope="module")
def out(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "out"
    convert_folder(source, folder)
    return folder


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (
            "---\nlicense: mit\nlanguage: [en, no]\n---\n# x",
            {"license": "mit", "language": ["en", "no"]},
        ),
        ("---\r\nlicense: apache-2.0\r\n---\r\n", {"license": "apache-2.0"}),
        (
            "---\ntitle: a --- b\nlicense: 2024-01-01\nlicense_name: a---b\n---\n",
            {"license": "2024-01-01", "license_name": "a---b"},
        ),
        ("---\nlicense: .nan\nlanguage:\n---\n", {"license": ".nan"}),
        (
            "---\nlicense: x\nextra_gated_prompt: |\n  a: b\n---\n",
            {"license": "x", "extra_gated_prompt": "a: b\n"},
        ),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("# no front matter\n---\nlicense: mit\n---\n", {}),
        ("", {}),
    ],
)
def test_inherited_metadata(card, expected):
    assert inherited_metadata(card) == expected


def test_metadata_is_valid_and_complete(out):
    metadata, text = card_of(out)
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "llama3.1",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "extra_gated_prompt": "TERMS: agree\n",
        "extra_gated_fields": {"Name": "text"},
        "tags": ["pacellm", "cortical-experts", "activation-memory"],
    }
    assert metadata_errors(text) == []


def test_says_what_was_made_how_to_use_it_and_what_it_cannot_do(out):
    text = card_of(out)[1]
    for words in (
        "takes part in 2 of 4 layers", "first 5 tokens", "layers 1, 2", 'name = "."\n',
        "(name, trust_remote_code=True)", "memory_disabled()", "| theta_high | 0.3 |",
        "| update_interval | 5 |", "72 FFN neurons", "8 experts", "Nothing had been compared",
        "not a promise of better answers", "vLLM", "(README.source.md)", "{2506.17310}",
        'Show "Built with Llama"', "[llama3.1](LICENSE)", "[NOTICE](NOTICE)",
        "those who accept its terms",
    ):  # fmt: skip
        assert words in text, words
    assert "Written by hand." in (out / "README.source.md").read_text()


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        (
            "license: cc-by-nc-nd-4.0",
            ["Commercial use is not allowed", "ask the authors", "Name the source's"],
        ),
        ("license: gemma", ["terms and their use restrictions"]),
        ("license: bigscience-bloom-rail-1.0", ["use restrictions bind everyone"]),
        ("license: [mit, apache-2.0]", ["mit, apache-2.0", "copyright notice", "NOTICE"]),
        (
            "license: other\nlicense_name: qwen-research",
            ["qwen-research", "before any commercial use"],
        ),
        ("language: en", ["states no licence"]),
    ],
)
def test_carries_what_the_licence_forbids_and_demands(source, tmp_path, licence, words):
    copy = shutil.copytree(source, tmp_path / "source")
    (copy / "README.md").write_text(f"---\n{licence}\n---\n")
    text = new_card(copy)
    for part in words:
        assert part in text, part


def new_card(folder, hub=None, **options):
    opened = open_source(str(folder))
    opened = replace(opened, name=hub.repo_id, hub=hub) if hub else opened
    return model_card(opened, make_plan(opened, ConvertOptions(**{"experts": 8, **options})))


def test_of_a_source_on_the_hub(source):
    text = new_card(source, HubAddress("acme/tiny", "1" * 40, "hf_secret", None))
    assert ModelCard(text).data.base_model == "acme/tiny" and metadata_errors(text) == []
    assert (
        "# tiny as a PaceLLM" in text
        and f"--source acme/tiny \\\n    --revision {'1' * 40}\n" in text
        and "hf_secret" not in text
    )


def test_without_memory(source):
    text = new_card(source, memory_layers="none", window="none", experts=7)
    assert "## Recall" in text and "## The memory" not in text and "within one neuron" in text
    text = new_card(source, no_memory=True)
    assert (
        "activation-memory" not in ModelCard(text).data.tags
        and "trust_remote_code" not in text
        and "runs wherever its source runs" in text
        and "memory_disabled" not in text
    )
    assert metadata_errors(text) == []
    pushed = published(text, "acme/x", "2" * 40, needs_code=False, auto_class=CAUSAL, compared=None)
    assert "from_pretrained(name, revision=revision)" in pushed and "Python files" not in pushed


def test_the_same_bytes_each_time_and_nothing_of_this_machine(source, out, tmp_path):
    convert_folder(source, tmp_path / "another name")
    assert (tmp_path / "another name" / "README.md").read_bytes() == (
        out / "README.md"
    ).read_bytes()
    assert str(source.parent) not in (out / "README.md").read_text()


def test_published_loads_by_name_at_a_commit_and_says_what_was_measured(out):
    text, commit = card_of(out)[1], "2" * 40
    measured = Verification(
        tensors=51, permuted=12, nbytes=192640, different=(), edited_files=(), same_tokens=True
    )
    pushed = published(
        text, "acme/x", commit, needs_code=True, auto_class=CAUSAL, compared=measured.sentence()
    )
    assert pinned_commit(text) is None and pinned_commit(pushed) == commit
    assert f'name = "acme/x"\nrevision = "{commit}"\n' in pushed
    assert "from_pretrained(name, revision=revision, trust_remote_code=True)" in pushed
    assert (
        "all 51 tensors (192,640 bytes)" in pushed
        and "12 of them" in pushed
        and "tokenizer reads" in pushed
    )
    assert 'name = "."' not in pushed and "Nothing had been compared" not in pushed
    assert is_untouched(pushed.encode()) and metadata_errors(pushed) == []
    again = published(pushed, "acme/y", "3" * 40, needs_code=True, auto_class=CAUSAL, compared=None)
    assert pinned_commit(again) == "3" * 40 and "all 51 tensors" in again and "acme/x" not in again


def test_an_edited_card_is_told_from_ours_and_keeps_its_words(out):
    ours = (out / "README.md").read_bytes()
    assert is_untouched(ours)
    for edited in (
        ours.replace(b"PaceLLM", b"Pace", 1),
        ours + b"more",
        ours.replace(b"\n", b"\r\n"),
        b"my own",
        b"\xff",
        b"",
    ):
        assert not is_untouched(edited)
    mine = ours.decode().replace("## Citation", "## My own words\n\n## Citation")
    pushed = published(mine, "acme/x", "2" * 40, needs_code=True, auto_class=CAUSAL, compared=None)
    assert (
        "## My own words" in pushed
        and pinned_commit(pushed) == "2" * 40
        and not is_untouched(pushed.encode())
    )
    assert (
        published(
            "no blocks", "acme/x", "2" * 40, needs_code=True, auto_class=CAUSAL, compared=None
        )
        == "no blocks"
    )


def test_overwrite_does_not_touch_an_edited_card(source, out, tmp_path):
    again = shutil.copytree(out, tmp_path / "again")
    opened = open_source(str(source))
    prepare(opened, again, ConvertOptions(experts=8), overwrite=True)
    (again / "README.md").write_text("my own card")
    with pytest.raises(CallError, match=r"README\.md that was edited") as caught:
        prepare(opened, again, ConvertOptions(experts=8), overwrite=True)
    assert (
        "move it away" in caught.value.hint and (again / "README.md").read_text() == "my own card"
    )
    (again / "README.md").rename(tmp_path / "README.md")
    prepare(opened, again, ConvertOptions(experts=8), overwrite=True)
