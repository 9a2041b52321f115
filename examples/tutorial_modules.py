"""The modules that tutorials on in-place ops show, run: what really happens in each, where, and why.

Nothing below is said from memory. Each module is compiled from the text that is printed and run forward and backward;
its gradients are compared with those of the same module written out of place; and what autograd saved is asked of
autograd.
"""

import argparse
import linecache
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import safe_inplace

BODIES = {
    "A write to the input": """
        {write_x}
        return x * 2
        """,
    "Read the input, then write to it": """
        y = x {op} {b}
        {write_x}
        return y * 2
        """,
    "Read the input, then write to a clone": """
        y = x {op} {b}
        c = x.clone()
        {write_c}
        return y * 2 + c
        """,
    "Read a clone, then write to that clone": """
        c = x.clone()
        y = c {op} {b}
        {write_c}
        return y * 2 + c
        """,
}
OPERATIONS = {"add_": "+", "mul_": "*"}
OPERANDS = (("add_", "1"), ("mul_", "3"), ("mul_", "w"))
COLORS = {
    "right gradients": "green",
    "refused at the write": "yellow",
    "refused in backward": "red",
    "WRONG GRADIENTS": "bold red",
}
LIBRARIES: dict[str, Callable[[str, str, str], str]] = {
    "torch": lambda name, op, b: f"{name}.{op}({b})",
    "safe_inplace": lambda name, op, b: f"safe_inplace.{op}({name}, {b})",
    "out of place": lambda name, op, b: f"{name} = {name} {OPERATIONS[op]} {b}",
}


@dataclass(frozen=True)
class Module:
    source: str
    forward: Callable[[Tensor, Tensor], Tensor]


def compile_module(body: str, operation: str, operand: str, library: str) -> Module:
    write = LIBRARIES[library]
    lines = body.format(
        op=OPERATIONS[operation],
        b=operand,
        write_x=write("x", operation, operand),
        write_c=write("c", operation, operand),
    ).split("\n")
    source = "def forward(x, w):\n" + "".join(f"    {line.strip()}\n" for line in lines if line.strip())
    filename = f"<{library}: {source}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    names = {"safe_inplace": safe_inplace}
    exec(compile(source, filename, "exec"), names)
    return Module(source, names["forward"])


def versions(title: str, operation: str, operand: str) -> dict[str, Module]:
    """The same module by each library."""
    return {library: compile_module(BODIES[title], operation, operand, library) for library in LIBRARIES}


def inputs(leaf: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The input that gradients are asked of, what the module is given (itself, or computed from it), and the weight."""
    x = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([3.0, -0.5, 1.25], dtype=torch.float64, requires_grad=True)
    return x, x if leaf else x * 1, w


def gradients(module: Module, leaf: bool) -> tuple[Tensor, ...]:
    x, given, w = inputs(leaf)
    return torch.autograd.grad(module.forward(given, w).sum(), (x, w), materialize_grads=True)


@dataclass(frozen=True)
class Outcome:
    what: str
    where: str = ""


def run(module: Module, reference: Module, leaf: bool) -> Outcome:
    x, given, w = inputs(leaf)
    try:
        result = module.forward(given, w)
    except RuntimeError as error:
        frame = traceback.extract_tb(error.__traceback__)[1]
        return Outcome("refused at the write", f"{frame.line}: {first_sentence(error)}")
    try:
        found = torch.autograd.grad(result.sum(), (x, w), materialize_grads=True)
    except RuntimeError as error:
        return Outcome("refused in backward", first_sentence(error))
    expected = gradients(reference, leaf)
    if all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(found, expected, strict=True)):
        return Outcome("right gradients")
    return Outcome("WRONG GRADIENTS", f"{found} instead of {expected}")


def first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].split("; ")[0].removesuffix(".")


def why(module: Module, leaf: bool) -> str:
    """Asks autograd what it saved, at which line, and whether that memory was written to afterwards."""
    _, given, w = inputs(leaf)
    saved: list[tuple[str, Tensor, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        frame = sys._getframe()
        while frame and frame.f_code is not module.forward.__code__:
            frame = frame.f_back
        if frame:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            # detach shares the memory and the version counter, and keeps the graph from holding itself.
            saved.append((line, tensor.detach(), tensor._version))
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module.forward(given, w)
    except RuntimeError:
        if not (given.is_leaf and given.requires_grad):
            raise
        return "the write would replace the very value that the gradient is asked for"
    stale = [line for line, tensor, version in saved if tensor._version > version]
    if stale:
        return f"{' and '.join(repr(line) for line in stale)} saved what was overwritten"
    if not saved:
        return "nothing was saved"
    kept = dict.fromkeys(line for line, _, _ in saved)
    return f"{' and '.join(repr(line) for line in kept)} saved what nobody wrote to"


def table() -> Table:
    shown = Table(box=box.HORIZONTALS, pad_edge=False, header_style="")
    for heading in ("", "x is a leaf", "x was computed", "why there", "safe_inplace"):
        shown.add_column(heading)
    for title in BODIES:
        shown.add_section()
        shown.add_row(Text(title, "bold"))
        for operation, operand in OPERANDS:
            modules = versions(title, operation, operand)
            theirs, ours = (
                [run(modules[library], modules["out of place"], leaf) for leaf in (True, False)]
                for library in ("torch", "safe_inplace")
            )
            differ = [f"{one.what} {one.where}" for one, other in zip(ours, theirs, strict=True) if one.what != other.what]
            lines = modules["torch"].source.splitlines()[1:]
            shown.add_row(
                Text("; ".join(line.strip() for line in lines)),
                *(Text(outcome.what, COLORS[outcome.what]) for outcome in theirs),
                Text(why(modules["torch"], leaf=False)),
                Text("; ".join(differ) or "the same"),
            )
    return shown


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    console.print(__doc__.split("\n\n")[0])
    console.print(table())
    modules = versions("A write to the input", "mul_", "w")
    refused = run(modules["torch"], modules["out of place"], leaf=True)
    console.print(f"Refused at the write, since {why(modules['torch'], leaf=True)}:", markup=False)
    console.print(f"{refused.where}.", markup=False)


if __name__ == "__main__":
    main()
