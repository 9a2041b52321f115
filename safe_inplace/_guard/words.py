"""Sizes and operators in words."""

from __future__ import annotations


def bytes_in_words(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def short(operator: str) -> str:
    return operator.replace("::", ".")
