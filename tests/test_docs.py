"""What the pages say is so: the page of tests names every file of them, and no other; links lead somewhere."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from docs import check_site, coverage_page

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def test_the_page_of_tests_names_every_file():
    page = (TESTS.parent / "docs" / "testing.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    named = {TESTS / name for row in rows for name in re.findall(r"`([\w/.]+)`", row)}
    assert all(path.exists() for path in named)
    files = {path for path in TESTS.rglob("*.py") if path.name != "__init__.py"}
    assert {path for path in files if not named & {path, *path.parents}} == set()


def test_the_oldest_libraries_are_those_that_the_patches_are_tested_with():
    """Where .ci/run installs releases of a year ago: docs/patch.md names them, and no extra asks for a newer or an older one."""
    installed = dict(re.findall(r" (transformers|diffusers|timm)==([\d.]+)", (ROOT / ".ci" / "run").read_text()))
    assert len(installed) == 3
    page = (ROOT / "docs" / "patch.md").read_text()
    (order,) = re.findall(r"the newest (\w+), (\w+) and\s(\w+), and with releases of a year ago", page)
    (named,) = re.findall(r"releases of a year ago \(([\d.]+), ([\d.]+), ([\d.]+)\)", page)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [Requirement(line) for extra in extras.values() for line in extra]
    for library, version in zip(order, named, strict=True):
        assert (installed[library] + ".").startswith(version + ".")
        assert {str(one.specifier) for one in wanted if one.name == library} == {f">={version}"}


def test_the_page_of_coverage(tmp_path):
    """A row for each folder, and one for each file of which something is not reached; 100% is all."""

    def of_python(*counts):
        names = ("covered_lines", "num_statements", "covered_branches", "num_branches")
        return {"summary": dict(zip(names, counts, strict=True))}

    def of_core(name, *counts):
        names = ("line_covered", "line_total", "branch_covered", "branch_total")
        return {"filename": name, **dict(zip(names, counts, strict=True))}

    modules = {"package/whole.py": (8, 8, 2, 2), "package/inner/part.py": (1999, 2000, 3, 4), "single.py": (1, 4, 0, 0)}
    files = {name: of_python(*counts) for name, counts in modules.items()}
    (tmp_path / "python.json").write_text(json.dumps({"files": files}))
    core = [of_core("csrc/a.cpp", 1, 3, 1, 6), of_core("csrc/whole.h", 2, 2, 0, 0)]
    (tmp_path / "core.json").write_text(json.dumps({"files": core}))
    outcomes = ["<failure/>", "<error/>", *["<skipped/>"] * 2, *[""] * 1196]
    cases = "".join(f'<testcase name="{name}">{outcome}</testcase>' for name, outcome in enumerate(outcomes))
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    page = coverage_page.page(tmp_path, "a torch", "make coverage")
    assert "**a torch: `make coverage`: 1,196 passed, 2 failed, 2 skipped**" in page
    stopped = coverage_page.page(tmp_path, "a torch", "make coverage", status=2)
    assert "2 skipped, and then it was interrupted, by which counts are lost**" in stopped
    assert [line for line in page.splitlines() if line.startswith("| ")] == [
        "| Python | lines | branches |",
        "| --- | ---: | ---: |",
        "| **all** | 99.8% of 2,012 | 83.3% of 6 |",
        "| single.py | 25.0% of 4 | - |",
        "| **package** | 100.0% of 8 | 100.0% of 2 |",
        "| **package/inner** | 99.9% of 2,000 | 75.0% of 4 |",
        "| part.py | 99.9% of 2,000 | 75.0% of 4 |",
        "| C++ | lines | branches |",
        "| --- | ---: | ---: |",
        "| **all** | 60.0% of 5 | 16.6% of 6 |",
        "| **csrc** | 60.0% of 5 | 16.6% of 6 |",
        "| a.cpp | 33.3% of 3 | 16.6% of 6 |",
    ]


class TestWhatIsLookedAtInTheSite:
    """`make docs` makes it, and python docs/check_site.py looks at what Sphinx does not."""

    PAGE = '<html><head><link rel="stylesheet" href="sheet.css"></head><body><h1 id="top">A page</h1>{}</body></html>'

    def problems(self, site: Path, body: str = "", sheet: str = "") -> list[str]:
        (site / "folder").mkdir(exist_ok=True)
        (site / "sheet.css").write_text(sheet)
        (site / "index.html").write_text(self.PAGE.format(body))
        (site / "folder" / "other.html").write_text('<a id="here" href="../index.html#top">back</a>')
        return check_site.problems(site)

    def test_links_that_are_there(self, tmp_path):
        links = ("folder/other.html#here", "#top", "https://semver.org/#x", "mailto:a@b")
        body = "".join(f'<a href="{link}"></a>' for link in links) + '<img src="data:image/png;base64,AA">'
        assert self.problems(tmp_path, body, "p {background: url(data:image/png;x)}") == []

    @pytest.mark.parametrize(
        "body, problem",
        [
            ('<a href="folder/nothing.html">', "index.html: folder/nothing.html is not there"),
            ('<a href="folder/">', "index.html: folder/ is not there"),
            ('<img src="plot.png">', "index.html: plot.png is not there"),
            ('<a href="#bottom">', "index.html: #bottom has no such anchor"),
            ('<a href="folder/other.html#there">', "index.html: folder/other.html#there has no such anchor"),
            ('<script src="https://cdn.net/x.js">', "index.html: loads https://cdn.net/x.js from another host"),
            ('<link rel="preload" href="//cdn.net/x">', "index.html: loads //cdn.net/x from another host"),
            ('<img src="http://cdn.net/x.png">', "index.html: loads http://cdn.net/x.png from another host"),
            ('<p style="background: url(//cdn.net/x)">', "index.html: loads //cdn.net/x from another host"),
        ],
    )
    def test_links_that_are_not(self, tmp_path, body, problem):
        assert self.problems(tmp_path, body) == [problem]

    @pytest.mark.parametrize("rule", ['@import "https://cdn.net/x"', "p {src: url('https://cdn.net/x')}"])
    def test_stylesheets(self, tmp_path, rule):
        assert self.problems(tmp_path, sheet=rule) == ["sheet.css: loads https://cdn.net/x from another host"]

    def test_no_page_at_all(self, tmp_path):
        assert check_site.problems(tmp_path) == [f"{tmp_path}: no page"]
