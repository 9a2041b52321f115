"""The page of tests names every file of them, and no other."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_page_of_tests_names_every_file():
    page = (TESTS.parent / "docs" / "testing.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    named = {TESTS / name for row in rows for name in re.findall(r"`([\w/.]+)`", row)}
    assert all(path.exists() for path in named)
    files = {path for path in TESTS.rglob("*.py") if path.name != "__init__.py"}
    assert {path for path in files if not named & {path, *path.parents}} == set()
