"""Programs of two processes: `run(name)` runs one of them on gloo, in processes of their own."""

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as distributed
from torch import nn

from safe_inplace import HazardError, guard

ROOT = Path(__file__).resolve().parents[2]
WATCHES = (lambda: guard(), lambda: guard("copy"), lambda: guard("raise", verify=True), lambda: guard("copy", verify=True))


def same_with_and_without_guard(train):
    """`train()` gives tensors: bit for bit the same under every guard, and no guard has anything to say."""
    right = train(contextlib.nullcontext())
    for watch in WATCHES:
        watched = watch()
        got = train(watched)
        assert watched.hazards == [], watched.summary()
        assert all(torch.equal(a, b) for a, b in zip(right, got, strict=True))


def named(program, line):
    try:
        with guard():
            program()
    except HazardError as error:
        assert error.mutation is not None and error.mutation.source == line, error
    else:
        raise AssertionError(f"no hazard at {line}")


def layers():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()) for _ in range(3)))


def batches(rank, steps):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 16, generator=generator) for _ in range(steps)]


class Careless(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        y = self.inner(x).exp()
        y.data.mul_(2)
        return y


def steps(model, optimizer, rank, watched, accumulate=1, toggle=None):
    with watched:
        for number, x in enumerate(batches(rank, 2 * accumulate), 1):
            last = number % accumulate == 0
            if toggle is not None:
                toggle(last)
            model(x).square().mean().backward()
            if last:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


def full(parameter):
    tensor = parameter.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def ddp(rank):
    def train(watched):
        model = nn.parallel.DistributedDataParallel(nn.Sequential(layers(), nn.BatchNorm1d(16)))
        steps(model, torch.optim.AdamW(model.parameters()), rank, watched)
        return [full(p) for p in model.parameters()]

    same_with_and_without_guard(train)
    careless = nn.parallel.DistributedDataParallel(nn.Sequential(layers(), Careless()))
    named(lambda: careless(batches(rank, 1)[0]), "y.data.mul_(2)")


def fsdp(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def sharded(model, **options):
        for layer in model:
            fully_shard(layer, **options)
        return fully_shard(model, **options)

    policies = (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    for reshard, policy, accumulate in itertools.product((True, False), policies, (1, 2)):

        def train(watched, reshard=reshard, policy=policy, accumulate=accumulate):
            model = sharded(layers(), reshard_after_forward=reshard, mp_policy=policy)

            def toggle(last):
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(reshard or last)

            optimizer = torch.optim.AdamW(model.parameters())
            steps(model, optimizer, rank, watched, accumulate, toggle if accumulate > 1 else None)
            return [full(p) for p in model.parameters()]

        same_with_and_without_guard(train)

    for reshard in (True, False):
        careless = sharded(nn.Sequential(layers(), Careless()), reshard_after_forward=reshard)
        named(lambda careless=careless: careless(batches(rank, 1)[0]), "y.data.mul_(2)")

    # A write to a gathered parameter, after it came back.
    model = sharded(layers(), reshard_after_forward=False)

    def program():
        y = model(batches(rank, 1)[0])
        model[1][0].weight.data.mul_(2)
        y.sum().backward()

    named(program, "model[1][0].weight.data.mul_(2)")

    model = sharded(layers(), reshard_after_forward=True)

    def gathered_again():
        y = model(batches(rank, 1)[0])
        model[1].unshard()
        model[1][0].weight.data.mul_(2)
        y.sum().backward()

    named(gathered_again, "model[1][0].weight.data.mul_(2)")


class Block(nn.Module):
    def __init__(self, careless=False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down, self.careless = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), careless

    def forward(self, x):
        h = self.up(self.norm(x))
        y = h.sigmoid()
        if self.careless:
            y.mul_(2)
        return x + self.down(y * h)


def tensor_parallel(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    plans = {
        "columnwise and rowwise": {"up": ColwiseParallel(), "down": RowwiseParallel()},
        "all as DTensor": {
            "norm": PrepareModuleInput(input_layouts=None, desired_input_layouts=None),
            "up": ColwiseParallel(use_local_output=False),
            "down": RowwiseParallel(),
        },
        "sequence": {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        },
    }
    plans["all as DTensor"].pop("norm")
    for name, plan in plans.items():

        def train(watched, name=name, plan=plan):
            block = parallelize_module(Block(), mesh, plan)
            optimizer = torch.optim.AdamW(block.parameters(), foreach=False)
            with watched:
                for x in batches(0, 2):
                    x = x.reshape(1, 4, 16)
                    x = x.chunk(2, 1)[rank] if name == "sequence" else x
                    block(x).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
            return [full(p) for p in block.parameters()]

        same_with_and_without_guard(train)
        careless = parallelize_module(Block(careless=True), mesh, plan)
        x = torch.randn(1, 2 if name == "sequence" else 4, 16)
        named(lambda careless=careless, x=x: careless(x).sum().backward(), "y.mul_(2)")

    def product(watched):
        w = distribute_tensor(torch.arange(16.0).reshape(4, 4), mesh, [Shard(0)]).requires_grad_()
        with watched:
            (w * w).redistribute(placements=[Shard(1)], async_op=True).square().sum().backward()
        return [full(w.grad)]

    same_with_and_without_guard(product)


PROGRAMS = {program.__name__: program for program in (ddp, fsdp, tensor_parallel)}


def run(name):
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.guard.ranks", name, str(rank), os.path.join(folder, "store")],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            texts = [rank.communicate(timeout=300)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(texts)


def main(name, rank, store):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=int(rank), world_size=2)
    PROGRAMS[name](int(rank))
    distributed.barrier()
    distributed.destroy_process_group()
    # Past the end of the interpreter: gloo's threads outlive the group (DTensor's caches hold it), and one that lets go of a
    # tensor while Python ends aborts the process, without guard too (https://github.com/pytorch/pytorch/issues/190489).
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
