"""What is a number: all that torch's own methods take as one, read as they read it, and refused as they refuse it."""

import enum
import sys
import types
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import safe_inplace as si

from .checks import Untouched, assert_bit_equal


class Float(float):
    pass


class Int(int):
    pass


class Complex(complex):
    pass


class Level(enum.IntEnum):
    TWO = 2


class Truth(int):
    """Not a bool, whatever it says."""

    def __bool__(self):
        return False


class WithFloat:
    def __float__(self):
        return 2.0


class WithIndex:
    def __index__(self):
        return 2


class WithComplex:
    def __complex__(self):
        return 2j


def symbol(value):
    """A number of a tracer that knows its value."""
    source = torch._dynamo.source.ConstantSource("n")
    environment = ShapeEnv()
    if isinstance(value, int):
        name = environment.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC)
        return environment.create_symintnode(name, hint=value, source=source)
    name = environment.create_unspecified_symbol(value, source, DimDynamic.DYNAMIC)
    return torch.SymFloat(SymNode(name, environment, float, value))


VALUES = {
    "int": 2,
    "float": 0.3,
    "complex": 2 + 3j,
    "real complex": 2 + 0j,
    "bool": True,
    "float subclass": Float(0.3),
    "int subclass": Int(2),
    "odd int subclass": Truth(2),
    "complex subclass": Complex(2, 3),
    "IntEnum": Level.TWO,
    "inf": float("inf"),
    "nan": float("nan"),
    "1e300": 1e300,
    "2^53+1": 2**53 + 1,
    "2^63-1": 2**63 - 1,
    "2^63": 2**63,
    "2^64-1": 2**64 - 1,
    "2^64": 2**64,
    "10^400": 10**400,
    "-2^63": -(2**63),
    "-2^63-1": -(2**63) - 1,
    "int subclass 2^63": Int(2**63),
    "int subclass 2^70": Int(2**70),
    **{
        name: getattr(np, name)(2)
        for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "intc", "longlong", "ulonglong")
    },
    "uint64 2^63": np.uint64(2**63),
    **{name: getattr(np, name)(0.3) for name in ("float16", "float32", "float64", "longdouble")},
    **{name: getattr(np, name)(0.5) for name in ("complex64", "complex128", "clongdouble")},
    "np.True_": np.True_,
    "np.False_": np.False_,
    "np.longdouble inf": np.longdouble("inf"),
    "np.datetime64": np.datetime64(2, "s"),
    "np.timedelta64": np.timedelta64(2, "s"),
    "np.str_": np.str_("2"),
    "np.bytes_": np.bytes_(b"2"),
    "np.void": np.void(b"22"),
    "0-dim array": np.array(2.0),
    "array": np.array([2.0]),
    "__float__": WithFloat(),
    "__index__": WithIndex(),
    "__complex__": WithComplex(),
    "Decimal": Decimal(2),
    "Fraction": Fraction(2),
    "None": None,
    "str": "2",
}

SYMBOLS = {"SymInt": (symbol(3), 3), "SymFloat": (symbol(0.25), 0.25), "SymBool": (symbol(3) == 3, True)}

TENSORS = {
    "float32": torch.tensor(0.3),
    "float16": torch.tensor(0.3, dtype=torch.float16),
    "float64": torch.tensor(0.3, dtype=torch.float64),
    "float8": torch.tensor(0.3).to(torch.float8_e4m3fn),
    "int64": torch.tensor(2),
    "uint8": torch.tensor(2, dtype=torch.uint8),
    "uint64": torch.tensor(2**63, dtype=torch.uint64),
    "bool": torch.tensor(True),
    "complex64": torch.tensor(2 + 3j),
    "real complex64": torch.tensor(2 + 0j),
    "conjugated": torch.tensor(2 + 3j).conj(),
    "a leaf": torch.tensor(0.3, requires_grad=True),
    "a parameter": torch.nn.Parameter(torch.tensor(0.3)),
    "with history": torch.tensor(0.3, requires_grad=True) * 1,
    "detached": torch.tensor(0.3, requires_grad=True).detach(),
    "of one dim": torch.tensor([0.3]),
    "of two dims": torch.ones(1, 1),
    "of three elements": torch.ones(3),
    "on meta": torch.tensor(0.3, device="meta"),
    "sparse": torch.tensor(0.3).to_sparse(),
}

# name -> our call, torch's call; x and y are two tensors, v the value in question


def wide(y):
    """torch 2.14 has a complex dtype of bfloat16 parts, and does not refuse to write it to real numbers."""
    return y.float() if y.dtype is torch.bfloat16 else y


CALLS = {
    "add_ other": (lambda x, y, v: si.add_(x, v), lambda x, y, v: x.add_(v)),
    "add_ other, alpha": (lambda x, y, v: si.add_(x, v, alpha=2), lambda x, y, v: x.add_(v, alpha=2)),
    "mul_ other": (lambda x, y, v: si.mul_(x, v), lambda x, y, v: x.mul_(v)),
    "add_mul_ other": (lambda x, y, v: si.add_mul_(x, v, y), lambda x, y, v: x.add_(v).mul_(y)),
    "add_mul_ scale": (lambda x, y, v: si.add_mul_(x, y, v), lambda x, y, v: x.add_(y).mul_(v)),
    "mul_add_ scale": (lambda x, y, v: si.mul_add_(x, v, y), lambda x, y, v: x.mul_(v).add_(y)),
    "mul_add_ shift": (lambda x, y, v: si.mul_add_(x, y, v), lambda x, y, v: x.mul_(y).add_(v)),
    "addcmul_ tensor1": (lambda x, y, v: si.addcmul_(x, v, y), lambda x, y, v: x.add_(wide(y).mul(v))),
    "addcmul_ tensor2": (lambda x, y, v: si.addcmul_(x, y, v), lambda x, y, v: x.add_(wide(y).mul(v))),
    "addcmul_ both": (lambda x, y, v: si.addcmul_(x, v, True), lambda x, y, v: x.add_(v)),
}
PARAMETERS = {
    "alpha": (lambda x, y, v: si.add_(x, y, alpha=v), lambda x, y, v: x.add_(y, alpha=v)),
    "alpha beside a number": (lambda x, y, v: si.add_(x, 1, alpha=v), lambda x, y, v: x.add_(1, alpha=v)),
    "value": (lambda x, y, v: si.addcmul_(x, y, y, value=v), lambda x, y, v: x.addcmul_(y, y, value=v)),
}
# Not fused: as torch to the last bit.
EXACT = [CALLS[name][0] for name in ("add_ other", "add_ other, alpha", "mul_ other")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool]

# torch's, for NumPy's complex numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Casting complex values to real")


def outcome(call, x, y, value):
    try:
        return call(x, y, value)
    except Exception as error:
        return error


def make(dtype):
    return torch.tensor([1, 0, 1], dtype=dtype), torch.tensor([1, 1, 0], dtype=dtype)


def same_outcome(calls, dtype, value, plain=None):
    """As torch with the same value, or with the plain one."""
    ours, theirs = calls
    (x, y), (x_theirs, y_theirs) = make(dtype), make(dtype)
    expected = outcome(theirs, x_theirs, y_theirs, value if plain is None else plain)
    if isinstance(expected, Exception):
        with Untouched(x, y), pytest.raises(type(expected)) as caught:
            ours(x, y, value)
        assert type(caught.value) is type(expected)
    else:
        assert ours(x, y, value) is x
        if ours in EXACT:
            assert_bit_equal(x, expected)
        else:
            # torch's steps may give no number where the fused form, without their intermediate products, gives one.
            there = ~expected.isnan()
            torch.testing.assert_close(x[there], expected[there])


@pytest.mark.parametrize("call", CALLS | PARAMETERS)
@pytest.mark.parametrize("value", VALUES)
def test_numbers_are_those_of_torch(value, call):
    for dtype in DTYPES:
        same_outcome((CALLS | PARAMETERS)[call], dtype, VALUES[value])


@pytest.mark.parametrize("call", PARAMETERS)
@pytest.mark.parametrize("value", TENSORS)
def test_a_tensor_as_parameter(value, call):
    """Its value is read where torch reads it; a gradient is not lost."""
    for dtype in DTYPES:
        same_outcome(PARAMETERS[call], dtype, TENSORS[value])


@pytest.mark.parametrize("call", CALLS | PARAMETERS)
@pytest.mark.parametrize("symbol", SYMBOLS)
def test_symbols_have_their_values(symbol, call):
    """Beside a tensor that is no tracer's. torch's methods put a number of their own in the place of some."""
    for dtype in DTYPES:
        same_outcome((CALLS | PARAMETERS)[call], dtype, *SYMBOLS[symbol])


@pytest.mark.parametrize("numpy", [None, types.ModuleType("numpy")])
def test_numbers_without_numpy(numpy, monkeypatch):
    """None keeps a module from being imported; another may be there in part."""
    monkeypatch.setitem(sys.modules, "numpy", numpy)
    assert torch.equal(si.mul(torch.ones(2), 1j), torch.ones(2) * 1j)
    with pytest.raises(TypeError, match="mul"):
        si.mul(torch.ones(2), "a")


def test_the_imaginary_part_is_kept():
    """torch reads NumPy's complex numbers of other widths than Python's as floats, and warns."""
    for type in (np.complex64, np.complex128, np.clongdouble):
        x, y = make(torch.complex64)
        assert torch.equal(si.mul_(x, type(2 + 3j)), make(torch.complex64)[0] * (2 + 3j))
        assert torch.equal(si.add_(x.zero_(), y, alpha=type(2 + 3j)), y * (2 + 3j))
        x, y = make(torch.float32)
        with Untouched(x), pytest.raises(RuntimeError, match="can't be cast"):
            si.mul_(x, type(2 + 3j))
        with Untouched(x), pytest.raises(RuntimeError, match="complex"):
            si.add_(x, y, alpha=type(2 + 3j))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Asked(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


WIDE = {name: VALUES[name] for name in ("2^63", "2^64-1", "2^64", "longdouble", "np.True_", "IntEnum", "None")}


@pytest.mark.parametrize("mode", [Dispatched, Asked], **{"ids": lambda mode: mode.__name__})
@pytest.mark.parametrize("call", CALLS | PARAMETERS)
@pytest.mark.parametrize("value", WIDE)
def test_numbers_under_a_mode(value, call, mode):
    for dtype in (torch.float32, torch.int64):
        with mode():
            same_outcome((CALLS | PARAMETERS)[call], dtype, WIDE[value])


@pytest.mark.parametrize("value", [2**63, 2**64 - 1, np.longdouble(0.3), np.complex64(0.5), torch.tensor(0.3)], ids=repr)
def test_gradients_beside_a_number(value):
    """As torch's, but for the alpha that its own add_ takes and refuses in backward: there as with a tensor of that value."""

    def gradients(call):
        x, y = (t.clone().requires_grad_() for t in make(torch.float64))
        total = call(x * 1, y, value).square().sum()
        try:
            return torch.autograd.grad(total, (x, y), materialize_grads=True, allow_unused=True)
        except RuntimeError as error:
            return str(error)

    for ours, theirs in (PARAMETERS if isinstance(value, torch.Tensor) else CALLS | PARAMETERS).values():
        expected = gradients(theirs)
        if isinstance(expected, str):
            assert theirs is PARAMETERS["alpha"][1], expected
            expected = gradients(lambda x, y, number: x.add_(y * float(number)))
        torch.testing.assert_close(gradients(ours), expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("value", ["2^63", "IntEnum", "float32", "longdouble", "tensor"])
def test_compiled_numbers(value):
    number = torch.tensor(0.3) if value == "tensor" else VALUES[value]
    for ours, theirs in (CALLS | PARAMETERS).values():
        x, y = make(torch.float64)
        torch._dynamo.reset()
        try:
            expected = torch.compile(theirs, backend="aot_eager")(x.clone(), y, number)
        except Exception as error:
            torch._dynamo.reset()
            with pytest.raises(type(error)):
                torch.compile(ours, backend="aot_eager")(x, y, number)
            continue
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(ours, backend="aot_eager")(x, y, number), expected)
