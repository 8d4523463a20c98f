"""The first model card: valid metadata, inherited as it was written, and true."""

import pytest
import yaml
from helpers import convert_folder

from pace_convert.card import inherited_metadata


def front_matter(out):
    text = (out / "README.md").read_text()
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n")), text


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nlanguage: [en, no]\n---\n# x", {"license": "mit", "language": ["en", "no"]}),
        ("---\r\nlicense: apache-2.0\r\n---\r\n", {"license": "apache-2.0"}),
        (
            "---\ntitle: a --- b\nlicense: 2024-01-01\nlicense_name: a---b\n---\n",
            {"license": "2024-01-01", "license_name": "a---b"},
        ),
        ("---\nlicense: .nan\nlanguage:\n---\n", {"license": ".nan"}),
        ("---\nlicense: [\n---\n", {}),
        ("# no front matter\n---\nlicense: mit\n---\n", {}),
        ("", {}),
    ],
)
def testinherited_metadata(card, expected):
    assert inherited_metadata(card) == expected


def test_card_with_memory(make_source, tmp_path):
    source = make_source("qwen2")
    (source / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\n# hello")
    out = tmp_path / 'odd "name" é'
    convert_folder(source, out)
    metadata, text = front_matter(out)
    assert metadata["license"] == "mit" and metadata["tags"] == ["pacellm", "cortical-experts", "activation-memory"]
    assert "base_model" not in metadata and str(tmp_path) not in text
    assert 'from_pretrained("odd \\"name\\" é", trust_remote_code=True)' in text
    assert "takes part in 2 of 4 layers" in text and "starts to act after 5 tokens" in text


def test_card_without_memory(make_source, tmp_path):
    source = make_source("qwen2")
    convert_folder(source, tmp_path / "none", memory_layers="none", experts=7)
    metadata, text = front_matter(tmp_path / "none")
    assert "activation-memory" not in metadata["tags"] and "starts to act" not in text and "to within one neuron" in text
    convert_folder(source, tmp_path / "off", no_memory=True)
    metadata, text = front_matter(tmp_path / "off")
    assert "trust_remote_code" not in text and "runs wherever its source runs" in text
