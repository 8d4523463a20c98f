"""`pace inspect` as a user calls it: the page, the JSON, the table, and what it refuses."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import convert_folder

sys.path.append(str(Path(__file__).parents[1] / "cli"))
from test_errors import pace_convert, refuse

from pace_convert.cli.in_words import facts_text
from pace_convert.converted.opened import open_converted
from pace_convert.errors import CallError, PaceError
from pace_convert.inspect import report as job
from pace_convert.progress import Progress
from pace_convert.reference.tokenizer import build_tokenizer

QUIET = Progress(quiet=True)

STORY = (
    "<user> 東京 . the hill . the code of ada is river . <script>alert('x')</script> & \"the end\" "
    * 3
)


def inspect(*args):
    return pace_convert(*args, command=("inspect",))


@pytest.fixture(scope="module")
def folder(make_source, tmp_path_factory):
    source = make_source("qwen2", vocab_size=1200, max_position_embeddings=64)
    build_tokenizer(512).save_pretrained(source)
    out = tmp_path_factory.mktemp("inspect") / "a <b>model</b>"
    convert_folder(source, out, experts=7)
    return out


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    """(page, its JSON): a text that is longer than the model's longest, with markup in it."""
    html = tmp_path_factory.mktemp("page") / "report.html"
    story = html.with_name("story.txt")
    story.write_text("\ufeff" + STORY * 3)
    done = inspect(folder, "--html", html, "--probe", story, "--json", "-q")
    assert done.returncode == 0, done.stderr
    return html.read_text(), json.loads(done.stdout)


class Tags(HTMLParser):
    """Every tag with its attributes; fails where one is not closed in order."""

    VOID = ("meta", "img", "br", "input")

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text, self.titles = [], [], "", 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_page_holds_no_script_and_loads_nothing(page):
    tags = Tags(page[0])
    assert not {"script", "link", "iframe", "object", "base", "form"} & {
        tag for tag, _ in tags.found
    }
    for tag, attributes in tags.found:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith(
            "data:image/png;base64,"[: len(attributes.get("src", "data:"))]
        )
        assert "href" not in attributes or tag == "a"
    policy = next(
        a["content"] for _, a in tags.found if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert "url(" not in page[0] and "@import" not in page[0]


def test_page_can_be_read_without_seeing_it(page):
    tags = Tags(page[0]).found
    assert all(a["aria-label"] for tag, a in tags if tag == "svg") and all(
        a["alt"] for tag, a in tags if tag == "img"
    )
    assert ("html", {"lang": "en"}) in tags and sum(tag == "h1" for tag, _ in tags) == 1


def test_page_says_what_the_json_says(page, folder):
    text, facts = " ".join(Tags(page[0]).text.split()), page[1]
    assert folder.name in text and "<script>alert('x')</script>" in text  # as text, not as a tag
    assert (
        "64 tokens were read; " in text
        and f"{facts['probe']['tokens_cut']} more were left out" in text
    )
    for row in facts["layers"]:
        assert (
            f"Layer {row['layer']} {row['quality']['experts']['explained']:.1%} explained".replace(
                " ", ""
            )
            in text.replace(" ", "")
        )
    for memory in facts["probe"]["memory"]:
        filled = f"{len(memory['slots'])} of 6 slots filled"
        assert f"Memory in layer {memory['layer']} 12 blocks finished, {filled}" in text
        for slot in memory["slots"]:
            assert (
                re.search(rf"\b{slot['slot']}\b", text) and slot["piece"] in STORY and slot["piece"]
            )


def test_json_has_every_fact(page):
    facts = page[1]
    probe = facts["probe"]
    assert (
        "".join(probe["pieces"]) == (STORY * 3)[: len("".join(probe["pieces"]))]
        and len(probe["pieces"]) == 64
    )
    assert [row["sizes"] for row in facts["layers"]] == [{"10": 5, "11": 2}] * 4
    assert all(len(row["quality"]["by_expert"]) == 7 for row in facts["layers"])
    assert all(
        len(row["activation"]) == len(probe["segments"]) - 1 == 48 for row in probe["experts"]
    )
    assert all(1 <= row["half"] <= 4 for row in probe["experts"])
    for memory in probe["memory"]:
        assert (
            memory["kept"] + memory["mixed"] + memory["reused"]
            == 64
            == len(memory["tokens"]["similarity"])
        )
        assert memory["filled"][-1] == len(memory["slots"]) and memory["blocks"] == 12


def test_table_of_a_text_too_short_for_the_memory(folder, tmp_path):
    page = tmp_path / "short.html"
    table = facts_text(job.inspect(open_converted(folder), QUIET, text="the cat", page=page))
    assert (
        "explained (noise, random)" in table and "5 x 10, 2 x 11" in table and "carry half" in table
    )
    assert "text from the command line: 4 tokens read" in table
    assert "so it did nothing here" in table and "so it did nothing here" in page.read_text()
    # Its own page may be replaced.
    assert "probe" not in job.inspect(open_converted(folder), QUIET, page=page)
    assert "On this text" not in page.read_text()


def test_pages_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "mine.html").write_text("<html>my own</html>")
    for name, words in (
        ("mine.html", "exists"),
        ("page.txt", ".html"),
        ("no/page.html", "no such folder"),
    ):
        refuse(inspect(folder, "--html", tmp_path / name), 2, words)
    assert (tmp_path / "mine.html").read_text() == "<html>my own</html>"


def test_texts_that_cannot_be_read(folder, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text(" \n")
    for text, words in (
        (tmp_path / "no.txt", "no such file"),
        (tmp_path / "binary", "UTF-8"),
        (tmp_path / "empty", "empty"),
    ):
        refuse(inspect(folder, "--probe", text), 2, words)


def test_folders_that_cannot_be_probed(folder, qwen2_pair, tmp_path):
    def probe(out, trust=False):
        return job.inspect(open_converted(out), QUIET, text="a text", trust_remote_code=trust)

    with pytest.raises(PaceError, match="no tokenizer"):
        probe(qwen2_pair[1])
    edits = {
        "memory_bank.py": lambda text: text + "raise RuntimeError('edited code ran')\n",
        "config.json": lambda text: text.replace(
            '"modeling_pace.PaceQwen2Model"', '"other/repo--evil.Model"'
        ),
    }
    for name, edit in edits.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / name).write_text(edit((copy / name).read_text()))
        with pytest.raises(CallError, match=f"{name}.* is not as this version ships it"):
            probe(copy)
    with pytest.raises(PaceError, match=r"does not load: \w+\.py: edited code ran"):
        probe(tmp_path / "memory_bank.py", trust=True)


def test_a_tokenizer_of_another_model(make_source, tmp_path):
    source = make_source("qwen2")
    build_tokenizer(512).save_pretrained(source)
    convert_folder(source, tmp_path / "out")
    with pytest.raises(PaceError, match="vocabulary has 120"):
        job.inspect(open_converted(tmp_path / "out"), QUIET, text="the code of ada")
