"""Keys that are kept: by content, within bounds, the least recently used go first, and nobody comes
to another's text.
"""

import pytest
import torch
from servers import book, served

from pace_convert.serving.blocks import SUFFIX, FolderStore, KeptKeys, MemoryStore

KEYS = torch.arange(8 * 32.0).view(8, 32)


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    """Of a size for three keys."""
    if request.param == "memory":
        return MemoryStore(3 * KEYS.nbytes)
    return FolderStore(tmp_path, 3 * KEYS.nbytes + 400)


def test_the_least_recently_used_go_first(store):
    for name in "abc":
        store.put(name, KEYS + ord(name))
    assert torch.equal(store.get("a"), KEYS + ord("a"))
    store.put("d", KEYS)
    assert store.get("b") is None
    assert all(store.get(name) is not None for name in "acd")
    store.put("large", torch.zeros(1000, 32))
    assert store.get("large") is None and store.get("d") is not None
    assert store.nbytes <= store.most


def test_a_folder_outlives_its_process(tmp_path):
    FolderStore(tmp_path, 10**6).put("a", KEYS)
    again = FolderStore(tmp_path, 10**6)
    assert torch.equal(again.get("a"), KEYS)
    (tmp_path / f"b{SUFFIX}").write_bytes(b"no keys")
    assert again.get("b") is None and not (tmp_path / f"b{SUFFIX}").exists()
    assert [path.name for path in tmp_path.iterdir()] == [f"a{SUFFIX}"]
    FolderStore(tmp_path, 10)
    assert list(tmp_path.iterdir()) == []


def test_names_are_of_content_and_of_what_makes_keys():
    kept, other = KeptKeys(MemoryStore(0), "model"), KeptKeys(MemoryStore(0), "another")
    ids = torch.arange(10)
    assert kept.name(ids) == kept.name(ids.to(torch.int32))
    assert len({kept.name(ids), kept.name(ids.flip(0)), kept.name(ids[:9]), other.name(ids)}) == 4


def test_what_is_asked_for_twice_is_read_once():
    kept, reads = KeptKeys(MemoryStore(10**6), ""), []

    def read(pieces):
        reads.append(len(pieces))
        return [KEYS + int(piece[0]) for piece in pieces]

    a, b = torch.tensor([1, 2]), torch.tensor([3, 4])
    assert torch.equal(kept([a, b, a], read)[2], KEYS + 1)
    assert torch.equal(kept([b], read)[0], KEYS + 3)
    assert reads == [2] and (kept.read, kept.found) == (2, 2)


def answer(client, prompt):
    made = client.completions.create(model="out", prompt=prompt, temperature=0, max_tokens=8)
    return made.choices[0].text, made.pace_passages


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_document_is_read_once(out, tmp_path, where):
    """By whoever asks, in whichever endpoint; so is the beginning of a text that grows."""
    text, other = book(3, 400), book(5, 400)
    options = {} if where == "memory" else {"bank_dir": tmp_path / "banks"}
    with served(out, bank_size="0") as (_, client):
        alone = [answer(client, prompt) for prompt in (text, other, text + " " + book(4, 50))]
    with served(out, **options) as (model, client):
        kept = model.kept
        assert answer(client, text) == alone[0]
        first = kept.read
        assert first > 8 and answer(client, text) == alone[0] and kept.read == first
        assert answer(client, other) == alone[1]
        both = kept.read
        assert both > first  # another's text is read, and what was kept tells nothing of it
        assert answer(client, text + " " + book(4, 50)) == alone[2]
        assert both < kept.read <= both + 3
    if where == "folder":
        with served(out, **options) as (model, client):
            assert [answer(client, prompt) for prompt in (text, other)] == alone[:2]
            assert model.kept.read == 0


def test_no_request_comes_to_anothers_text(out):
    """Passages are of the prompt itself, though other texts lie in the same store."""
    secret, asking = "the code of tom is seven . " * 60, book(5, 300) + " what is the code of tom ?"
    with served(out) as (_, client):
        alone = answer(client, asking)
        answer(client, secret)
        again, passages = answer(client, asking)
        assert (again, passages) == alone and passages
        assert all("seven" not in passage["text"] for passage in passages)
        assert all(passage["stop"] <= 400 for passage in passages)


def test_a_store_that_is_too_small_changes_no_answer(out):
    text = book(3, 400)
    with served(out) as (_, client):
        expected = answer(client, text)
    with served(out, bank_size="5KB") as (model, client):
        assert answer(client, text) == answer(client, text) == expected
        assert 0 < model.kept.store.nbytes <= 5000
