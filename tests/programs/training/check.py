"""The snapshots that judge, and what each mode of guard must do by them."""

from __future__ import annotations

import random
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from safe_inplace import HazardError, guard

from ..engine import Fuzz, Refused, expect
from ..guards import run_under
from ..tensors import agree
from . import __doc__ as description
from .steps import Generator, Program, Run, Step


@dataclass(eq=False)
class Snapshot:
    alias: torch.Tensor
    copy: torch.Tensor
    version: int
    unread: bool  # running statistics of a batch norm that trains: saved, not read

    @property
    def changed(self) -> bool:
        return not torch.equal(_bytes(self.alias), _bytes(self.copy))

    @property
    def stale(self) -> bool:
        return self.alias._version != self.version


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.contiguous()
    return plain.view(torch.int64) if plain.dtype == torch.float64 else plain


class Judge(Run):
    """Backward gets the snapshots where the value has changed, as it does from guard("copy")."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        # By step: the shape of the first value that backward asked for and that had been written since it was saved.
        self.asked: dict[int, torch.Size] = {}
        self.refused_by_torch: int | None = None  # the first step in which the version tells
        self.lost: set[int] = set()  # steps in which bytes of a live value changed
        self.raised: set[int] = set()  # steps in which the version of one rose
        self.live: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self.changed: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        layers = [layer for module in self.modules for layer in module.modules()]
        self.norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm1d)]

    def run(self, stop: int | None = None) -> Judge:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            return super().run(stop)

    def step(self, index: int) -> Refused | None:
        refused = super().step(index)
        self.look()
        return refused

    def pack(self, tensor: torch.Tensor) -> Snapshot:
        # In a backward that is differentiated in its turn, what counts is the mode of the forward.
        node = torch._C._current_autograd_node()
        unread = any(
            getattr(node, "_saved_training", norm.training) and statistics.data_ptr() == tensor.data_ptr()
            for norm in self.norms
            for statistics in (norm.running_mean, norm.running_var)
        )
        snapshot = Snapshot(tensor.detach(), tensor.detach().clone(), tensor._version, unread)
        self.live.add(snapshot)
        return snapshot

    def unpack(self, snapshot: Snapshot) -> torch.Tensor:
        if (snapshot.changed and not snapshot.unread) or snapshot.stale:
            self.asked.setdefault(self.index, snapshot.alias.shape)
        if snapshot.stale and self.refused_by_torch is None:
            self.refused_by_torch = self.index
        # Running statistics that nobody reads stay what they are: a backward that is differentiated saves them once more.
        return snapshot.copy if snapshot.changed and not snapshot.unread else snapshot.alias

    def look(self) -> None:
        sound = [snapshot for snapshot in self.live if snapshot not in self.changed and not snapshot.unread]
        if any(snapshot.stale for snapshot in sound):
            self.raised.add(self.index)
        now = [snapshot for snapshot in sound if snapshot.changed]
        self.changed.update(now)
        if now:
            self.lost.add(self.index)


class Case:
    """A program, judged and run in plain torch, and how guard must end it in each mode."""

    def __init__(self, program: Program, under) -> None:
        self.program, self.under = program, under
        self.judge = Judge(program).run()
        self.first = min(self.judge.asked, default=None)
        self.plain, _ = run_under(nullcontext(), Run(program))
        self.verify = random.Random(program.name).random() < 0.3

    def run(self, mode: str, **options):
        return run_under(self.under(mode, **options), Run(self.program))

    def expect(self, truth: object, what: str) -> None:
        expect(truth, f"{what}\nasked {self.judge.asked}, lost {sorted(self.judge.lost)}")

    def same(self, one: Run, other: Run) -> bool:
        return one.skipped == other.skipped and agree(one.state(), other.state())

    def check_torch(self) -> None:
        seen = stopped_at(self.plain) == self.judge.refused_by_torch
        self.expect(seen, f"the judge does not see what torch refuses: {self.plain.stopped}")

    def check_defer(self) -> None:
        deferred, watch = self.run("defer", verify=self.verify)
        if self.first is None:
            self.expect(deferred.stopped is None and watch.hazards == [], f"a false alarm of defer: {deferred.stopped}")
            self.expect(self.same(deferred, self.plain), "defer changed what the program computes")
        else:
            self.expect(stopped_at(deferred) == self.first, f"defer missed it: {deferred.stopped}")
            error = deferred.stopped.error
            named = isinstance(error, HazardError) and error.mutation and error.save
            self.expect(named, f"defer does not name it: {error}")
            self.expect(error.shape == tuple(self.judge.asked[self.first]), f"defer names another value: {error}")

    def check_raise(self) -> str:
        """How the program ends."""
        raised, watch = self.run("raise", verify=self.verify)
        if raised.stopped is not None and raised.stopped.step != self.first:
            self.check_stopped_write(raised.stopped)
            return "at the write"
        if self.first is not None:
            found = raised.stopped is not None and isinstance(raised.stopped.error, HazardError)
            self.expect(found, f"raise missed it: {raised.stopped}")
            return "in backward"
        self.expect(raised.stopped is None and watch.hazards == [], f"a false alarm of raise: {watch.hazards}")
        self.expect(self.same(raised, self.plain), "raise changed what the program computes")
        return "clean"

    def check_stopped_write(self, stopped: Refused) -> None:
        at, error = stopped.step, stopped.error
        at_write = isinstance(error, HazardError) and not error.hazard.late
        self.expect(at_write, f"raise stops where no backward asks: {error}")
        self.expect(self.first is None or at < self.first, f"raise missed it: {error}")
        # A relu may write what is there already; torch refuses that as well, by the version.
        again = "relu_" in error.op and at in self.judge.raised
        self.expect(at in self.judge.lost or again, f"raise stops a write that destroys nothing: {error}")
        self.expect(not self.program.steps[at].updates and not error.hazard.used, f"raise stops an update: {error}")

    def check_warn(self, ended: str) -> None:
        warned, watch = self.run("warn")
        self.expect(stopped_at(warned) == stopped_at(self.plain), "warn does not end as torch does")
        self.expect(self.same(warned, self.plain), "warn changed what the program computes")
        told = watch.hazards if self.first is not None else ended == "at the write" or not watch.hazards
        self.expect(told, "warn tells the wrong thing")

    def check_copy(self) -> None:
        copied, _ = self.run("copy")
        self.expect(copied.stopped is None, f"copy stops: {copied.stopped}")
        self.expect(self.same(copied, self.judge), "copy does not give the gradients of the snapshots")


def stopped_at(run: Run) -> int | None:
    return run.stopped and run.stopped.step


def check(program: Program, under=guard) -> str:
    """How the program ends; raises Disagreement where guard did not do what the snapshots say."""
    case = Case(program, under)
    case.check_torch()
    case.check_defer()
    ended = case.check_raise()
    case.check_warn(ended)
    case.check_copy()
    return ended


FUZZ = Fuzz("training", description.split("\n")[0], Step, lambda name: Generator(name).generate(), check, programs=20_000)
