"""What a run records of its first steps, and that the program is none the wiser."""

import dataclasses
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from safe_inplace._advise.steps import Record, _Counted, counted


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    """Of the process: those of other tests stay."""
    for name in ("passes", "calls"):
        monkeypatch.setattr(_Counted, name, 0)


class Gives(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self):
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value() if callable(self.value) else self.value


def recorded(run):
    record = Record()
    with counted(record):
        run()
    return record


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    more: list


@dataclasses.dataclass(slots=True)
class Slots:
    logits: torch.Tensor
    whole: object = None
    unset: object = dataclasses.field(init=False)


def cyclic():
    output = Slots(torch.ones(2))
    output.whole = [output]
    return output


KEPT = {
    "a tensor": (lambda: torch.ones(2), 1),
    "in a container": (lambda: {"a": [torch.ones(2)], "b": (torch.zeros(1), None)}, 2),
    "in an object": (lambda: Output(torch.ones(2), [Output(torch.ones(3), [])]), 2),
    "in one with slots, that holds itself": (cyclic, 1),
    "sparse": (lambda: torch.eye(2).to_sparse(), 1),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), 1),
    "on no device": (lambda: torch.ones(2, device="meta"), 0),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), 0),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), 0),
    "no tensor": (lambda: "text", 0),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("value, number", KEPT.values(), ids=KEPT)
def test_what_is_kept(value, number):
    (call,) = recorded(Gives(value)).calls
    assert [name for name, _ in call] == [f"output {i}" for i in range(number)]


def test_what_a_transform_wraps():
    assert recorded(lambda: torch.func.vmap(nn.Linear(2, 2))(torch.ones(3, 2))).calls == [[]]


def test_an_expanded_tensor_stays_small():
    ((_, kept),) = recorded(Gives(lambda: torch.arange(3.0).expand(1 << 40, 3))).calls[0]
    assert kept.shape == (1, 3)


def test_modes_do_not_see_it():
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    value = torch.ones(2)
    with Log():
        assert len(recorded(Gives(value)).calls) == 1
    assert seen == []


class Stop(BaseException):
    pass


def test_only_outermost_calls_are_steps_however_others_end():
    inner = Gives(torch.ones(1))
    outer = Gives(lambda: torch.cat([inner() for _ in range(3)]))

    def run():
        for stop in (Stop(), ValueError()):
            with pytest.raises(type(stop)):
                Gives(lambda: Gives(stop)())()
        outer()
        thread = threading.Thread(target=outer)
        thread.start()
        thread.join()

    record = recorded(run)
    assert len(record.calls) == len(record.ends["calls"]) == 2
