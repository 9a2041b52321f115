"""What to do about a hazard: code where it is right when pasted, else what to clone."""

from __future__ import annotations

import os
import re

import torch

from .facts import Facts
from .sites import Site
from .words import bytes_in_words

# Where guard saw no write.
_WITHOUT_A_WRITE = {
    "corrupted": [
        "Look between the save and backward for what writes without telling torch: NumPy or DLPack aliases, raw "
        "pointers, custom kernels (Triton, ctypes).",
        "Give the saving line a value of its own: clone() what that code writes to.",
    ],
    "exchanged": [
        "Write the new values into the memory that is there (with torch.no_grad(): x.copy_(new)) after backward, or "
        "compute the forward again after the exchange.",
        'Or guard("copy"): backward then has the values of the forward.',
    ],
    "unseen": [
        "Put the code between this save and its backward under guard as well (guard is per thread): the write "
        "is then named, too.",
        "Save a value of its own: clone() at the line of the save.",
    ],
}


_AUGMENTED = re.compile(r"(?:\*\*|//|<<|>>|[-+*/%&|^@])=")


def remedies(hazard: Facts) -> list[str]:
    if hazard.kind in _WITHOUT_A_WRITE:
        return list(_WITHOUT_A_WRITE[hazard.kind])
    advice: list[str] = []
    if hazard.rewritten.leaf:
        advice.append("Write under `with torch.no_grad():`; elsewhere torch refuses to write to a leaf that requires grad.")
    if hazard.used and hazard.kind == "overwritten" and not hazard.late:
        advice.append(
            "The graph has been through backward already: where nothing goes through it again, drop what keeps it (its "
            "outputs, its loss) before this write."
        )
    advice += filter(None, (_at_the_write(hazard), _at_the_save(hazard)))
    advice.append(
        f'Or let guard("copy") do it: it copies this value only, {bytes_in_words(hazard.nbytes)} each time.'
        if hazard.kind == "overwritten"
        else 'Or guard("copy"), which lets such a write pass.'
    )
    return advice[:3]


def _is_update(hazard: Facts) -> bool:
    return hazard.by == "optimizer" or hazard.rewritten.parameter


def _at_the_write(hazard: Facts) -> str | None:
    write = hazard.mutation.source if hazard.mutation else ""
    op = (hazard.op or "").removeprefix("aten.").split(".")[0]
    if op == "embedding_renorm_":
        return (
            "max_norm rescales the weight in place at every lookup: look up before the weight is used, or use a clone() "
            "of the weight there."
        )
    if _is_update(hazard):
        what = "step" if hazard.by == "optimizer" else "update"
        return f"Run backward() before this {what}, or compute the forward again after it."
    if hazard.by == "ddp":
        return (
            "DistributedDataParallel broadcasts buffers before each forward: run backward() between the two forwards, "
            "or build it with broadcast_buffers=False."
        )
    if hazard.rewritten.code:
        return f"Write it out of place: {hazard.rewritten.code}"
    if hazard.rewritten.clone:
        name = hazard.rewritten.clone
        return (
            f"Assign into a clone ({name} = {name}.clone() before this line), or build the result with torch.where or "
            "torch.stack."
        )
    if "out=" in write:
        return "Leave out= away, or hand it memory that nothing has saved."
    if op.endswith("batch_norm"):
        return "Run backward of the eval-mode forward before the next forward in train mode."
    # The line does not name the operator, by its name or by its sign: a function or a module that it calls does.
    named = op.strip("_") in write or "]" in write.partition("=")[0] or _AUGMENTED.search(write) is not None
    called_within = hazard.mutation is not None and not named
    if called_within and op.endswith("_") and (hasattr(torch.Tensor, op[:-1]) or hasattr(torch.nn.functional, op[:-1])):
        return (
            f"What runs here writes with {op}(): use its out-of-place form, {op[:-1]}() (a module: inplace=False), and its "
            "result from here on."
        )
    return None


def _at_the_save(hazard: Facts) -> str | None:
    if hazard.unread:
        return (
            "Backward does not read the running statistics that batch norm in train mode saved: torch refuses by the "
            "version alone. Run backward before the write."
        )
    if hazard.kind == "version":
        return (
            "The saved bytes are intact: torch counts versions for all views of one tensor together. Save a clone() "
            "of the view, or collect the parts in a list and torch.stack them."
        )
    if _is_update(hazard):
        saving = f" ({hazard.save.filename.rpartition(os.sep)[2]}:{hazard.save.lineno})" if hazard.save else ""
        return (
            f"Where no gradient is to flow through the save{saving}, compute it under torch.no_grad(), detach() its "
            "result, or drop the outputs that are kept."
        )
    if hazard.save is not None:
        return _apart(hazard, hazard.save)
    return None


def _apart(hazard: Facts, save: Site) -> str:
    """The remedy at the save: what it keeps, and what is written, are two."""
    where = f"{save.filename.rpartition(os.sep)[2]}:{save.lineno}"
    whole = f" of `{save.expression}`" if save.columns else ""
    if hazard.result:
        return f"Keep the saved value apart, at {where}: clone() the result{whole}, and go on with the clone."
    return f"Keep the saved value apart, at {where}: clone() the operand{whole} that is written here."
