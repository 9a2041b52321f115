"""What C++ asks of Python (csrc/guard/policy.h), and all that it asks."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch

from .. import _C
from .hazards import Hazard
from .sites import Place

# What is known of a write, made while it runs and kept with the value until backward asks for it: no frame, no tensor.
Note: TypeAlias = "tuple[tuple[Any, ...], Hazard]"


class Policy(Protocol):
    """Decides for the values that are saved, and the writes that are made, under one guard. `verify`: are they fingerprinted?"""

    verify: bool

    def _on_write(self, saved: list[_C.Saved], op: str, place: Place, update: bool) -> list[Note | None] | None:
        """`op` at `place` is about to overwrite these values; each with a note is refused to backward once they are. `update`
        tells a write that no gradient flows through: under no_grad, or by a batch norm to its statistics."""

    def _on_version(self, saved: _C.Saved, op: str, place: Place) -> None:
        """`op` at `place` raised the version of this value and left its bytes as they were."""

    def _on_stale(self, saved: _C.Saved) -> None:
        """Backward asks for a value that was overwritten, or whose version has changed: what plain torch refuses."""

    def _on_exchange(self, saved: _C.Saved, now: torch.Tensor) -> torch.Tensor:
        """Backward asks for a tensor that lies in other memory than when it was saved (x.data = ...). Torch alone takes what is
        there now, which may be the same: parameters that were away, and came back."""

    def _on_mismatch(self, saved: _C.Saved) -> None:
        """Backward asks for a value whose bytes have changed."""

    def _compare(self, saved: _C.Saved, then: torch.Tensor, now: torch.Tensor) -> None:
        """Backward asks for a value on a device that works on its own: these are its fingerprints, which lie there."""

    def _parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The plain tensors that a subclass is made of."""

    def _arrived_parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The same, once their values are there."""

    def _written_parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Those whose values a write to the tensor changes."""

    def _no_digest(self, device: str) -> None:
        """A value is saved on a device that this build cannot fingerprint on."""
