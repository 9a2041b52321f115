"""The report in docs/guard.md is what the command prints. `python -m tests.guard.test_docs` writes it anew."""

import os
import re

import torch

from .test_run import HAZARDS, ROOT, run

PAGE = ROOT / "docs" / "guard.md"
PROGRAM = "examples/guard_hazard.py"
BLOCK = re.compile(r"(<!-- report: .*? -->\n).*?(<!-- /report -->)", re.DOTALL)


def report_of(*arguments: str) -> str:
    """What the command says of a program of the repository."""
    done = run(ROOT, *arguments)
    assert done.returncode == HAZARDS, done.stderr
    return done.stderr[done.stderr.index("safe_inplace guard:") :].replace(f"{ROOT}{os.sep}", "")


def report() -> str:
    return f"\n```console\n$ python -m safe_inplace run {PROGRAM}\n{report_of(PROGRAM).rstrip()}\n```\n\n"


def rendered(page: str) -> str:
    return BLOCK.sub(lambda found: found[1] + report() + found[2], page)


def test_the_page_shows_what_the_command_prints():
    page = PAGE.read_text(encoding="utf-8")
    # How a module shows itself is torch's own matter: a LayerNorm of 2.11 does not tell of its bias.
    shown = page.replace("LayerNorm((64,), eps=1e-05, elementwise_affine=True, bias=True)", repr(torch.nn.LayerNorm(64)))
    assert BLOCK.search(page) and rendered(page) == shown


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
