"""Steps of real models: plain, with torch's own best, with the ops in place, and patched as a user would."""

from __future__ import annotations

import copy
import gc
import statistics
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import safe_inplace
from safe_inplace.nn import functional as forms

from .families import Family, Scale
from .measure import cuda_samples, interval_of_median, peak_of, quantiles, trace
from .results import IN_PLACE, PATCHED, PLAIN, TORCH, WAYS, StepRow
from .runner import Effort, in_turns

# As versions of torch call it.
COPY_SLICES = ("CopySlices", "torch::autograd::CopySlices")

# What a model's sums and products are to the profiler, forward and backward.
SUMS = ("aten::add", "aten::add_", "aten::mul", "aten::mul_", "aten::sum")

Clock = Callable[[], float]


def _may_write(target: Any, *operands: Any) -> bool:
    """Whether a result may be written over `target`, a temporary: of its shape and dtype, and saved by no node."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    return (
        target.dtype == reduce(torch.promote_types, [tensor.dtype for tensor in tensors], target.dtype)
        and target.shape == torch.broadcast_shapes(target.shape, *(tensor.shape for tensor in tensors))
        and (not torch.is_grad_enabled() or target._use_count() == 1)
    )


def _in_place(name: str) -> Callable[..., Tensor]:
    write, make = getattr(safe_inplace, f"{name}_"), getattr(safe_inplace, name)
    return lambda *operands: (write if _may_write(*operands) else make)(*operands)


def _torch_add(branch: Tensor, other: Tensor) -> Tensor:
    # A view's gradient would go through CopySlices.
    own = not (torch.is_grad_enabled() and branch._is_view())
    return branch.add_(other) if own and _may_write(branch, other) else branch + other


def _torch_mul_add(branch: Tensor, scale: Any, shift: Tensor) -> Tensor:
    if not isinstance(scale, Tensor):
        return torch.add(shift, branch, alpha=scale)
    if not torch.is_grad_enabled() and _may_write(branch, scale, shift):
        return torch.addcmul(shift, branch, scale, out=branch)
    return torch.addcmul(shift, branch, scale)


# Each takes the branch first, which nobody else has.
OPS = {
    TORCH: SimpleNamespace(add=_torch_add, mul_add=_torch_mul_add),
    IN_PLACE: SimpleNamespace(add=_in_place("add"), mul_add=_in_place("mul_add")),
}


@contextmanager
def other_ops(ops: SimpleNamespace) -> Iterator[None]:
    """The rules compute with these instead, and hand them the branch first."""
    before = forms.ops, forms.scaled_residual
    forms.ops, forms.scaled_residual = ops, lambda *args, **options: before[1](*args, **options | {"branch_first": True})
    try:
        yield
    finally:
        forms.ops, forms.scaled_residual = before


def prepare(model: nn.Module, family: Family, way: str) -> tuple[nn.Module, int]:
    """The model for a way, and how many blocks of it run another forward."""
    if way == PLAIN:
        return model, 0
    model = copy.deepcopy(model)
    if family.tried is None:
        return model, len(safe_inplace.patch(model, strict=True).replaced)
    name, forward = family.tried
    blocks = [module for module in model.modules() if type(module).__name__ == name]
    for block in blocks:
        block.forward = MethodType(forward, block)
    return model, len(blocks)


def first_tensor(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else next(iter(outputs.values() if isinstance(outputs, dict) else outputs))


def make_step(model: nn.Module, inputs: dict[str, Any], way: str, dtype: str, train: bool, device: torch.device) -> Callable:
    def step() -> Tensor:
        """The output. Gradients are replaced, as after `zero_grad(set_to_none=True)`."""
        for parameter in model.parameters():
            parameter.grad = None
        autocast = torch.autocast(device.type, torch.bfloat16) if dtype == "autocast" else nullcontext()
        swapped = other_ops(OPS[way]) if way in OPS else nullcontext()
        with torch.set_grad_enabled(train), swapped:
            with autocast:
                output = first_tensor(model(**inputs))
            if train:
                output.square().mean().backward()
        return output.detach()

    return step


def assert_same(ours: list[Tensor], plain: list[Tensor], dtype: str) -> None:
    """The output and the gradients. Rounding may drift by some steps of the narrower dtype, a wrong formula does more."""
    relative = 1e-4 if dtype == "float32" else 5e-2
    largest = max((gradient.abs().max().item() for gradient in plain[1:] if gradient.numel()), default=0)
    sizes = [plain[0].abs().max().item()] + [largest] * (len(plain) - 1)
    for one, other, size in zip(ours, plain, sizes, strict=True):
        torch.testing.assert_close(one, other, rtol=relative, atol=relative * size)


def largest_input(model: nn.Module, step: Callable[[], Any], blocks: list[str]) -> int:
    """Bytes of the largest tensor that goes into one of these blocks."""
    sizes = [0]

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        sizes.extend(value.nbytes for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    hooks = [model.get_submodule(path).register_forward_pre_hook(look, with_kwargs=True) for path in blocks]
    step()
    for hook in hooks:
        hook.remove()
    return max(sizes)


def one_sample(step: Callable[[], Any], device: torch.device, clock: Clock, seconds: float) -> list[float]:
    """Of a turn: in each round all ways are compared once. On a GPU the time is the device's, whatever the clock."""
    if device.type == "cuda":
        return [statistics.median(cuda_samples(lambda clock: None, lambda state: step(), seconds))]
    timer, times = timeit.Timer(step, timer=clock), []
    while sum(times) < seconds or not times:
        times.append(timer.timeit(1))
    return [statistics.median(times)]


def on_device(events: list[dict[str, Any]]) -> tuple[float, int, int]:
    """Seconds in kernels, how many there were, and how many copies within the device."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy" and "DtoD" in event["name"]]
    return sum(event["dur"] for event in kernels) / 1e6, len(kernels), len(copies)


def share_of_sums(events: list[dict[str, Any]]) -> float:
    """Of the time in operators, that in sums and products: no other way to write these can save more."""

    def seconds(events: list[dict[str, Any]]) -> float:
        """What runs inside of another of them is counted once."""
        total, end = 0.0, dict[int, float]()
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            if event["ts"] >= end.get(event["tid"], 0):
                end[event["tid"]] = event["ts"] + event["dur"]
                total += event["dur"]
        return total

    operators = [event for event in events if event.get("cat") == "cpu_op"]
    return seconds([event for event in operators if event["name"] in SUMS]) / seconds(operators)


def run_step(
    family: Family, scale: Scale, dtype: str, mode: str, device: torch.device, effort: Effort, clock: Clock = time.perf_counter
) -> list[StepRow]:
    train = mode == "train"
    number = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    # As many bytes in either dtype.
    scale = Scale(scale.batch * 4 // number.itemsize, scale.side, scale.width, scale.depth)
    plain = family.make(scale).to(device, number).train(train)
    inputs = {
        name: value.to(device, number if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in family.inputs(scale).items()
    }
    steps: dict[str, Callable[[], Tensor]] = {}
    seen: dict[str, dict[str, Any]] = {}
    expected: list[Tensor] = []
    size = 0
    for way in WAYS:
        model, replaced = prepare(plain, family, way)
        steps[way] = step = make_step(model, inputs, way, dtype, train, device)
        torch.manual_seed(1)
        safe_inplace.reset_counts()
        result = step()
        takeovers = safe_inplace.counts()["result.taken over"]
        found = [result, *(p.grad for p in model.parameters() if p.grad is not None)]
        expected = expected or found
        assert_same(found, expected, dtype)
        on_cuda = device.type == "cuda"
        events = trace(step, device=on_cuda)
        seen[way] = {
            "replaced": replaced,
            "peak": peak_of(events, device),
            "takeovers": takeovers,
            "copyslices": sum(event["name"] in COPY_SLICES for event in events),
        }
        kernels = on_device(events) if on_cuda else (None, None, None)
        seen[way] |= dict(zip(("kernel_time", "launches", "copies"), kernels, strict=True))
        seen[way]["sums"] = None if on_cuda else share_of_sums(events)
        if way == PATCHED:
            known = safe_inplace.explain(plain).replaced
            size = largest_input(plain, steps[PLAIN], _blocks(plain, family, [path for path, _ in known]))
    samplers = {way: partial(one_sample, step, device, clock) for way, step in steps.items()}
    samples = in_turns(samplers, effort)
    rows = []
    for way, times in samples.items():
        ratios = [theirs / ours for theirs, ours in zip(samples[PLAIN], times, strict=True)]
        low, high = interval_of_median(ratios)
        rows.append(
            StepRow(
                family.name,
                family.version,
                dtype,
                mode,
                way,
                size,
                *quantiles(times),
                statistics.median(ratios),
                low,
                high,
                len(ratios),
                **seen[way],
            )
        )
    return rows


def _blocks(model: nn.Module, family: Family, known: list[str]) -> list[str]:
    if family.tried is None:
        return known
    return [path for path, module in model.named_modules() if type(module).__name__ == family.tried[0]]


def cases(families: list[Family], dtypes: tuple[str, ...], modes: tuple[str, ...]) -> list[tuple[Family, str, str]]:
    """A run that is cut short has measured every model in the first dtype before one in the next."""
    return [(family, dtype, mode) for dtype in dtypes for family in families if family.installed for mode in modes]


def run(
    wanted: list[tuple[Family, str, str]], scale: Scale, device: torch.device, effort: Effort, clock: Clock
) -> Iterator[list[StepRow]]:
    for family, dtype, mode in wanted:
        yield run_step(family, scale, dtype, mode, device, effort, clock)
        gc.collect()
