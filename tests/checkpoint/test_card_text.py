"""What a source's card, file names and folder say stays text in ours: no key, link, heading or HTML
comes of it.
"""

import re
import shutil
from dataclasses import replace

import pytest
import yaml
from hub_server import metadata_errors
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pace_convert.checkpoint.checkpoint import Source, open_source
from pace_convert.conversion.new_card import INHERITED, TERMS_OF_ACCESS, model_card
from pace_convert.conversion.plan import make_plan
from pace_convert.converted.card import is_untouched, memory_block, pinned_commit, published
from pace_convert.options import ConvertOptions

CAUSAL = "AutoModelForCausalLM"
OURS = {"library_name", "pipeline_tag", "tags"}
OUR_LINKS = {"https://arxiv.org/abs/2506.17310", "README.source.md", "LICENSE", "NOTICE.md"}
COMMENT = re.compile(r"<!--[^<>]*-->\s*")
nasty = st.sampled_from(
    [
        "---", "\n---\n", ": ", "base_model: evil/x", "\n# heading\n", "<script>alert(1)</script>",
        "[x](javascript:alert(1))", "![x](http://e.com/x.png)", "javascript:alert(1)", "`", "``",
        "<!-- load -->\n", "<!-- end of load -->", "https://evil.org/a", "www.evil.org", "|",
        "\\", '"', "'", "{{ 7 * 7 }}", "\u2028", "\x85", "\x7f", "\ud800", "\ufeff", "&lt;",
        "- a\n", "no", "2024-01-01", "!!python/name:os.system", "*a", "&a", "<http://e.com>",
        "a@b.com",
        '\nrevision = "' + "1" * 40 + '"\n', "LICENSE", "\t", "| a |\n|---|\n", "\0", "http://[",
    ]
)  # fmt: skip
texts = st.lists(nasty | st.text(max_size=4), max_size=4).map("".join)
values = st.recursive(
    texts | st.lists(texts, max_size=3),
    lambda inner: st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(INHERITED) | texts.map(lambda text: TERMS_OF_ACCESS + text)


@pytest.fixture(scope="module")
def source(make_source) -> Source:
    folder = make_source("qwen2")
    (folder / "LICENSE").write_text("the licence")
    (folder / "NOTICE.md").write_text("the notice")
    (folder / "README.md").touch()
    return open_source(str(folder))


def card_with(source: Source, metadata: dict, **changes) -> tuple[str, dict]:
    """The card, and what it inherits of this metadata of the source's card."""
    head = yaml.safe_dump(metadata, allow_unicode=False)
    (source.folder / "README.md").write_text(f"---\n{head}---\n# x")
    plan = make_plan(source, ConvertOptions(experts=8, memory_layers=(1,)))
    inherited = {
        key: value
        for key, value in metadata.items()
        if value and (key.startswith(TERMS_OF_ACCESS) or isinstance(value, str | list))
    }
    return model_card(replace(source, **changes), plan), inherited


def front_matter(card: str) -> dict:
    """As the Hub's client takes it: up to the first line of three hyphens."""
    return ModelCard(card, ignore_metadata_errors=False).data.to_dict()


def every(tokens: list[Token]) -> list[Token]:
    return [part for token in tokens for part in (token, *every(token.children or []))]


def body_of(card: str) -> list[Token]:
    text = card.split("\n---\n", 1)[1]
    return every(MarkdownIt("gfm-like", {"linkify": False}).parse(text))


def check_body(card: str, title: str | None = None) -> None:
    """Headings, links, pictures and HTML are those of the template."""
    tokens = body_of(card)
    html = [token.content for token in tokens if token.type in ("html_block", "html_inline")]
    assert all(COMMENT.fullmatch(part) for part in html), html
    assert not [token for token in tokens if token.type == "image"]
    links = {token.attrs["href"] for token in tokens if token.type == "link_open"}
    assert all(link in OUR_LINKS or re.match("https?://", link) for link in links), links
    headings = [
        after.content for token, after in zip(tokens, tokens[1:]) if token.type == "heading_open"
    ]
    assert len(headings) == 10 and headings[1] == "Load it", headings
    assert len([token for token in tokens if token.type == "table_open"]) == 4
    fences = [token.content for token in tokens if token.type == "fence"]
    assert fences[0].startswith("from transformers import") and 'name = "."' in fences[0]
    assert pinned_commit(card) is None and is_untouched(card.encode())


@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.dictionaries(keys, values, max_size=4))
def test_front_matter_reads_back_as_what_the_source_said(source, metadata):
    card, inherited = card_with(source, metadata)
    found = front_matter(card)
    assert {key: found[key] for key in inherited} == inherited
    assert set(found) == OURS | set(inherited)
    check_body(card)
    pushed = published(card, "acme/x", "2" * 40, needs_code=True, auto_class=CAUSAL, compared=None)
    assert front_matter(pushed) == found and pinned_commit(pushed) == "2" * 40


@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(texts, st.lists(texts, max_size=3))
def test_names_of_folders_and_files_stay_names(source, tmp_path_factory, name, files):
    place = tmp_path_factory.mktemp("named")
    folder = place / (re.sub("[/\0\ud800]", "", name)[:60] or "x")
    shutil.copytree(source.folder, folder, dirs_exist_ok=True)
    licences = tuple(f"LICENSE{file}" for file in files)
    try:
        card, _ = card_with(
            replace(source, folder=folder), {"license": "mit"},
            side_files=(*source.side_files, *licences),
            left_out=dict.fromkeys(files, "unknown"),
        )  # fmt: skip
    finally:
        shutil.rmtree(place)
    assert set(front_matter(card)) == {*OURS, "license"}
    tokens = body_of(card)
    html = [token.content for token in tokens if token.type in ("html_block", "html_inline")]
    assert all(COMMENT.fullmatch(part) for part in html), html
    links = {token.attrs["href"] for token in tokens if token.type == "link_open"}
    assert not [link for link in links if link.lower().startswith("javascript:")]
    assert len([token for token in tokens if token.type == "heading_open"]) == 10
    assert len([token for token in tokens if token.type == "table_open"]) == 4


def test_a_key_that_holds_a_line_of_metadata(source):
    card, _ = card_with(source, {"extra_gated_x: y\nbase_model": "evil/model", "license": "mit"})
    assert "base_model" not in front_matter(card)
    assert '"extra_gated_x: y\\nbase_model": "evil/model"\n' in card and "\nlicense: " in card


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("LICENSE", "[llama\\_x](LICENSE)"),
        ("https://example.org/a b", "llama\\_x, `https://example.org/a b`"),
        ("https://example.org/(a)?b=1#c", "[llama\\_x](https://example.org/%28a%29?b=1#c)"),
        ("javascript:alert(1)", "llama\\_x, `javascript:alert(1)`"),
        ("JavaScript://x.org/%0aalert(1)", "llama\\_x, `JavaScript://x.org/%0aalert(1)`"),
        ("data:text/html,x", "llama\\_x, `data:text/html,x`"),
        ("../../etc", "llama\\_x, `../../etc`"),
        ("//evil.org/x", "llama\\_x, `//evil.org/x`"),
        ("https://[", "llama\\_x, `https://[`"),
    ],
)
def test_links_lead_to_the_web_or_to_a_file_that_is_there(source, link, shown):
    card, _ = card_with(source, {"license_name": "llama_x", "license_link": link})
    assert f"As for the source: {shown}." in card
    check_body(card)


def test_metadata_of_an_ordinary_source_stays_readable(source):
    card, _ = card_with(source, {"license": "apache-2.0", "language": ["en", "no"]})
    assert 'license: "apache-2.0"\nlanguage: ["en", "no"]\n' in card
    assert metadata_errors(card) == []


@pytest.mark.parametrize("name", ["<b>", "[x](javascript:1)", "a\n# b", "<!-- end of memory -->"])
def test_the_name_of_data_that_a_memory_was_tuned_on(name):
    memory = ConvertOptions().memory_config((1,))
    gain = {"mean": 0.1, "low": 0.0, "high": 0.2}
    tuned = {
        "data": name, "sha256": "0" * 64, "metric": "m", "trials": 9, "seed": 0,
        "held_in_items": 1, "held_in": gain, "held_out_items": 1, "held_out": gain,
        "date": "2026-01-01", "version": "0",
    }  # fmt: skip
    block = memory_block({"memory": memory, "tuned": tuned}, 4)
    assert "9 trials on" in block
    tokens = every(MarkdownIt("gfm-like", {"linkify": False}).parse(block))
    assert not [token for token in tokens if token.type in ("html_inline", "link_open")]
    assert len([token for token in tokens if token.type == "heading_open"]) == 1
    assert block.count("<!-- end of memory -->") == 1
