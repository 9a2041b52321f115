"""From what was seen to what is advised, and the patch of it."""

import subprocess
from pathlib import Path

import pytest

from safe_inplace._advise.advice import advice_from
from safe_inplace._advise.evidence import SMALLEST
from safe_inplace._advise.source import Source


def seen(file, index=0, **changed):
    counts = {"calls": 4, "steps": 2, "largest": SMALLEST, "eps": 1e-7, "gained": {"0": 100}, "against": {}}
    return {"file": str(file), "index": index, **counts, **changed}


def advised(*sites):
    texts = {site["file"]: Source(Path(site["file"]).read_bytes(), "").digest for site in sites}
    return advice_from({"seen": list(sites), "left alone": [], "texts": texts})


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text("def f(y):\n    x = y - 1\n    r = x * 2 + y\n    return r\n")
    return path


def code(advice):
    (file,) = advice.files
    return [file.source.code(change.site, file.chosen).removeprefix("safe_inplace.") for change in file.changes]


def test_the_greatest_gain_is_advised_and_of_two_that_which_writes_nothing(program):
    options = [f"{option.op}{option.order}" for option in Source(program.read_bytes(), str(program)).sites[1].options]
    assert options == ["mul_add(0, 1, 2)", "mul_add_(0, 1, 2)", "mul_add(1, 0, 2)"]
    assert code(advised(seen(program, 1, gained={"0": 1, "1": 2}))) == ["mul_add_(x, 2, y)"]
    assert code(advised(seen(program, 1, gained={"1": 2, "0": 2}))) == ["mul_add(x, 2, y)"]


def test_what_is_not_advised(program):
    advice = advised(
        seen(program, 1, steps=1),
        seen(program, 0, gained={}, against={"a": 1, "b": 2}),
        seen(program, 0, gained={}),
        seen(program, 0, largest=SMALLEST - 1),
    )
    assert advice.changes == [] and advice.sites == 3
    assert advice.against == {"seen in one step only": 1, "b": 1, "not always plain tensors": 1}


@pytest.mark.parametrize("text", ["def f(y):\n    return y\n", "def f(", None])
def test_a_file_that_has_changed_since(program, text):
    site = seen(program, 1)
    found = {"seen": [site], "left alone": [], "texts": {site["file"]: Source(program.read_bytes(), "").digest}}
    assert advice_from(found).changes != []
    program.unlink() if text is None else program.write_text(text)
    advice = advice_from(found)
    assert advice.changes == [] and advice.against == {"the file has changed since": 1}


TEXTS = {
    "plain.py": "r = x + y\n",
    "no_newline.py": "# first\nr = x + y",
    "sp ace.py": "r = x + y\n",
    "lines.py": "s = '\u2028 \x85 \x1c'\nr = x + y  # \u00e9\n",
    "folder/inner.py": "'doc'\n\nfrom __future__ import annotations\nr = (x\n     + y)\n",
}


@pytest.mark.parametrize("inside", [True, False])
def test_the_patch_applies(tmp_path, monkeypatch, inside):
    (tmp_path / "here").mkdir()
    for name, text in TEXTS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    monkeypatch.chdir(tmp_path if inside else tmp_path / "here")
    advice = advised(*[seen(tmp_path / name) for name in TEXTS])
    assert advice.root() == str(tmp_path)
    subprocess.run(["git", "apply", "--whitespace=nowarn", "-"], cwd=tmp_path, input=advice.diff().encode(), check=True)
    for file in advice.files:
        with open(file.source.filename, "rb") as changed:
            text = changed.read()
        assert text == file.source.final(file.chosen) and b"safe_inplace.add(x" in text
        compile(text, "program.py", "exec")
