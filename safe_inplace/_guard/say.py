"""What guard cannot do is said once."""

from __future__ import annotations

import warnings

_said: set[str] = set()


def say_once(about: str, words: str) -> None:
    if about not in _said:
        _said.add(about)
        warnings.warn(words, UserWarning, stacklevel=2)
