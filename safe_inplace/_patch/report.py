"""What was replaced, what not and why, how often it ran, and the way back."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence

from torch import nn

from .. import _counts
from .examine import Found
from .replace import Patch, patch_of, put_back

_SHOWN = 12


class PatchError(RuntimeError):
    """``patch(strict=True)`` met something that it could not replace."""


class Report:
    """What :func:`safe_inplace.patch` did to a model; printed, it says so.

    Attributes:
        replaced: a path and the name of the rule for each module that runs another forward now.
        refused: a path and the reason for each that looks as if it could, and does not.
    """

    def __init__(self, found: Sequence[Found], *, done: bool, left_out: str = "") -> None:
        self._found = [
            (weakref.ref(item.module), type(item.module).__name__, item.path, item.rule, item.reason) for item in found
        ]
        self._done = done
        self._left_out = left_out
        self.replaced = [(path, rule.name) for _, _, path, rule, reason in self._found if reason is None and rule is not None]
        self.refused = [(path, reason) for _, _, path, _, reason in self._found if reason is not None]
        self._patches: list[Patch] = []
        if done:
            kinds = {type(item.module) for item in found if item.reason is None}
            self._patches = [patch for patch in map(patch_of, kinds) if patch is not None]
        self._before = self._now()

    def _now(self) -> Counter[str]:
        now = Counter(_counts.counts())
        for patch in self._patches:
            for reason, times in patch.runs.items():
                now[f"forward.plain: {reason}" if reason else "forward.replaced"] += times
        return now

    def counts(self) -> dict[str, int]:
        """What happened since: how often the rules' forwards ran, how often the plain ones and why, and which way the ops went.

        ``"forward.replaced"`` and ``"forward.plain: <reason>"`` count the forwards of all patched blocks of these classes, the
        other names are those of :func:`safe_inplace.counts`, of the whole process.
        """
        return {name: times - self._before[name] for name, times in self._now().items() if times != self._before[name]}

    def restore(self) -> None:
        """Gives the modules back the classes that they had. Their attributes, hooks and parameters were never touched."""
        for reference, _, _, _, reason in self._found:
            module = reference()
            if self._done and reason is None and module is not None:
                put_back(module)

    def __str__(self) -> str:
        verb = "replaced" if self._done else "would be replaced"
        total = len(self.replaced) + len(self.refused)
        none = self._left_out or "no known blocks in this model"
        lines = [f"{len(self.replaced)} of {total} known blocks {verb}" if total else none]
        rows = Counter((name, rule.ops) for _, name, _, rule, reason in self._found if reason is None and rule is not None)
        lines += [f"  {times:>4} x {name} <- {ops}" for (name, ops), times in rows.items()]
        if self.refused:
            lines.append("not replaced:" if self._done else "would not be replaced:")
            lines += self._refusals()
        return "\n".join(lines)

    def _refusals(self) -> list[str]:
        reasons: dict[tuple[str, str], list[str]] = {}
        for _, name, path, _, reason in self._found:
            if reason is not None:
                reasons.setdefault((name, reason), []).append(path or "(the model)")
        lines = []
        for (name, reason), paths in list(reasons.items())[:_SHOWN]:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"  {paths[0]}{more}, {name}: {reason}")
        if len(reasons) > _SHOWN:
            lines.append(f"  and {len(reasons) - _SHOWN} more reasons, all in .refused")
        return lines

    __repr__ = __str__


def restore(model: nn.Module) -> None:
    """Undoes :func:`safe_inplace.patch` without its report, in copies of a patched model as well.

    Args:
        model: any module. Every patched one in it gets back the class that it had.

    Example:
        >>> import copy, torch, safe_inplace
        >>> from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN
        >>> model = ConvNextV2GRN(8)
        >>> report = safe_inplace.patch(model)
        >>> again = copy.deepcopy(model)
        >>> safe_inplace.restore(again)
        >>> type(again) is ConvNextV2GRN, type(model) is ConvNextV2GRN
        (True, False)
    """
    for module in model.modules():
        put_back(module)
