"""What guard cannot do is said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

listener: Callable[[str], None] | None = None  # told instead of the warning
_said: set[str] = set()


def say_once(about: str, words: str) -> None:
    if about not in _said:
        _said.add(about)
        if listener is not None:
            listener(words)
            return
        warnings.warn(words, UserWarning, stacklevel=2)
