"""The ops in the models that people have: one call, a report, and a way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from .examine import Found, find
from .replace import changing, replace
from .report import PatchError, Report


def explain(model: nn.Module, only: Iterable[str] | None = None) -> Report:
    """What :func:`patch` would do, without doing it.

    Args:
        model: any module.
        only: as in :func:`patch`.

    Returns:
        The report, of which nothing has been done.

    Raises:
        TypeError: the model is no module.

    Example:
        >>> import torch, safe_inplace
        >>> safe_inplace.explain(torch.nn.Linear(2, 2))
        no known blocks in this model
    """
    with changing:
        return _report(list(find(model, only)), model, only, done=False)


def _report(found: list[Found], model: nn.Module, only: Iterable[str] | None, done: bool) -> Report:
    left_out = 0 if found or only is None else len(list(find(model, None)))
    if not left_out:
        return Report(found, done=done)
    return Report(found, done=done, left_out=f"none of the {left_out} known blocks in this model fits only={only!r}")


def patch(model: nn.Module, only: Iterable[str] | None = None, strict: bool = False) -> Report:
    """Lets the blocks of a model whose source is known run the ops of this package, fused and out of place.

    A block is known by the structure of its ``forward`` and of what that calls, so renamed copies are known and a changed source
    is not. Only instances in this model change: each gets a class that differs from its own in ``forward``. Copies, pickles,
    ``state_dict``, hooks, DDP, FSDP2 and checkpointing work as before. Where a submodule that the block computes itself has got a
    hook, another forward or another module since, the plain forward runs; so it does under ``torch.compile`` and in a checkpoint
    that is not reentrant.

    Args:
        model: a model of transformers, timm or diffusers, or any module with such blocks in it.
        only: patterns (``fnmatch``) of which one must fit the path of a module, its class or its rule; None takes all.
        strict: raise where anything that looks like a known block could not be replaced, or where nothing could.

    Returns:
        A report. Printed, it says what was replaced, what not and why; ``counts()`` what happened since; ``restore()`` undoes it,
        as :func:`restore` does without the report.

    Raises:
        PatchError: with ``strict``, before anything is replaced.
        TypeError: the model is no module.

    Example:
        >>> import torch, safe_inplace
        >>> from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN
        >>> model = torch.nn.Sequential(ConvNextV2GRN(8), torch.nn.Linear(8, 8), ConvNextV2GRN(8))
        >>> report = safe_inplace.patch(model)
        >>> report
        2 of 2 known blocks replaced
             2 x ConvNextV2GRN <- mul_add
        >>> y = model(torch.randn(1, 4, 4, 8))
        >>> report.counts()["forward.replaced"]
        2
        >>> report.restore()
    """
    with changing:
        found = list(find(model, only))
        if strict and (not found or any(item.reason for item in found)):
            raise PatchError(f"strict: {_report(found, model, only, done=False)}")
        for item in found:
            if item.rule is not None and item.reason is None:
                replace(item.module, item.rule)
        return _report(found, model, only, done=True)


@contextmanager
def patched(model: nn.Module, only: Iterable[str] | None = None, strict: bool = False) -> Iterator[Report]:
    """:func:`patch` for the time of a ``with`` block.

    Args:
        model, only, strict: as in :func:`patch`.

    Example:
        >>> import torch, safe_inplace
        >>> from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN
        >>> model = ConvNextV2GRN(8)
        >>> with safe_inplace.patched(model) as report:
        ...     y = model(torch.randn(1, 4, 4, 8))
        >>> type(model) is ConvNextV2GRN
        True
    """
    report = patch(model, only, strict)
    try:
        yield report
    finally:
        report.restore()
