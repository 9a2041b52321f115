"""Where in a network a report says that it happened: the module, the parameter, and who called an installed package."""

import gc
import importlib
import json
import sys
import textwrap
import weakref

import pytest
import torch
from torch import nn

from safe_inplace import HazardError, guard


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gate = nn.Sigmoid()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.gate(self.fc(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Mlp() for _ in range(3)))
        for block in self.blocks[:2]:
            block.act = nn.Identity()

    def forward(self, x):
        return self.blocks(x)


def report(function, mode="raise"):
    with pytest.raises(HazardError) as caught, guard(mode):
        function()
    return caught.value


def test_the_module_of_the_write_and_of_the_save():
    net = Net()
    error = report(lambda: net(torch.randn(2, 4)))
    assert error.mutation.module == "blocks.2.act: ReLU(inplace=True)"
    assert error.save.module == "blocks.2.gate: Sigmoid()"
    for words in (error.mutation.module, error.save.module):
        assert f"    in {words}\n" in str(error)
    found = json.loads(json.dumps(error.hazard.as_dict()))
    assert found["mutation"]["module"] == error.mutation.module and found["save"]["module"] == error.save.module


def test_two_of_one_line_of_sequential_are_told_apart():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.ReLU(inplace=True))
    error = report(lambda: net(torch.randn(2, 4)))
    assert error.mutation == error.save
    assert (error.mutation.module, error.save.module) == ("2: ReLU(inplace=True)", "1: Sigmoid()")


def test_a_function_that_a_module_calls_and_the_module_itself():
    def gated(x):
        h = x * 2
        y = h * h
        h.mul_(2)
        return y

    class Own(nn.Module):
        def forward(self, x):
            return gated(x)

    own = Own()
    error = report(lambda: own(torch.ones(2, requires_grad=True)))
    assert error.mutation.module == error.save.module == "Own"  # nothing holds it
    wrapped = nn.ModuleDict({"inner": nn.ModuleList([own])})
    error = report(lambda: own(torch.ones(2, requires_grad=True)))
    assert error.mutation.module == error.save.module == "inner.0: Own"
    wrapped["inner"] = nn.ModuleList()
    error = report(lambda: own(torch.ones(2, requires_grad=True)))
    assert error.save.module == "Own"
    error = report(lambda: gated(torch.ones(2, requires_grad=True)))
    assert error.mutation.module is None and error.save.module is None
    assert "\n    in " not in str(error)


def test_the_name_of_the_parameter():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def program():
        loss = net(torch.randn(2, 4, requires_grad=True)).sum()
        net(torch.randn(2, 4)).sum().backward()
        with torch.no_grad():
            net[1].weight.mul_(0.5)
        optimizer.step()
        loss.backward()

    error = report(program)
    assert error.parameter == "1.weight" and "parameter 1.weight" in str(error)
    assert error.hazard.as_dict()["parameter"] == "1.weight"
    assert error.save.module.startswith("1: Linear(")

    leaf = torch.ones(2, requires_grad=True)

    def of_no_module():
        y = torch.ones(2, requires_grad=True) * leaf
        leaf.data.mul_(2)
        y.sum().backward()

    assert report(of_no_module).parameter is None


@pytest.fixture
def installed(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    source = """
    def gated(x):
        h = x * 2
        y = h * h
        return h, y

    def halve(h):
        h.mul_(0.5)
    """
    (folder / "somebodys_layers.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("somebodys_layers")
    sys.modules.pop("somebodys_layers")


def test_the_line_that_led_into_an_installed_package(installed):
    def program():
        h, y = installed.gated(torch.ones(2, requires_grad=True))
        installed.halve(h)
        return y

    error = report(program)
    for site, line, words in (
        (error.mutation, "h.mul_(0.5)", "installed.halve(h)"),
        (error.save, "y = h * h", "h, y = installed.gated(torch.ones(2, requires_grad=True))"),
    ):
        assert site.filename == installed.__file__ and site.source == line
        assert site.caller.filename == __file__ and site.caller.source == words
        assert f"called from {site.caller}" in str(error) and words in str(error)
    assert error.hazard.as_dict()["save"]["caller"]["source"] == error.save.caller.source

    def directly():
        h = torch.ones(2, requires_grad=True) * 2
        y = h * h
        h.mul_(2)
        return y

    error = report(directly)
    assert error.save.caller is None and "called from" not in str(error)


def test_pairs_of_lines_are_counted_as_before():
    net = nn.Sequential(*(nn.Sequential(nn.Sigmoid(), nn.ReLU(inplace=True)) for _ in range(3)))
    with guard("copy") as watched:
        net(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert (len(watched.hazards), watched.hazards_seen) == (1, 3)


def test_what_is_saved_does_not_hold_the_module():
    def output():
        with guard():
            return Net().blocks[0](torch.randn(2, 4))

    y = output()
    gc.collect()
    assert y.requires_grad and not [m for m in gc.get_objects() if type(m) is Mlp]
    net = Net()
    gone = weakref.ref(net.blocks[0])
    with guard():
        y = net.blocks[0](torch.randn(2, 4))
        net = None
        assert gone() is None
        with pytest.raises(HazardError) as caught:
            y.mul_(2)
    assert caught.value.save.module is None
