"""Times, memory and saved bytes of one implementation of one case."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.benchmark import Timer

from .cases import CALL, Case

# One graph of this many calls per preparation, where a call is shorter than what prepares it.
CHAIN = 32


class Clock:
    """A timer for `torch.utils.benchmark` that can be stopped while a statement prepares itself; pauses nest."""

    def __init__(self) -> None:
        self.skipped = 0.0
        self.paused = 0.0
        self.depth = 0

    def __call__(self) -> float:
        return perf_counter() - self.skipped

    def pause(self) -> None:
        if self.depth == 0:
            self.paused = perf_counter()
        self.depth += 1

    def resume(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.skipped += perf_counter() - self.paused


class CudaClock:
    """The same for the device's own time, between events."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        self.events.append(torch.cuda.Event(enable_timing=True))
        self.events[-1].record()

    pause = resume = mark

    def read(self) -> float:
        """Seconds between the first mark and the last, without those between a pause and its resume."""
        self.events[-1].synchronize()
        spans = zip(self.events[::2], self.events[1::2], strict=True)
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3


class MemoryClock:
    """Marks in a profile what was allocated while paused."""

    def pause(self) -> None:
        self.range = record_function(PAUSED)
        self.range.__enter__()

    def resume(self) -> None:
        self.range.__exit__(None, None, None)


PAUSED = "preparation"


class Source(torch.autograd.Function):
    """Hands out a tensor as the output of a node, which may be written to, as a leaf may not. Moves no memory."""

    @staticmethod
    def forward(ctx, anchor, tensors):
        return tensors.pop()

    @staticmethod
    def backward(ctx, grad):
        return None, None


class Resume(torch.autograd.Function):
    """A node that does nothing but let the clock run again when backward comes by."""

    @staticmethod
    def forward(ctx, anchor, clock):
        ctx.clock = clock
        return torch.zeros_like(anchor)

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.resume()
        return None, None


class Pause(torch.autograd.Function):
    """Stops the clock when backward begins."""

    @staticmethod
    def forward(ctx, loss, resume, clock):
        ctx.clock = clock
        return loss.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.pause()
        return grad, torch.zeros_like(grad), None


def engine_holds_gradient(result: torch.Tensor, gradient: torch.Tensor, anchor: torch.Tensor, clock) -> torch.Tensor:
    """A loss whose backward gives `result` a gradient that only the engine holds, made while the clock stands.

    A native node has to make it: a tensor that Python has seen is held by its wrapper too. Of the nodes that are ready,
    the engine runs the youngest first: the product's, then Resume's, then that of `result`.
    """
    clock.pause()
    resume = Resume.apply(anchor, clock)
    loss = Pause.apply((result * gradient).sum(), resume, clock)
    clock.resume()
    return loss


def signs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Values that neither vanish into denormals nor overflow, however often they are applied."""
    numel = math.prod(shape)
    pattern = (torch.randint(0, 2, (min(numel, 4099),)) * 2 - 1).to(device=device, dtype=dtype)
    return pattern.repeat(-(-numel // pattern.numel()))[:numel].clone().view(shape)


class Workload:
    """The tensors of a case, and for each implementation what to prepare and what to time.

    All implementations of a case work on the same memory.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        torch.manual_seed(0)
        self.input = signs(case.shape, case.dtype, device).contiguous(memory_format=case.layout.memory_format)
        self.operands = [-1.0 if shape is None else self._operand(shape, case) for shape in case.operand_shapes()]
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.gradient = self._beside(self.input.clone()) if case.mode.backward else None
        self.clock = Clock() if device.type == "cpu" else CudaClock()

    def _operand(self, shape: tuple[int, ...], case: Case) -> torch.Tensor:
        operand = signs(shape, case.dtype, self.device)
        if operand.dim() == 4:
            operand = operand.contiguous(memory_format=case.layout.memory_format)
        if shape == case.shape:
            operand = self._beside(operand)
        return operand.requires_grad_(case.mode.trainable)

    def _beside(self, tensor: torch.Tensor) -> torch.Tensor:
        beside = self.case.layout.beside
        return tensor if beside is None else tensor.contiguous(memory_format=beside)

    def node_output(self) -> torch.Tensor:
        alias = torch.empty(0, dtype=self.input.dtype, device=self.device)
        alias.set_(self.input.untyped_storage(), 0, self.input.shape, self.input.stride())
        return Source.apply(self.anchor, [alias])

    def prepare(self, function: Callable, clock: Clock | CudaClock | MemoryClock | None = None) -> Any:
        """What `run` takes. A graph made here stops `clock` in its backward."""
        mode = self.case.mode
        self.clock = clock or self.clock
        if not mode.grad:
            return self.input
        for operand in self.operands:
            if isinstance(operand, torch.Tensor):
                operand.grad = None
        input = self.node_output()
        return [self.forward(function, input) if mode.timed == "backward" else input]

    def forward(self, function: Callable, input: torch.Tensor) -> torch.Tensor:
        result = function(input, *self.operands)
        if self.case.mode.holder == "engine":
            return engine_holds_gradient(result, self.gradient, self.anchor, self.clock)
        return result

    def run(self, function: Callable, state: Any) -> None:
        mode = self.case.mode
        if not mode.backward:
            function(state[0] if mode.grad else state, *self.operands)
            return
        result = state.pop()
        if mode.timed == "forward+backward":
            result = self.forward(function, result)
        result.backward(self.gradient if mode.holder == "caller" else None)

    def timer(self, function: Callable) -> tuple[Timer, int]:
        """A timer of the CPU's clock, and the number of calls in its statement."""
        names = {f"operand{i}": operand for i, operand in enumerate(self.operands)}
        call = f"x = f(x, {', '.join(names)})"
        names |= {"f": function, "w": self, "x": self.input}
        calls = 1
        if self.case.mode.name == "forward":
            statement = f"f(x, {', '.join(n for n in names if n.startswith('operand'))})"
        elif self.case.mode.name == "recorded" and self.case.size <= CALL:
            calls = CHAIN
            statement = "clock.pause(); x = w.node_output(); clock.resume()\n" + f"{call}\n" * CHAIN + "del x"
        else:
            statement = "clock.pause(); state = w.prepare(f); clock.resume()\nw.run(f, state)"
        clock = self.clock if isinstance(self.clock, Clock) else Clock()
        return Timer(
            statement, globals=names | {"clock": clock}, timer=clock, num_threads=torch.get_num_threads()
        ), calls


def cpu_samples(timer: Timer, calls: int, seconds: float) -> list[float]:
    return [t / calls for t in timer.blocked_autorange(min_run_time=seconds).times]


def prepared_samples(timer: Timer, seconds: float) -> list[float]:
    """For statements that prepare themselves: bounded by the time they really take, not by what their clock shows."""
    samples: list[float] = []
    began = perf_counter()
    number = 1
    while not samples or perf_counter() - began < seconds:
        started = perf_counter()
        samples.append(timer.timeit(number).mean)
        if perf_counter() - started < seconds / 10:
            number *= 2
    return samples


class Flush:
    """Empties the last cache of a CUDA device, and then keeps the device busy while the host issues what is timed.

    Without the second half the host's time would show between the kernels of a backward.
    """

    HEAD_START = 2_000_000  # cycles: about a millisecond

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.memory = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        self.memory.zero_()
        torch.cuda._sleep(self.HEAD_START)


def cuda_samples(prepare: Callable[[CudaClock], Any], run: Callable[[Any], None], seconds: float) -> list[float]:
    """Times of the device alone, each with a cold cache. What is prepared may stop the clock while it runs."""
    flush = Flush(torch.device("cuda"))
    samples: list[float] = []
    began = perf_counter()
    while not samples or perf_counter() - began < seconds:
        clock = CudaClock()
        state = prepare(clock)
        clock.events.clear()
        flush()
        clock.mark()
        run(state)
        clock.mark()
        samples.append(clock.read())
    return samples


def trace(run: Callable[[], Any], *, device: bool = False) -> list[dict[str, Any]]:
    """What the profiler saw of a run: on the host, which sees the allocators of both kinds of device, or on the device too."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def peak_memory(device: torch.device, run: Callable[[], Any]) -> int:
    """Bytes allocated at the worst moment of a run, beyond what was there when it began.

    What is allocated while a MemoryClock is paused counts as having been there.
    """
    return peak_of(trace(run), device)


def peak_of(events: list[dict[str, Any]], device: torch.device) -> int:
    pauses = [
        (e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == PAUSED and e.get("cat") == "user_annotation"
    ]
    kind = DeviceType.CUDA.value if device.type == "cuda" else DeviceType.CPU.value
    changes = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == kind]
    held = peak = 0
    counted: set[int] = set()
    for event in sorted(changes, key=lambda e: e["ts"]):
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0 and not any(start <= event["ts"] <= end for start, end in pauses):
            counted.add(address)
            held += size
            peak = max(peak, held)
        elif size < 0 and address in counted:
            counted.remove(address)
            held += size
    return peak


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    return tuple(float(q) for q in np.quantile(samples, [0.2, 0.5, 0.8]))


def interval_of_median(samples: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Of any distribution: between the k-th sample from either end the median lies unless fewer than k fell on one side."""
    ordered, n = sorted(samples), len(samples)
    outside, k = 0.0, 0
    while k < n // 2 and outside + 2 * math.comb(n, k) / 2**n <= 1 - confidence:
        outside += 2 * math.comb(n, k) / 2**n
        k += 1
    return ordered[max(k - 1, 0)], ordered[min(n - k, n - 1)]


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes of the distinct tensors that a forward keeps for its backward."""
    kept: dict[tuple, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()
    total = sum(t.numel() * t.element_size() for t in kept.values())
    del held
    return total
