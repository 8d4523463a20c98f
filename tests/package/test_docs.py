"""The documents: what is generated is up to date, the site builds, and what they promise is
there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
import yaml
from docs_tables import DOCS, FROM_TESTS, pattern, quick_blocks
from helpers import FAMILY_CONFIGS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(name: str, page: str) -> str:
    return pattern(name).search((DOCS / page).read_text())[1].strip()


def table(name: str) -> list[list[str]]:
    lines = block(name, FROM_TESTS[name][0]).splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]


def test_tables_name_what_the_tests_back():
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    backed = {
        name.replace('\\"', '"')
        for name in re.findall(r'@pytest\.mark\.works\("((?:[^"\\]|\\.)*)"\)', text)
    }
    backed |= set(re.findall(r"@pytest\.mark\.works\('([^']*)'\)", text))
    uses = {row[0] for row in table("uses")[2:]}
    columns = set(table("families")[0][1:])
    assert uses | columns == backed, "run scripts/docs_tables.py"
    assert {row[0].strip("`") for row in table("families")[2:]} == set(FAMILY_CONFIGS)


def test_nothing_in_the_tables_failed():
    cells = [cell for name in ("uses", "families") for row in table(name)[2:] for cell in row[1:]]
    assert "yes" in cells and not any("no**" in cell for cell in cells)


@pytest.mark.parametrize(
    ("name", "page", "made"), list(quick_blocks()), ids=lambda value: value.split("\n")[0][:20]
)
def test_what_is_made_from_code_and_results_is_up_to_date(name, page, made):
    assert block(name, page) == made.strip(), "run scripts/docs_tables.py --quick"


def test_every_module_says_what_it_is():
    rows = block("modules", "architecture.md").splitlines()
    silent = [row for row in rows[2:] if row.startswith("| `") and row.rstrip("| ").endswith("`")]
    assert silent == [] and len(rows) > 50


def test_the_readme_is_two_screens_and_its_links_lead_somewhere():
    assert len(README.encode()) <= 10_000
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not urlparse(link).scheme]
    assert links
    for link in links:
        assert (ROOT / link.partition("#")[0]).exists(), link


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; nothing may reach out while it is built."""
    folder = tmp_path_factory.mktemp("site")
    proxy = "http://127.0.0.1:9"  # nobody listens
    environment = {
        **os.environ,
        "http_proxy": proxy,
        "https_proxy": proxy,
        "NO_MKDOCS_2_WARNING": "1",
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_and_holds_every_page(site):
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert pages == {path.stem for path in site.glob("*.html")} - {"404"}
    assert "Pin the commit" in (site / "security.html").read_text()
    assert "0.1.0" in (site / "changelog.html").read_text()


def test_the_site_fetches_nothing_from_elsewhere(site):
    for page in site.glob("*.html"):
        fetched = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"([^\"]+)\"", page.read_text()
        )
        assert [link for link in fetched if urlparse(link).netloc] == [], page.name


def test_citation_and_issue_forms_have_what_github_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "version"} <= set(citation)
    assert citation["authors"] == [{"name": "pace-convert contributors"}]
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2506.17310"
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "family"]
    for form in forms:
        content = yaml.safe_load(form.read_text())
        if form.stem == "config":
            continue
        assert {"name", "description", "body"} <= set(content)
        fields = [field["id"] for field in content["body"] if field["type"] != "markdown"]
        assert len(fields) == len(set(fields)) >= 3


@pytest.mark.parametrize(
    ("program", "words", "expected"),
    [
        ("pace", "pace ver", "verify"),
        ("pace", "pace convert a b --granularity e", "expert"),
        ("pace-convert", "pace-convert a b --theta-h", "--theta-high"),
    ],
)
def test_shells_complete_both_commands(program, words, expected):
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    documented = (DOCS / "usage.md").read_text()
    assert f'eval "$({variable}=bash_source {program})"' in documented
    environment = {
        **os.environ,
        variable: "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [str(Path(sys.executable).with_name(program))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert f"plain,{expected}" in done.stdout.splitlines(), done.stderr
