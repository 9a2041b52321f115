"""What is told of the advice and of the check, for machines."""

from __future__ import annotations

import math
from typing import Any

from .advice import Advice, Change, File
from .check import Check, Difference


def _change(file: File, change: Change) -> dict[str, Any]:
    source, site, option = file.source, change.site, change.option
    line, end_line, column, end_column = source.place_of(site)
    return {
        "filename": source.filename,
        "lineno": line,
        "end_lineno": end_line,
        "columns": [column, end_column],
        "function": site.function,
        "source": source.replaced_text(site),
        "replacement": source.code(site, file.chosen),
        "op": option.op,
        "overwrites": None if option.writes is None else source.text_of(site.operands[option.writes]),
        "calls": change.calls,
        "steps": change.steps,
        "bytes_less": change.gained // change.calls,
    }


def advice_as_dict(advice: Advice) -> dict[str, Any]:
    return {
        "sites": advice.sites,
        "changes": [_change(file, change) for file in advice.files for line in file.lines() for change in line],
        "left_as_they_are": dict(advice.against.most_common()),
        "not_looked_into": advice.left_alone,
        "not_imported": advice.not_imported,
    }


def _difference(found: Difference) -> dict[str, Any]:
    """JSON has no number for what is not finite."""
    return {"where": found.where, "of_norm": found.of_norm if math.isfinite(found.of_norm) else None}


def check_as_dict(check: Check) -> dict[str, Any]:
    plain, changed = check.peaks()
    return {
        "right": check.is_right,
        "guard": check.guarded.result["error"],
        "guard_of_the_plain": check.itself_guarded_error,
        "error": check.error,
        "steps": check.compared,
        "values": check.verdict,
        "apart": _difference(check.differs),
        "plain_apart": _difference(check.repeats_itself),
        "step_time": check.times(),
        "peak_bytes": {"plain": plain, "changed": changed},
    }
