"""The command that says which known blocks the installed libraries have, and what a structure is."""

import ast
import importlib
import importlib.metadata

import pytest
import torch

from safe_inplace.__main__ import main
from safe_inplace._patch import sources
from safe_inplace._patch.rules import RULES, rules_for
from safe_inplace._patch.structure import innermost, structure_of, structure_of_source

from .models import ATTENTION_IS_KNOWN, installed

PLAIN = """
def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    '''Scales.'''
    weights: list[float] = [w * scale for w in self.weights]
    total: int
    # A comment.
    return self.mlp(hidden_states, mask=None) * weights[0]
"""


def structure(source):
    return structure_of_source(ast.parse(source).body[0])


SAME = {
    "names": PLAIN.replace("hidden_states", "x").replace("weights:", "ws:").replace("* weights[", "* ws[").replace(" w ", " v ")
    .replace("[w *", "[v *"),
    "annotations": PLAIN.replace(": torch.Tensor", "").replace(" -> torch.Tensor", "").replace(": list[float]", ""),
    "declarations": PLAIN.replace("    total: int\n", ""),
    "docstring and comments": PLAIN.replace("'''Scales.'''", "'''Or not.'''").replace("# A comment.", ""),
    "decorators and the function's name": "@torch.no_grad()\n" + PLAIN.strip().replace("def forward", "def call"),
    "parentheses": PLAIN.replace("self.mlp(", "(\n self.mlp(").replace("* weights[0]", "\n * weights[0])"),
}
OTHER = {
    "another attribute": PLAIN.replace("self.mlp", "self.norm"),
    "another operator": PLAIN.replace(") * w", ") + w"),
    "another number": PLAIN.replace("[0]", "[1]"),
    "another default": PLAIN.replace("1.0", "2.0"),
    "another keyword": PLAIN.replace("mask=", "bias="),
    "an argument that is a constant": PLAIN.replace("mask=None", "mask=False"),
    "operands swapped": PLAIN.replace("w * scale", "scale * w"),
    "another variable of those": PLAIN.replace("self.mlp(hidden_states", "self.mlp(scale"),
    "a statement more": PLAIN.replace("    # A comment.", "    weights.sort()"),
    "an argument more": PLAIN.replace(" = 1.0)", " = 1.0, *args)"),
    "an argument by name only": PLAIN.replace("scale: float", "*, scale: float"),
    "a global of another name": PLAIN.replace("[0]", "[first]"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_no_part_of_a_structure(name):
    assert SAME[name].strip() != PLAIN.strip()
    assert structure(SAME[name]) == structure(PLAIN)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_part_of_a_structure(name):
    assert structure(OTHER[name]) != structure(PLAIN)


def test_structures_of_functions_without_source():
    assert structure_of(torch.add) is None and structure_of(len) is None
    assert structure_of(eval("lambda x: x")) is None


def test_every_rule_knows_its_home_in_the_installed_libraries(capsys):
    """And the class that it finds there by reading is the one that it finds by importing."""
    unknown = () if ATTENTION_IS_KNOWN else ("gpt2-attention", "t5-attention")
    assert main(["check-sources"]) == bool(unknown)
    printed = capsys.readouterr().out
    for rule in (rule for rule in RULES if rule.name not in unknown):
        structures = {structure for version in RULES if version.name == rule.name for structure in version.structures}
        for home in rule.homes:
            library = home.split(".")[0]
            if library not in sources.LIBRARIES or not installed(library):
                continue
            assert f"{library} {importlib.metadata.version(library)}" in printed
            assert sources.structure_at(home) in structures
            assert any(home.rsplit(".", 1)[1] in line for line in printed.splitlines() if rule.name in line)
            if library == "transformers":
                module, name = home.rsplit(".", 1)
                forward = getattr(importlib.import_module(module), name).forward
                assert structure_of(innermost(forward)) in structures


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An installed transformers of another version, of one file."""
    folder = tmp_path / "transformers" / "models" / "swin"
    folder.mkdir(parents=True)
    original = sources._file("transformers.models.swin.modeling_swin").read_text()
    monkeypatch.setattr(sources, "_folder", lambda name: tmp_path / "transformers" if name == "transformers" else None)
    return folder / "modeling_swin.py", original


def test_a_home_that_has_changed_or_gone(library, capsys):
    path, original = library
    path.write_text(original)
    assert main(["check-sources"]) == 1
    printed = capsys.readouterr().out
    assert "swin                     SwinLayer\n" in printed and "timm: not installed" in printed
    assert "transformers.models.beit.modeling_beit.BeitLayer is not there" in printed
    path.write_text(original.replace("shortcut + self.drop_path(", "shortcut - self.drop_path("))
    assert main(["check-sources"]) == 1
    assert "SwinLayer is not known: structure " in capsys.readouterr().out


def test_structures_by_name(capsys):
    name = "transformers.models.swin.modeling_swin.SwinLayer"
    assert main(["check-sources", name]) == 0
    structure, printed = capsys.readouterr().out.split()
    assert printed == name and rules_for(structure).name == "swin"
    assert main(["check-sources", "transformers.nothing.Here"]) == 1
    assert capsys.readouterr().out == "not found     transformers.nothing.Here\n"
