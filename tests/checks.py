"""Comparisons whose tolerances follow from the dtype alone, and measuring devices."""

from __future__ import annotations

import torch

from .layouts import OPMATH, storage_bytes, whole_storage


def as_real(tensor):
    tensor = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def assert_bit_equal(actual, expected):
    """Equal to the last bit, the sign of zero included; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    actual, expected = as_real(actual), as_real(expected)
    if actual.dtype.is_floating_point:
        both_nan = actual.isnan() & expected.isnan()
        same = (actual == expected) & (actual.signbit() == expected.signbit())
        same |= both_nan
    else:
        same = actual == expected
    if not same.all():
        where = tuple(i.item() for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{(~same).sum().item()} of {same.numel()} elements differ; first at {where}: "
            f"{actual[where].item()!r} instead of {expected[where].item()!r}"
        )


def assert_storage_bit_equal(actual, expected):
    """The views and everything around them in their storages."""
    assert_bit_equal(actual, expected)
    assert_bit_equal(whole_storage(actual), whole_storage(expected))


def assert_rounded_once(actual, exact, magnitude, steps=3):
    """`actual` is `exact` computed in the opmath type and rounded once to its own dtype.

    The rounding to the dtype costs half an ulp of the result (a whole one is allowed, for
    a tie that the opmath error turns); each step in the opmath type half an ulp of what
    it handles, which `magnitude` bounds.
    """
    assert actual.shape == exact.shape
    opmath = torch.finfo(OPMATH[actual.dtype])
    own = torch.finfo(actual.dtype)
    if actual.is_complex():
        steps *= 3
    actual, exact = actual.to(exact.dtype), exact.to(exact.dtype)
    bound = own.eps * exact.abs() + steps * opmath.eps * magnitude
    bound = bound + own.tiny * own.eps
    error = (actual - exact).abs()
    finite = exact.abs() <= own.max
    bad = finite & ~(error <= bound)
    if bad.any():
        where = tuple(i.item() for i in bad.nonzero()[0])
        raise AssertionError(
            f"{bad.sum().item()} of {bad.numel()} elements off; first at {where}: "
            f"{actual[where].item()!r} instead of {exact[where].item()!r}, "
            f"error {error[where].item():.3g} above {bound[where].item():.3g}"
        )


def grad_tolerance(dtype, terms=1):
    """Relative tolerance for a gradient in `dtype` that sums `terms` products.

    The sum is taken in the opmath type, whose error grows with the number of terms at
    worst; the result is rounded to the dtype once, after the incoming gradient and the
    saved value have been.
    """
    return 4 * torch.finfo(dtype).eps + terms * torch.finfo(OPMATH[dtype]).eps


def assert_close(actual, expected, rtol):
    """Close relative to the largest value: sums of signed terms have no elementwise scale."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    scale = expected.abs().max().clamp_min(1.0)
    error = (actual - expected).abs().max()
    assert error <= rtol * scale, f"off by {error.item():.3g} at scale {scale.item():.3g}"


class Untouched:
    """Asserts on leaving that neither data nor version of the tensors changed."""

    def __init__(self, *tensors):
        tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
        self.tensors = [t for t in tensors if t.device.type != "meta"]

    def __enter__(self):
        self.before = [(storage_bytes(t), t._version) for t in self.tensors]

    def __exit__(self, *exc):
        if exc[0] is not None:
            return
        for tensor, (data, version) in zip(self.tensors, self.before, strict=True):
            assert torch.equal(storage_bytes(tensor), data), "data changed"
            assert tensor._version == version, "version changed"


class Saved:
    """What the graph saves while this is entered."""

    def __enter__(self):
        self.tensors = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def _pack(self, tensor):
        self.tensors.append(tensor.detach())
        return tensor

    def __exit__(self, *exc):
        self._hooks.__exit__(*exc)

    @property
    def bytes(self):
        """Each region of memory once, however often it is saved."""
        regions = {(t.data_ptr(), t.numel() * t.element_size()) for t in self.tensors if t.numel()}
        return sum(size for _, size in regions)


class Memory:
    """Allocations on the CPU while this is entered: `peak` above the start, and `sizes`."""

    def __enter__(self):
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *exc):
        self._profile.__exit__(*exc)
        events = self._profile.profiler.kineto_results.events()
        steps = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        self.steps = [size for _, size in sorted(steps, key=lambda step: step[0])]
        level = 0
        self.peak = 0
        for size in self.steps:
            level += size
            self.peak = max(self.peak, level)

    def allocations(self, at_least):
        return [size for size in self.steps if size >= at_least]
