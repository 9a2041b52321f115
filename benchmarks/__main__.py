"""python -m benchmarks [run] | models | compare | targets | report | calls

run       measures, writes the result file of this device and torch, and renews tables and plots
models    measures steps of models of timm, transformers and diffusers, as far as these are installed: plain, with torch's best,
          with the ops in place and patched; a GPU's time is its own, else as the clock says
compare   measures the short set with this build and with another, in turns, and writes the ratios
targets   measures what the targets are stated for and prints target and measured side by side
report    makes the tables, the plots and the README's pictures from the result files
calls     what one call costs, in time or, with --callgrind, in instructions
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Generic, TypeVar

# The profiler, which counts the memory, announces each of its sessions otherwise, and what was allocated before them.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.op_table import BY_NAME

from . import calls, compare, first_look, models, report, results
from .cases import LAYOUTS, MODES, Case, default_cases, full_cases, target_cases
from .results import Row
from .runner import Effort, run

R = TypeVar("R", Row, compare.Compared, results.StepRow)

COMMANDS = ("run", "models", "compare", "targets", "report", "calls")
CLOCKS = {"wall": perf_counter, "cpu": process_time}
SIZES = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def size(text: str) -> int:
    digits = text.rstrip("KMGiBkmgb")
    return int(digits) * SIZES[text[len(digits) :].upper()]


def parse(arguments: list[str]) -> argparse.Namespace:
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["run", *arguments]
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = argparse.ArgumentParser(add_help=False)
    measuring.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measuring.add_argument("--rounds", type=int, default=Effort.rounds, help="turns of each implementation")
    measuring.add_argument("--seconds", type=float, default=Effort.seconds, help="of each turn, at least")
    measuring.add_argument("--within", type=float, metavar="SECONDS", help="start nothing more after as many")
    measuring.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    measuring.add_argument("--output", type=Path, help="the result file; a narrowed run writes none without it")
    narrowing = measuring.add_argument_group("narrow down what is measured")
    narrowing.add_argument("--ops", nargs="+", choices=list(BY_NAME))
    narrowing.add_argument("--layouts", nargs="+", choices=list(LAYOUTS))
    narrowing.add_argument("--dtypes", nargs="+", help="as float32 bfloat16")
    narrowing.add_argument("--sizes", nargs="+", type=size, help="bytes of the input, as 64 256KiB 128MiB")
    narrowing.add_argument("--modes", nargs="+", choices=list(MODES), metavar="MODE", help="; ".join(MODES))
    narrowing.add_argument("--sample", type=int, metavar="N", help="of these, N drawn at random, the same each time")
    runner = commands.add_parser("run", parents=[measuring], help="measure and write the results")
    runner.add_argument("--full", action="store_true", help="every op, layout, dtype, size and mode, not each with each: hours")
    runner.add_argument("--no-models", action="store_true", help="leave the model blocks out")
    real = commands.add_parser("models", help="steps of real models")
    real.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    real.add_argument("--rounds", type=int, default=9, help="turns of each way; the interval needs six")
    real.add_argument("--seconds", type=float, default=0.0, help="of each turn, at least; one step is always taken")
    real.add_argument("--within", type=float, metavar="SECONDS", help="start nothing more after as many")
    real.add_argument("--threads", type=int, default=torch.get_num_threads())
    real.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: what others do on the machine is no matter")
    real.add_argument("--output", type=Path, help="the result file; a narrowed run writes none without it")
    real.add_argument("--tiny", action="store_true", help="models of a few kilobytes, which say nothing about speed")
    real.add_argument("--families", nargs="+", help="by name, as the tables have them")
    real.add_argument("--dtypes", nargs="+", choices=results.STEP_DTYPES, default=results.STEP_DTYPES)
    real.add_argument("--modes", nargs="+", choices=results.STEP_MODES, default=results.STEP_MODES)
    pair = commands.add_parser("compare", parents=[measuring], help="two builds side by side")
    pair.add_argument("--base", type=Path, required=True, help="the other build: a wheel, or a tree that has been built")
    pair.add_argument("--turns", type=int, default=3, help="of each build at each case; the rounds are divided among them")
    pair.add_argument("--no-models", action="store_true", help="leave the model blocks out")
    pair.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    aims = commands.add_parser("targets", parents=[measuring], help="measured beside the targets")
    aims.add_argument("--from", dest="source", type=Path, help="judge this result file instead of measuring")
    aims.add_argument("--all", action="store_true", help="each figure, not each promise")
    commands.add_parser("report", help="tables, plots and the README's pictures from the result files")
    one = commands.add_parser("calls", help="the cost of one call")
    one.add_argument("--callgrind", action="store_true", help="count instructions; minutes for each op")
    one.add_argument("--ops", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    return parser.parse_args(arguments)


def narrow(cases: list[Case], options: argparse.Namespace) -> list[Case]:
    def within(value, chosen) -> bool:
        return not chosen or value in chosen

    chosen = [
        case
        for case in cases
        if within(case.op.name, options.ops)
        and within(case.layout.name, options.layouts)
        and within(str(case.dtype).removeprefix("torch."), options.dtypes)
        and within(case.size, options.sizes)
        and within(case.mode.name, options.modes)
    ]
    if options.sample and options.sample < len(chosen):
        return random.Random(0).sample(chosen, options.sample)
    return chosen


def is_narrowed(options: argparse.Namespace) -> bool:
    chosen = options.ops, options.layouts, options.dtypes, options.sizes, options.modes, options.sample
    return any((*chosen, options.no_compile))


def progress_of(console: Console) -> Progress:
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, console=console)


@dataclass
class Gathered(Generic[R]):
    rows: list[R] = field(default_factory=list)
    done: int = 0
    failure: compare.BuildFailed | None = None


def gather(
    found: Iterable[list[R]], total: int, title: str, options: argparse.Namespace, console: Console
) -> Gathered[R]:
    """The rows of each case as a file keeps them, until all are there, the time is up, a build fails or somebody interrupts."""
    gathered = Gathered[R]()
    why = ""
    began = perf_counter()
    with progress_of(console) as progress:
        task = progress.add_task(title, total=total)
        try:
            for rows in found:
                gathered.rows += map(results.as_kept, rows)
                gathered.done += 1
                progress.update(task, advance=1, description=rows[-1].title)
                if options.within and perf_counter() - began > options.within:
                    why = "the time is up"
                    break
        except KeyboardInterrupt:
            # What hours have measured is worth keeping.
            why = "interrupted"
        except compare.BuildFailed as failed:
            gathered.failure, why = failed, str(failed)
    if gathered.done < total:
        console.print(f"[bold red]{total - gathered.done} of {total} were not measured: {why}[/]")
    return gathered


def measure(cases: list[Case], stacks: list, options: argparse.Namespace, console: Console) -> list[Row]:
    effort = Effort(options.rounds, options.seconds, not options.no_compile)
    device = torch.device(options.device)
    found = run(cases, stacks, device, effort, full=getattr(options, "full", False))
    return gather(found, len(cases) + len(stacks), "warming up", options, console).rows


def compare_builds(arguments: list[str], options: argparse.Namespace, console: Console) -> int:
    device = torch.device(options.device)
    cases = narrow(default_cases(device), options)
    jobs = [*([] if options.no_models or is_narrowed(options) else models.for_device(device)), *cases]
    if options.serve:
        compare.serve(jobs, device, Effort(max(1, options.rounds // options.turns), options.seconds, compile=False))
        return 0
    with compare.builds(options.base, arguments) as (new, base):
        about = {k: v for k, v in new.about.items() if k not in ("package", "lacks")}
        about |= {"base": compare.name_of(options.base), "base_extension": base.about["extension"]}
        about["command"] = results.command_line(arguments)
        lacks = {*new.about["lacks"], *base.about["lacks"]}
        wanted = [job for job in range(len(jobs)) if job not in lacks]
        found = (compare.in_turns(new, base, job, options.turns) for job in wanted)
        gathered = gather(found, len(wanted), "comparing", options, console)
    rows = gathered.rows
    if gathered.done < len(wanted):
        about["measured"] = f"{gathered.done} of {len(wanted)} cases"
    if lacks:
        console.print(f"{len(lacks)} are of ops that one of the builds does not have")
    if not rows:
        console.print("nothing was compared")
        return 1
    console.print(compare.table(rows))
    console.print(about)
    if options.output:
        results.write(options.output, about, rows)
        console.print(f"written: {options.output}")
    console.print(compare.summary(rows))
    return 0 if gathered.failure is None else 1


def measure_models(options: argparse.Namespace, console: Console) -> int:
    # Not above: the base of a comparison may be a build without what these need.
    from . import families, steps

    unknown = {*(options.families or [])} - {family.name for family in families.FAMILIES}
    if unknown:
        raise SystemExit(f"no families {sorted(unknown)}: there are {[family.name for family in families.FAMILIES]}")
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    scale = families.TINY if options.tiny else families.for_device(device)
    chosen = [family for family in families.FAMILIES if not options.families or family.name in options.families]
    wanted = steps.cases(chosen, options.dtypes, options.modes)
    about = results.provenance(device) | {"clock": "device" if device.type == "cuda" else options.clock}
    effort = Effort(options.rounds, options.seconds, limit=float("inf"))
    found = steps.run(wanted, scale, device, effort, CLOCKS[options.clock])
    gathered = gather(found, len(wanted), "building", options, console)
    if not gathered.rows:
        console.print("nothing was measured")
        return 1
    if gathered.done < len(wanted):
        about["measured"] = f"{gathered.done} of {len(wanted)} cases"
    narrowed = (options.dtypes, options.modes) != (results.STEP_DTYPES, results.STEP_MODES)
    whole = not (options.tiny or options.families or narrowed)
    path = options.output or (results.MODELS / results.file_name(about) if whole else None)
    # Not wrapped: it is to be pasted.
    console.print(report.steps_table(gathered.rows), soft_wrap=True, markup=False, highlight=False)
    if path:
        results.write(path, about, gathered.rows)
        console.print(f"written: {path}")
        if path.parent.resolve() == results.MODELS:
            for made in (*report.write_models(), first_look.draw()):
                console.print(f"written: {made}")
    return 0


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    if options.command == "report":
        for path in (*report.write(), *report.write_models(), first_look.draw()):
            console.print(path)
        return 0
    if options.command == "models":
        return measure_models(options, console)
    if options.command == "calls":
        console.print(calls.report([BY_NAME[name] for name in options.ops], options.callgrind))
        return 0
    if options.command == "compare":
        return compare_builds(arguments, options, console)
    device = torch.device(options.device)
    if options.command == "targets":
        if options.source:
            about, rows = results.read(options.source)
        else:
            about, rows = (
                results.provenance(device),
                measure(narrow(target_cases(device), options), [], options, console),
            )
        console.print(about)
        console.print(report.targets_table(rows, about, every=options.all))
        return 0
    cases = narrow((full_cases if options.full else default_cases)(device), options)
    stacks = [] if options.no_models or is_narrowed(options) else models.for_device(device)
    # What was measured is what was there at the start.
    about = results.provenance(device)
    rows = measure(cases, stacks, options, console)
    if not rows:
        console.print("nothing was measured")
        return 1
    done, wanted = len({row.case for row in rows}), len(cases) + len(stacks)
    if done < wanted:
        about["measured"] = f"{done} of {wanted} cases"
    whole = not is_narrowed(options) and not options.no_models
    path = options.output or (results.RESULTS / results.file_name(about) if whole else None)
    if path:
        results.write(path, about, rows)
    console.print(report.rows_table(rows))
    console.print(report.targets_table(rows, about))
    if path:
        console.print(f"written: {path}")
        if path.parent.resolve() == results.RESULTS:
            for made in report.write():
                console.print(f"written: {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
