"""The README's tables have a row for everything that a test says it backs, and none that no test backs."""

import re
from pathlib import Path

from helpers import FAMILY_CONFIGS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def table(name: str) -> list[list[str]]:
    body = re.search(rf"<!-- {name}: made by .*? -->\n(.*?)\n<!-- end of {name} -->", README, re.DOTALL)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")]


def test_tables_name_what_the_tests_back():
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    backed = {name.replace('\\"', '"') for name in re.findall(r'@pytest\.mark\.works\("((?:[^"\\]|\\.)*)"\)', text)}
    backed |= set(re.findall(r"@pytest\.mark\.works\('([^']*)'\)", text))
    uses = {row[0] for row in table("uses")[2:]}
    columns = set(table("families")[0][1:])
    assert uses | columns == backed, "run scripts/readme_tables.py"
    assert {row[0].strip("`") for row in table("families")[2:]} == set(FAMILY_CONFIGS)


def test_nothing_in_the_tables_failed():
    cells = [cell for name in ("uses", "families") for row in table(name)[2:] for cell in row[1:]]
    assert "yes" in cells and not any("no**" in cell for cell in cells)
