"""Pictures of guard's report, as a light and as a dark terminal shows it: `python docs/screenshots.py` writes them anew."""

import os
import re
import subprocess
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "examples/silently_wrong.py"
# Of the terminal: paper, ink, and what the codes of the report say. 2 is dim, 31 red, 33 yellow.
THEMES = {
    "light": ("#ffffff", "#24292f", {"2": "#6e7781", "31": "#b3261e", "33": "#855300"}),
    "dark": ("#161b22", "#e6edf3", {"2": "#9198a1", "31": "#ff7b72", "33": "#e3b341"}),
}
WIDTH, HEIGHT, MARGIN = 7.8, 18, 16
# The report, with the colours that `run` gives it on a terminal.
REPORT = f"""
import runpy, safe_inplace
with safe_inplace.guard("warn") as watched:
    runpy.run_path({PROGRAM!r})
print("REPORT" + watched.summary(color=True))
"""


def report() -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REPORT],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    text = done.stdout.partition("REPORT")[2].strip().replace(f"{ROOT}{os.sep}", "")
    return f"$ python -m safe_inplace run {PROGRAM}\n{text}"


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def picture(text: str, theme: str) -> str:
    paper, ink, colors = THEMES[theme]
    lines = text.splitlines()
    width = round(2 * MARGIN + WIDTH * max(len(plain(line)) for line in lines))
    height = 2 * MARGIN + HEIGHT * len(lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="13" fill="{ink}">',
        f'<rect width="100%" height="100%" rx="8" fill="{paper}" stroke="{colors["2"]}" stroke-opacity="0.4"/>',
    ]
    for number, line in enumerate(lines):
        y = MARGIN + HEIGHT * number + 13
        column, codes = 0, []
        for piece in re.split(r"(\x1b\[[\d;]*m)", line):
            if piece.startswith("\x1b"):
                codes = [code for code in piece[2:-1].split(";") if code != "0"]
            elif piece.strip():
                style = "".join([f' fill="{colors[c]}"' for c in codes if c in colors] + [' font-weight="bold"'] * ("1" in codes))
                column += len(piece) - len(piece.lstrip())
                said = piece.strip()
                place = f'x="{MARGIN + WIDTH * column:.1f}" y="{y}" textLength="{WIDTH * len(said):.1f}"'
                parts.append(f'<text {place} xml:space="preserve"{style}>{escape(said)}</text>')
                column += len(piece.lstrip())
            else:
                column += len(piece)
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    text = report()
    for theme in THEMES:
        (ROOT / "docs" / f"report-{theme}.svg").write_text(picture(text, theme), encoding="utf-8")


if __name__ == "__main__":
    main()
