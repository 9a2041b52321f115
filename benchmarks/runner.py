"""Runs cases: all implementations of a case in one process, in turns, so that the machine's moods hit all alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
import torch._dynamo.utils
from torch.utils.benchmark import Timer

from . import models as model_stacks
from .cases import Case, past_cache
from .implementations import COMPILED, OURS, OUT_OF_PLACE, compiler_works, implementations
from .measure import (
    Clock,
    MemoryClock,
    Workload,
    cpu_samples,
    cuda_samples,
    peak_memory,
    prepared_samples,
    quantiles,
    saved_bytes,
)
from .results import Row


@dataclass(frozen=True)
class Effort:
    """Rounds through the implementations, and the least seconds of each implementation's turn.

    Many short turns: a neighbour on the memory bus stays for longer than one, and has to meet all implementations alike.
    """

    rounds: int = 15
    seconds: float = 0.01
    compile: bool = True
    # Seconds after which a case that has had three rounds is left, however many were wanted: of one past a large cache.
    limit: float = 3


class Reference:
    """What shares are shares of: on CPU torch's contiguous in-place float32 add_, on a GPU the device's own copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = past_cache(device)
        self.target, self.source = (torch.ones(size // 4, device=device) for _ in range(2))
        self.bytes = (3 if device.type == "cpu" else 2) * size

    def __call__(self) -> None:
        if self.device.type == "cpu":
            self.target.add_(self.source)
        else:
            self.target.copy_(self.source)

    def samples(self, seconds: float) -> list[float]:
        if self.device.type == "cuda":
            # As everything else is timed there, the launch and the cold cache included.
            return cuda_samples(lambda clock: None, lambda state: self(), seconds)
        timer = Timer("run()", globals={"run": self}, num_threads=torch.get_num_threads())
        return cpu_samples(timer, 1, seconds)


Sampler = Callable[[float], list[float]]


def in_turns(samplers: dict[str, Sampler], effort: Effort) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    began = perf_counter()
    for turn in range(effort.rounds):
        if turn >= 3 and perf_counter() - began > effort.limit:
            break
        names = list(samplers)
        # Who comes after whom changes from round to round: each leaves the caches as it likes.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name] += samplers[name](effort.seconds)
    return samples


COPY = "copy"


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far. A function that falls back to eager makes none, and raises."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run_case(case: Case, device: torch.device, effort: Effort, reference: Reference) -> list[Row]:
    workload = Workload(case, device)
    functions = implementations(case, device, effort.compile)
    samplers: dict[str, Sampler] = {}
    memory: dict[str, int] = {}
    saved: dict[str, int | None] = {}
    with torch.set_grad_enabled(case.mode.grad):
        for name, function in functions.items():
            for _ in range(2):
                workload.run(function, workload.prepare(function))
            clock = workload.clock
            state = workload.prepare(function, MemoryClock())
            memory[name] = peak_memory(device, partial(workload.run, function, state))
            workload.clock = clock
            saved[name] = None
            if case.mode.grad:
                saved[name] = saved_bytes(
                    lambda function=function: function(workload.node_output(), *workload.operands)
                )
            del state
            samplers[name] = sampler(workload, function, device)
        if case.size >= past_cache(device) or device.type == "cuda":
            samplers[COPY] = reference.samples
        graphs = compiled_graphs()
        samples = in_turns(samplers, effort)
        if compiled_graphs() != graphs:
            raise RuntimeError(f"{case.key}: torch.compile compiled anew while it was timed")
    copy = None
    if COPY in samples:
        copy = reference.bytes / quantiles(samples[COPY])[1]
    elif case.mode.name == "forward":
        copy = reference.bytes / quantiles(reference.samples(effort.seconds))[1]
    rows = []
    for name in functions:
        p20, p50, p80 = quantiles(samples[name])
        rows.append(
            Row(
                op=case.op.name,
                layout=case.layout.name,
                dtype=str(case.dtype).removeprefix("torch."),
                size=case.size,
                mode=case.mode.name,
                implementation=name,
                p20=p20,
                p50=p50,
                p80=p80,
                samples=len(samples[name]),
                bytes=case.bytes(),
                copy=copy,
                share=case.bytes() / p50 / copy if copy else None,
                peak=memory[name],
                saved=saved[name],
            )
        )
    return rows


def sampler(workload: Workload, function: Callable, device: torch.device) -> Sampler:
    # What a call costs is the host's time on either kind of device; all else is the device's.
    if device.type == "cuda" and workload.case.mode.name != "recorded":
        return partial(cuda_samples, partial(workload.prepare, function), partial(workload.run, function))
    timer, calls = workload.timer(function)
    if workload.case.mode.backward:
        return partial(prepared_samples, timer)
    return partial(cpu_samples, timer, calls)


def run_model(model: model_stacks.Model, device: torch.device, effort: Effort, compile: bool) -> list[Row]:
    ways = {OUT_OF_PLACE: model_stacks.Plain, OURS: model_stacks.InPlace}
    steps: dict[str, Callable] = {}
    memory, saved, samplers = {}, {}, {}
    for name, formulas in ways.items():
        module, inputs = model.make(formulas, device)
        steps[name] = partial(model_stacks.step, module, inputs)
        saved[name] = saved_bytes(partial(module, *inputs))
        size = sum(v.numel() * v.element_size() for v in inputs)
        if name == OUT_OF_PLACE and compile and compiler_works(device):
            torch.compiler.reset()
            steps[COMPILED] = partial(model_stacks.step, torch.compile(module), inputs)
            saved[COMPILED] = None
    for name, step in steps.items():
        for _ in range(2):
            step()
        memory[name] = peak_memory(device, step)
        synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        names = {"step": step, "synchronize": synchronize}
        timer = Timer("step(); synchronize()", globals=names, timer=Clock(), num_threads=torch.get_num_threads())
        samplers[name] = partial(cpu_samples, timer, 1)
    samples = in_turns(samplers, effort)
    rows = []
    for name in steps:
        p20, p50, p80 = quantiles(samples[name])
        rows.append(
            Row(
                op=model.name,
                layout="model",
                dtype="float32",
                size=size,
                mode="step",
                implementation=name,
                p20=p20,
                p50=p50,
                p80=p80,
                samples=len(samples[name]),
                bytes=None,
                copy=None,
                share=None,
                peak=memory[name],
                saved=saved[name],
            )
        )
    return rows


def run(cases: list[Case], models: list, device: torch.device, effort: Effort, full: bool) -> Iterator[list[Row]]:
    """The rows of one model, or one case, after the other."""
    for model in models:
        yield run_model(model, device, effort, compile=full and effort.compile)
        gc.collect()
    reference = Reference(device)
    for case in cases:
        yield run_case(case, device, effort, reference)
        gc.collect()
