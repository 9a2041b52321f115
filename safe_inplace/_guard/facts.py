"""What is known of a write and the save that it destroys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from .rewrite import Rewritten
from .sites import Site

Kind = Literal["overwritten", "version", "unseen", "corrupted", "exchanged"]


@dataclass
class Facts:
    """One pair of lines: a write and the save that it destroys. What happened again between the same lines is counted."""

    kind: Kind
    mutation: Site | None
    save: Site | None
    op: str | None
    saved_by: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    used: bool = False  # by a backward before
    rewritten: Rewritten = field(default_factory=Rewritten)
    result: bool = False  # the operator saved what it returned, not what it was given
    unread: bool = False  # saved, but backward would be right without it
    by: Literal["optimizer", "ddp"] | None = None  # the part of torch that wrote, where it is one of these
    late: bool = False  # found when backward asked for the value, not at the write
    parameter: str | None = None  # the name of the parameter that the value is, or is a view of
    count: int = 0
    repaired: int = 0  # of these, made harmless by guard
    bytes_copied: int = 0
    told: bool = False  # by a warning
    of_a_module: bool | None = None  # the value lies in a buffer or parameter of a module; None: not asked
