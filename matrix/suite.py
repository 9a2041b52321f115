"""The suite on a torch: installed, built for, and tested, by the targets of make that everybody uses."""

from __future__ import annotations

import shlex
import shutil
import time

from benchmarks.pages import ROOT

from .environments import ANEW, LOGS, Environment
from .rows import Row, counts


def test(environment: Environment, arguments: str = "", reuse: bool = False) -> Row:
    row = Row(environment.torch, environment.version, arguments=arguments)
    if not row.install(environment):
        return row
    if not reuse:
        shutil.rmtree(ROOT / "build" / environment.key, ignore_errors=True)
    before = time.monotonic()
    done = environment.make(f"build/{environment.key}/built", **({} if reuse else ANEW))
    row.failed = done.status != 0
    if row.failed:
        row.problem = f"not built: {done.last_words}"
        return row
    row.build_seconds = None if reuse else time.monotonic() - before
    row.read_note((ROOT / "safe_inplace" / "_build_info.py").read_text())

    xml = LOGS / f"{environment.key}.xml"
    xml.unlink(missing_ok=True)
    done = environment.make("test", arguments=f"--junitxml={shlex.quote(str(xml))} {arguments}")
    row.failed = done.status != 0
    row.tests = counts(xml)
    if row.failed and not (row.tests and row.tests.failed):
        row.problem = f"the tests did not end: {done.last_words}"
    row.has_its_torch(environment)
    return row
