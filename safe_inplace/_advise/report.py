"""What is told of the advice and of the check, in words."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator

from .._guard.words import bytes_in_words
from .advice import Advice, Change, File, here
from .check import Check
from .evidence import SMALLEST


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"


def _path(name: str) -> str:
    return os.path.relpath(name, here()) if name.startswith(os.path.join(here(), "")) else name


def _why(file: File, change: Change) -> str:
    site, option = change.site, change.option
    said = []
    if site.form.first is not None:
        said.append("one pass instead of two")
    if option.writes is not None:
        written = file.source.text_of(site.operands[option.writes])
        said.append(f"nobody else had the memory of `{written}`, and it is not read again")
    elif change.gained > change.calls * change.largest * (site.form.first is not None):
        said.append("written over a temporary")
    return "; ".join(said)


def _of_line(file: File, changes: list[Change]) -> Iterator[str]:
    first = min(change.site.position[0] for change in changes)
    old, new = file.source.lines_of([change.site for change in changes], file.chosen)
    yield f"  {_path(file.source.filename)}:{first} in {changes[0].site.function}"
    yield from (f"    - {line}" for line in old)
    yield from (f"    + {line}" for line in new)
    for change in changes:
        seen = f"{_count(change.calls, 'call')} in {_count(change.steps, 'step')}"
        yield f"    {seen}, {bytes_in_words(change.gained // change.calls)} less allocated in each: {_why(file, change)}"
    yield ""


def advice_in_words(program: str, advice: Advice) -> str:
    lines = [
        f"safe_inplace advise: {program}",
        f"{_count(len(advice.changes), 'change')} found, among {advice.sites} sums and products with results of "
        f"{SMALLEST // 1024} KiB or more",
        "",
    ]
    for file in advice.files:
        for changes in file.lines():
            lines += _of_line(file, changes)
    if advice.against:
        lines.append("left as they are:")
        lines += [f"  {number:4d}  {why}" for why, number in advice.against.most_common()]
    lines += [f"not looked into, since it cannot be changed safely: {_path(name)}" for name in advice.left_alone]
    lines += [f"--include {name}: the program imports no such package" for name in advice.not_imported]
    if advice.changes:
        lines.append("This is evidence of one run and no proof: other inputs may take other ways through the code.")
    elif not advice.against:
        lines.append("Nothing can be gained here.")
    return "\n".join(lines)


def check_in_words(check: Check) -> str:
    lines = ["", "checked, the program beside the changed one, each in processes of its own:"]
    error = check.guarded.result["error"]
    as_well = "; of the program as it is: " + check.itself_guarded_error if check.itself_guarded_error else ""
    lines.append(f"  under guard: {error or 'no hazard'}{as_well}")
    if check.error is not None:
        lines.append(f"  the changed program raises: {check.error}")
    itself, apart = check.repeats_itself, check.differs
    steps = _count(check.compared, "step")
    if check.verdict == "none to compare":
        lines.append("  values: none to compare; there is no backward pass, and no tensor that a module of the program returns")
    elif check.verdict == "not repeated":
        lines.append(
            f"  values: the program does not repeat itself ({itself.where} differs by {itself.of_norm:.1e} of its norm); seed "
            "it, and what it computes can be compared"
        )
    elif check.verdict == "equal":
        lines.append(f"  values: the first {steps} equal bit for bit")
    else:
        verdict = check.verdict.upper() if check.verdict == "more than rounding" else check.verdict
        lines.append(f"  values: {verdict}; in the first {steps} {apart.where} differs most, by {apart.of_norm:.1e} of its norm")
    times = check.times()
    if times:
        runs = ", ".join(f"{time:.2f}" for time in times)
        gain = "" if min(times) < 1 and max(times) < 1 else "; no gain in time is shown"
        lines.append(f"  time of a step: {statistics.median(times):.2f} of the plain one (by pairs of runs: {runs}){gain}")
    plain, changed = check.peaks()
    gain = "" if changed < plain else "; no gain in memory is shown"
    lines.append(f"  memory at the most: {bytes_in_words(changed)}, plain {bytes_in_words(plain)}{gain}")
    return "\n".join(lines)
