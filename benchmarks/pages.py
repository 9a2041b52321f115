"""What goes into a page that a command writes: tables, the part between two markers, and what it was measured on. Nothing here
needs a torch."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

# What commands write: without it a tree is that of its commit.
WRITTEN = ("benchmarks/results", "matrix/results", "README.md", "docs/matrix.md", "docs/coverage.md")


def markdown(header: Sequence[str], body: Sequence[Sequence[str]], right: int = 1) -> str:
    align = ["---" if i < right else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *body))


def insert(text: str, section: str, begin: str, end: str) -> str:
    """The text with the section between its markers."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page lacks the markers {begin} and {end}")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.MULTILINE))
    name = facts.get("model name") or platform.processor() or platform.machine()
    if not re.search(r"\d", name) and "model" in facts:
        name += f" family {facts['cpu family']} model {facts['model']}"
    return name


def git(tree: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def commit(tree: Path = ROOT, variable: str = "COMMIT") -> str:
    """The commit, and whether anything differed from it but what commands write."""
    top = git(tree, "rev-parse", "--show-toplevel")
    head = git(tree, "rev-parse", "--short=12", "HEAD")
    if top is None or head is None or Path(top).resolve() != tree.resolve():
        # A copy of the tree without its history; a repository around it has the history of something else.
        return os.environ.get(variable, "unknown")
    changed = git(tree, "status", "--porcelain", "--", ".", *(f":!{path}" for path in WRITTEN))
    return f"{head}-dirty" if changed else head
