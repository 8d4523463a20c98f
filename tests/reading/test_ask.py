"""`pace read` and `pace ask`: real commands on a small model, and where passages come from."""

import json

import pytest
from click.testing import CliRunner
from helpers import convert_folder, pace_convert, refuse

from pace_convert.cli import ask as cli
from pace_convert.converted.rereading import load_rereading
from pace_convert.errors import CallError
from pace_convert.options import RunOptions
from pace_convert.progress import Progress
from pace_convert.reading.documents import Document, read_document
from pace_convert.reading.library import read_library
from pace_convert.reading.reader import DocumentReader
from pace_convert.reference import reference_model

WORDS = "the code of ada is river and the boat went down the hill to see a tree . "


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The reference model, which has a tokenizer, with a window of a few tokens."""
    folder = tmp_path_factory.mktemp("ask") / "out"
    convert_folder(
        reference_model(), folder, experts=16, memory_layers="none", window=32, spans=2,
        span_width=8, first_tokens=4, reread_layer=1, key_size=32,
    )  # fmt: skip
    return folder


@pytest.fixture
def book(tmp_path):
    """Lines of known numbers."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{WORDS}\n" for _ in range(40)))
    return path


def ask(*args, **more):
    return pace_convert(*args, command=("ask",), **more)


def test_ask_says_where_it_read(out, book, tmp_path):
    done = ask(out, "--file", book, "--banks", tmp_path / "banks", "what is the code of ada ?",
        "--json", "--max-new-tokens", 4)  # fmt: skip
    assert done.returncode == 0, done.stderr
    [answer] = json.loads(done.stdout)
    text = book.read_text()
    assert answer["passages"] and answer["read"] > 600 > answer["context"]
    for passage in answer["passages"]:
        assert text[passage["first"] : passage["stop"]] == passage["text"]
        assert passage["line"] == text.count("\n", 0, passage["first"]) + 1
    assert "reading book.txt" in done.stderr
    again = ask(out, "--file", book, "--banks", tmp_path / "banks", "what is the code of ada ?",
        "--json", "--max-new-tokens", 4)  # fmt: skip
    assert json.loads(again.stdout) == [answer] and "reading" not in again.stderr
    assert len(list((tmp_path / "banks").iterdir())) == 1


def test_the_screen(out, book, tmp_path):
    done = ask(out, "--file", book, "--no-bank", "what is the code of ada ?", "where is the boat ?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Read again") == 2 and "book.txt, line" in done.stdout
    assert "#" in done.stdout and done.stdout.index("code of ada ?") < done.stdout.index("boat ?")


def test_wrong_calls(out, book, tmp_path):
    refuse(ask(out, "--file", book), 2, "no question")
    refuse(ask(out, "--file", book, " "), 2, "a question is empty")
    refuse(ask(out, "--file", tmp_path / "absent.txt", "x"), 2, "no such file")
    refuse(ask(out, "--file", tmp_path, "x"), 2, "a folder, not a file")
    (tmp_path / "empty.txt").write_text(" \n")
    refuse(ask(out, "--file", tmp_path / "empty.txt", "x"), 2, "has no text")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refuse(ask(out, "--file", tmp_path / "bytes.txt", "x"), 2, "not a UTF-8 text")
    refuse(ask(tmp_path, "--file", book, "x"), 2, "config.json")
    plain = tmp_path / "plain"
    convert_folder(reference_model(), plain, experts=16, memory_layers="none", window="none")
    refuse(ask(plain, "--file", book, "x"), 2, "has no window")
    bare = tmp_path / "bare"
    convert_folder(reference_model(), bare, experts=16, no_memory=True)
    refuse(ask(bare, "--file", book, "x"), 2, "--no-memory")


def test_a_library_by_processes_and_alone(out, tmp_path):
    """The same banks, and what is read is not read again."""
    library = tmp_path / "library"
    library.mkdir()
    for i in range(3):
        (library / f"{i}.txt").write_text(f"{WORDS} {i} " * (20 + i))
    args = ("--file", library, "--json", "--device", "cpu", "--banks")
    done = pace_convert(out, *args, tmp_path / "a", "-j", 2, command=("read",))
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert [record["file"] for record in records] == [str(library / f"{i}.txt") for i in range(3)]
    alone = read_library(
        out, [library], tmp_path / "b", RunOptions(device="cpu"), Progress(quiet=True)
    )
    assert alone == records
    names = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    (library / "0.md").write_text(" ")
    done = pace_convert(out, *args, tmp_path / "c", command=("read",))
    refuse(done, 2, "0.md", "all other files are read")
    assert len(list((tmp_path / "c").iterdir())) == 3
    assert names == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


@pytest.mark.slow
def test_a_library_on_ray(out, tmp_path):
    """The same banks as in this process."""
    library = tmp_path / "library"
    library.mkdir()
    for i in range(3):
        (library / f"{i}.txt").write_text(f"{WORDS}\n" * (20 + i))
    done = pace_convert(
        out, "--file", library, "--banks", tmp_path / "ray", "--executor", "ray", "-j", 2, "--json",
        "-q", command=("read",),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = RunOptions(device="cpu")
    alone = read_library(out, [library], tmp_path / "alone", run, Progress(quiet=True))
    assert json.loads(done.stdout) == alone
    banks = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("ray", "alone")
    ]
    assert banks[0] == banks[1] and len(banks[0]) == 3


def test_passages_of_several_texts(out):
    reader = DocumentReader.load(out, device="cpu")
    documents = [Document(f"{i}.txt", f"{WORDS}\n" * (10 + i)) for i in range(3)]
    texts = [reader.read(document, None, Progress(quiet=True)) for document in documents]
    answer = reader.ask(texts, "what is the code of ada ?", 4)
    by_name = {document.name: document.text for document in documents}
    assert answer.passages
    for found in answer.passages:
        assert by_name[found.document][found.first : found.stop] == found.text


def test_short_texts_are_read_whole(out):
    reader = DocumentReader.load(out, device="cpu")
    text = reader.read(Document("a", "the code of ada is river ."), None, Progress(quiet=True))
    answer = reader.ask([text], "what ?", 4)
    assert answer.passages == () and answer.answer == reader.ask([text], "what ?", 4).answer


def test_html_and_pdf(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("<html><script>no()</script><p>One &amp; two</p><p>three</p></html>")
    assert read_document(page).text == "One & two\nthree"
    from pypdf import PdfWriter

    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "blank.pdf")
    with pytest.raises(CallError, match="no text"):
        read_document(tmp_path / "blank.pdf")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    with pytest.raises(CallError, match="broken"):
        read_document(tmp_path / "broken.pdf")
    monkeypatch.setattr("pypdf.PdfReader", lambda path: None)  # as damaged files end there
    with pytest.raises(CallError, match=r"blank\.pdf can't be read as PDF"):
        read_document(tmp_path / "blank.pdf")


def test_a_line_is_found_by_its_character():
    document = Document("a", "one\ntwo\n\nfour")
    assert [document.line(i) for i in (0, 3, 4, 7, 8, 9, 12)] == [1, 1, 2, 2, 3, 4, 4]
    assert Document("a", "one\f\ntwo\n").line(5) == 2  # as editors count


def test_a_window_where_there_was_none(tmp_path):
    """Its keys are of the layer that a conversion would take, also for one that reads alone."""
    folder = tmp_path / "out"
    convert_folder(reference_model(), folder, experts=16, memory_layers="1", window="none")
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    for generates in (True, False):
        model, _ = load_rereading(folder, window=64, generates=generates)
        assert model.window_settings.layer == max(round(0.4 * layers), 1) - 1


def test_another_opening_is_another_bank(out, book, tmp_path):
    """A chat template may say what day it is."""
    reader = DocumentReader.load(out)
    document, banks = read_document(book), tmp_path / "banks"
    for opening in ("the day is one . ", "the day is two . "):
        reader.before = opening
        held = reader.read(document, banks, Progress(quiet=True)).cache
        expected = reader._ids(opening, special=not reader.tokenizer.chat_template)
        assert held.layers[-1].settle()[0].ids[: len(expected)].tolist() == expected


def test_the_end_of_questions(out, book):
    words = ["--file", book, "--no-bank", "-i", "--json", "--max-new-tokens", 4, "-q"]
    done = CliRunner().invoke(cli.ask, [str(word) for word in (out, *words)], input="a boat ?\n")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["passages"] and "Aborted" not in done.output


def test_a_bank_that_cannot_be_written(out, book, tmp_path):
    reader = DocumentReader.load(out)
    cache = reader.read(read_document(book), None, Progress(quiet=True)).cache
    with pytest.raises(OSError, match=r"the bank .* can't be written"):
        reader.model.save_bank(cache, tmp_path / "nowhere" / "bank.safetensors")
