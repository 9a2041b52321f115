"""Guard around the trainers that people use, by the lines of docs/trainers.md."""

import re
from pathlib import Path

import pytest
import torch

from safe_inplace import HazardError

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "trainers.md"
SECTIONS = dict(re.findall(r"^## (\w+)\n.*?^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))
GIVEN = "import safe_inplace\nimport torch\n"


class Net(torch.nn.Module):
    """Harmful where it is told to be."""

    def __init__(self, write):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.write = write

    def forward(self, x):
        h = self.linear(x) * 2
        y = h * h
        self.write(h)
        return {"loss": y.sum()}


def harmless(h):
    pass


def noticed(h):
    h.mul_(2)


def silent(h):
    h.data.mul_(2)


def train(trainer, write, folder):
    torch.manual_seed(0)
    model = Net(write)
    names = {"model": model, "examples": [{"x": torch.randn(4)} for _ in range(8)], "folder": str(folder)}
    exec(compile(GIVEN + SECTIONS[trainer], str(PAGE), "exec"), names)
    return [parameter.detach().clone() for parameter in model.parameters()]


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(params=SECTIONS)
def trainer(request):
    pytest.importorskip(request.param.lower())
    return request.param


def test_the_page_has_them_all():
    assert list(SECTIONS) == ["transformers", "accelerate", "Lightning"]


@pytest.mark.parametrize("write", [noticed, silent])
def test_the_line_of_the_user_is_named(trainer, write, tmp_path):
    with pytest.raises(HazardError) as caught:
        train(trainer, write, tmp_path)
    hazard = caught.value.hazard
    first = write.__code__.co_firstlineno
    assert (hazard.mutation.filename, hazard.mutation.lineno) == (__file__, first + 1)
    assert hazard.save.filename == __file__ and hazard.save.source == "y = h * h"
    # The error has closed the guard: this would be stopped.
    h = torch.ones(3, requires_grad=True).exp()
    h.mul_(2)


def test_a_right_model_trains_as_without(trainer, tmp_path, monkeypatch):
    under = train(trainer, harmless, tmp_path)
    monkeypatch.setitem(SECTIONS, trainer, SECTIONS[trainer].replace("with safe_inplace.guard():", "if True:"))
    without = train(trainer, harmless, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(under, without, strict=True))
