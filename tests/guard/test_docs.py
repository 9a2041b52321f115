"""The report in docs/guard.md is what the command prints. `python -m tests.guard.test_docs` writes it anew."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "guard.md"
COMMAND = "python -m safe_inplace run examples/guard_hazard.py"
BLOCK = re.compile(r"(<!-- report: .*? -->\n).*?(<!-- /report -->)", re.DOTALL)


def report() -> str:
    done = subprocess.run(
        [sys.executable, *COMMAND.split()[1:]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 86, done.stderr
    text = done.stderr[done.stderr.index("safe_inplace guard:") :].replace(f"{ROOT}{os.sep}", "")
    return f"\n```console\n$ {COMMAND}\n{text.rstrip()}\n```\n\n"


def rendered(page: str) -> str:
    return BLOCK.sub(lambda found: found[1] + report() + found[2], page)


def test_the_page_shows_what_the_command_prints():
    page = PAGE.read_text(encoding="utf-8")
    assert BLOCK.search(page) and rendered(page) == page


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
