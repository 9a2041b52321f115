"""Tables and plots, made from rows and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from rich.table import Table as RichTable
from rich.text import Text

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from tests.op_table import OPS

from . import pages, targets
from .cases import CALL, LAYOUTS, MODES, RECORDED, TRAINING, TRAINING_STEP
from .implementations import COMPILED, COMPILED_IN_PLACE, IN_PLACE, ORDER, OURS, OUT_OF_PLACE
from .pages import README, ROOT, markdown
from .results import MODELS, PATCHED, PLAIN, RESULTS, WAYS, Row, StepRow, Table, read, result_files

DETAILS = RESULTS / "README.md"
PATCH_PAGE = ROOT / "docs" / "patch.md"
BEGIN, END = "<!-- benchmarks: written by python -m benchmarks, not by hand -->", "<!-- /benchmarks -->"

RIVALS = [IN_PLACE, OUT_OF_PLACE, COMPILED]
# Okabe and Ito's colours, told apart by every eye; ours is the strongest.
COLORS = {
    IN_PLACE: "#0072B2",
    OUT_OF_PLACE: "#56B4E9",
    COMPILED: "#E69F00",
    COMPILED_IN_PLACE: "#CC79A7",
    "triton": "#009E73",
    OURS: "#D55E00",
}
MARKERS = {IN_PLACE: "o", OUT_OF_PLACE: "s", COMPILED: "D", COMPILED_IN_PLACE: "P", "triton": "v", OURS: "o"}


def bytes_text(size: float) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size:.0f} B"


def seconds_text(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def rows_table(rows: list[Row]) -> RichTable:
    """Every case: our time, and how many times faster we are than each rival; losses in red."""
    table = RichTable(
        title="How many times faster than torch, in place, out of place and compiled", title_justify="left"
    )
    for column in ("op", "layout", "mode"):
        table.add_column(column)
    for column in ("time", "share", "in place", "out of", "compiled", "peak", "torch's"):
        table.add_column(column, justify="right", no_wrap=True)
    found = Table(rows)
    group = None
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    for case, by in sorted(found.cases.items(), key=lambda item: (dtypes.index(item[0][2]), item[0][3])):
        row = by[OURS]
        if (row.dtype, row.size) != group:
            group = row.dtype, row.size
            table.add_section()
            table.add_row(Text(f"{row.dtype}, {bytes_text(row.size)}", style="bold"))
        cells = []
        for rival in RIVALS:
            ratio = found.ratio(rival, OURS, *case)
            style = "" if ratio is None or ratio >= 1 else "red"
            cells.append(Text("" if ratio is None else f"{ratio:.2f}", style=style))
        peaks = [bytes_text(by[who].peak) for who in (OURS, OUT_OF_PLACE)]
        share = "" if row.share is None else f"{row.share:.2f}"
        table.add_row(row.op, row.layout, row.mode, seconds_text(row.p50), share, *cells, *peaks)
    return table


def number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.2f}"


def target_rows(rows: list[Row], about: dict[str, str], every: bool = False) -> list[list[str]]:
    verdicts = targets.judge(rows, about)
    if every:
        return [
            [v.promise, f"{'≤' if v.at_most else '≥'} {number(v.target)}", number(v.measured), v.what, yes_no(v.met)]
            for v in verdicts
        ]
    return [
        [
            s.promise,
            f"{'≤' if s.at_most else '≥'} {number(s.target)}",
            number(s.median),
            f"{number(s.worst.measured)} ({s.worst.what})",
            f"{s.met} of {s.of}",
        ]
        for s in targets.summarize(verdicts)
    ]


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def targets_table(rows: list[Row], about: dict[str, str], every: bool = False) -> RichTable:
    table = RichTable(title="Targets", title_justify="left")
    names = ("promise", "target", "measured", "of", "met") if every else ("promise", "target", "median", "worst", "met")
    for name in names:
        table.add_column(name)
    for cells in target_rows(rows, about, every):
        table.add_row(*cells)
    return table


def ratios(table: Table, *case) -> str:
    found = [table.ratio(rival, OURS, *case) for rival in RIVALS]
    return " / ".join("-" if r is None else f"{r:.2f}" for r in found) if any(found) else "-"


def largest_forward(rows: list[Row]) -> int:
    return max((r.size for r in rows if r.mode == "forward" and r.share), default=0)


def largest_step(table: Table, op: str, mode: str) -> tuple:
    """The largest case of training with vectors; one op's target is stated for a size of its own."""
    steps = [case for case in table.cases if case[:3] == (op, "last_dim_vector", "float32") and case[4] == mode]
    return max(steps, key=lambda case: case[3], default=(op, "last_dim_vector", "float32", 0, mode))


TRAINED = [m for m in TRAINING if m.timed == "forward+backward"]


def per_op(rows: list[Row]) -> str:
    table, size = Table(rows), largest_forward(rows)
    body = [
        [
            f"`{op.name}`",
            ratios(table, op.name, "full", "float32", CALL, RECORDED.name),
            ratios(table, op.name, "full", "float32", size, "forward"),
            ratios(table, op.name, "last_dim_vector", "float32", size, "forward"),
            ratios(table, *largest_step(table, op.name, TRAINED[-1].name)),
        ]
        for op in OPS
    ]
    large = bytes_text(size)
    header = [
        "",
        "one call, 16 elements",
        f"forward, {large}",
        "the same, vectors",
        "forward + backward, trained vectors",
    ]
    return markdown(header, body)


def per_model(rows: list[Row]) -> str:
    table = Table(rows)
    body = []
    for case, by in table.cases.items():
        if case[4] == "step":
            ours, theirs = by[OURS], by[OUT_OF_PLACE]
            body.append(
                [
                    case[0],
                    seconds_text(theirs.p50),
                    seconds_text(ours.p50),
                    f"{theirs.p50 / ours.p50:.2f}",
                    bytes_text(theirs.peak),
                    bytes_text(ours.peak),
                ]
            )
    header = [
        "forward + backward",
        "step, torch",
        "step, ours",
        "times faster",
        "peak memory, torch",
        "peak memory, ours",
    ]
    return markdown(header, body) if body else ""


def about_text(about: dict[str, str]) -> str:
    extension = f"extension {about['extension']}, " if "extension" in about else ""
    cut = f", {about['measured']}" if "measured" in about else ""
    return (
        f"{about['device']}; torch {about['torch']}, Python {about['python']}, commit {about['commit']}, "
        f"{extension}load before {about['load']}, {about['date']}: `{about['command']}`{cut}"
    )


def plot_names(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.stem}-share.png"), path.with_name(f"{path.stem}-ratio.png")


def summary(path: Path) -> str:
    """What a result file says of each op and of the model blocks."""
    about, rows = read(path)
    share, ratio = plot_names(path)
    parts = [
        "Times faster than torch in place / torch out of place / `torch.compile`, float32:",
        per_op(rows),
        per_model(rows),
        f"![Ratio to torch, per op]({ratio.name})",
        f"![Bytes per second over those of {yardstick(about)}, against size]({share.name})",
    ]
    return "\n\n".join(p for p in parts if p)


def readme_section(folder: Path = RESULTS) -> str:
    """A plot of each result file; the tables are on the page beside the files."""
    parts = []
    for path in result_files(folder):
        _, ratio = plot_names(path)
        ratio = ratio.relative_to(ROOT) if ratio.is_relative_to(ROOT) else ratio
        parts.append(f"**{about_text(read(path)[0])}**\n\n![Times faster than torch, per op]({ratio})")
    return "\n\n".join(parts) or "No results yet: `make bench` measures."


def details(folder: Path = RESULTS) -> str:
    """The page beside the result files: the tables of each, in short and whole."""
    parts = ["# Results", "Written by `python -m benchmarks report` from the result files here."]
    for path in result_files(folder):
        about, rows = read(path)
        body = target_rows(rows, about)
        parts += [
            f"## {about['device']}, torch {about['torch']}",
            f"[{path.name}]({path.name}). {about_text(about)}",
            summary(path),
            "### What was promised",
            markdown(["promise", "target", "median", "worst", "met"], body),
            "### Every case",
            f"Our time, the share of its bytes per second in those of {yardstick(about)}, measured beside it, how many times "
            "faster than torch in place / torch out of place / `torch.compile`, and the peak of memory, ours and torch's out of "
            "place.",
            cases_markdown(rows),
        ]
    return "\n\n".join(parts) + "\n"


def cases_markdown(rows: list[Row]) -> str:
    table = Table(rows)
    body = []
    for case, by in table.cases.items():
        ours = by[OURS]
        share = "" if ours.share is None else f"{ours.share:.2f}"
        peaks = f"{bytes_text(ours.peak)}, {bytes_text(by[OUT_OF_PLACE].peak)}"
        cells = [ours.op, ours.layout, ours.dtype, bytes_text(ours.size), ours.mode, seconds_text(ours.p50), share]
        body.append([*cells, ratios(table, *case), peaks])
    header = ["op", "layout", "dtype", "size", "mode", "time", "share", "times faster", "peak"]
    return markdown(header, body, right=5)


def insert(text: str, section: str) -> str:
    return pages.insert(text, section, BEGIN, END)


def plot_share(path: Path, out: Path) -> None:
    about, rows = read(path)
    layouts = ["full", "last_dim_vector"]
    figure, axes = plt.subplots(
        len(layouts), len(OPS), figsize=(14, 5.6), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    forward = [r for r in rows if r.mode == "forward" and r.dtype == "float32" and r.share]
    for line, layout in zip(axes, layouts, strict=True):
        for axis, op in zip(line, OPS, strict=True):
            for who in ORDER:
                points = sorted(
                    (r.size, r.share)
                    for r in forward
                    if (r.op, r.layout) == (op.name, layout) and r.implementation == who
                )
                if points:
                    style = {"linewidth": 2.2, "zorder": 3} if who == OURS else {"linewidth": 1.2}
                    axis.plot(
                        *zip(*points, strict=True),
                        color=COLORS[who],
                        marker=MARKERS[who],
                        markersize=4,
                        label=who,
                        **style,
                    )
            axis.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=10)
            axis.grid(True, color="0.92")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{op.name}  {layout.replace('_', ' ')}", fontsize=10, loc="left")
            axis.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([64, 4096, 1 << 18, 1 << 24, 1 << 30]))
            axis.xaxis.set_major_formatter(lambda value, _: bytes_text(value).replace("i", "").replace(" ", ""))
            axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axis in axes[-1]:
        axis.set_xlabel("input, bytes")
    for axis in axes[:, 0]:
        axis.set_ylabel("share")
    heading = f"Forward, float32: bytes per second over those of {yardstick(about)}.  {title(about)}"
    finish(figure, axes, heading, out)


def plot_ratio(path: Path, out: Path) -> None:
    about, rows = read(path)
    table, size = Table(rows), largest_forward(rows)
    training = [("last_dim_vector", m) for m in TRAINED]
    lines = [("one call, grad on", ("full", CALL, RECORDED.name))]
    measured = {row.layout for row in rows}
    lines += [(name.replace("_", " "), (name, size, "forward")) for name in LAYOUTS if name in measured]
    for layout, mode in training:
        lines.append(
            (
                f"train: {'trained' if mode.trainable else 'frozen'} vectors, {mode.holder}'s gradient",
                (layout, size, mode.name),
            )
        )
    figure, axes = plt.subplots(1, len(OPS), figsize=(14, 5.2), sharey=True, sharex=True, layout="constrained")
    axes = axes.reshape(1, -1)
    for axis, op in zip(axes[0], OPS, strict=True):
        for height, (_, (layout, bytes_, mode)) in enumerate(reversed(lines)):
            case = op.name, layout, "float32", bytes_, mode
            if MODES[mode].backward:
                case = largest_step(table, op.name, mode)
            found = {r: table.ratio(r, OURS, *case) for r in ORDER if r != OURS}
            values = [v for v in found.values() if v]
            if values:
                axis.plot([min([1, *values]), max([1, *values])], [height, height], color="0.88", zorder=1)
            for rival, value in found.items():
                if value:
                    axis.scatter(value, height, color=COLORS[rival], marker=MARKERS[rival], s=30, zorder=3, label=rival)
        axis.axvline(1, color="0.3", linewidth=1)
        axis.axvspan(1e-3, 1, color="#D55E00", alpha=0.05)
        axis.axhline(len(TRAINED) - 0.5, color="0.8", linewidth=0.8)
        axis.axhline(len(lines) - 1.5, color="0.8", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x")
        axis.set_title(op.name, fontsize=10, loc="left")
        axis.grid(True, axis="x", color="0.92")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    drawn = [
        v
        for r in ORDER
        for case in table.cases
        if r != OURS
        and (v := table.ratio(r, OURS, *case))
        and case[4] != "step"
        and case[2] == "float32"
        and case[3] in (CALL, size, TRAINING_STEP)
    ]
    if drawn:
        low, high = math.floor(math.log2(min(drawn))), math.ceil(math.log2(max(drawn)))
        axes[0, 0].set_xlim(2**low, 2**high)
        # Labels of half a dozen at most fit below a panel; 1x is one of them.
        step = -(-(high - low) // 6)
        powers = range(-(-low // step) * step, high + 1, step)
        axes[0, 0].xaxis.set_major_locator(matplotlib.ticker.FixedLocator([2.0**i for i in powers]))
    axes[0, 0].set_yticks(range(len(lines)), [name for name, _ in reversed(lines)])
    finish(figure, axes, f"How many times faster than torch, float32, {bytes_text(size)}.  {title(about)}", out)


def yardstick(about: dict[str, str]) -> str:
    """What shares are shares of (see `runner.Reference`)."""
    return "torch's contiguous add_, past the cache" if about["kind"] == "cpu" else "a copy on the device"


def title(about: dict[str, str]) -> str:
    return f"{about['device']}; torch {about['torch']}"


def finish(figure, axes, heading: str, out: Path, order: Sequence[str] = ORDER) -> None:
    handles = {}
    for axis in axes.flat:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    ordered = [who for who in order if who in handles]
    figure.suptitle(heading, fontsize=11, x=0.01, ha="left")
    if ordered:
        figure.legend(
            [handles[w] for w in ordered], ordered, loc="outside lower center", ncols=len(ordered), frameon=False
        )
    # Without a date or a version inside, the same rows make the same file.
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)


def write(folder: Path = RESULTS, readme: Path = README) -> list[Path]:
    """Makes everything that is made from the result files, and tells what it wrote."""
    made = []
    for path in result_files(folder):
        share, ratio = plot_names(path)
        plot_share(path, share)
        plot_ratio(path, ratio)
        made += [share, ratio]
    (folder / DETAILS.name).write_text(details(folder))
    readme.write_text(insert(readme.read_text(), readme_section(folder)))
    return [*made, folder / DETAILS.name, readme]


Steps = dict[tuple, dict[str, StepRow]]


def by_case(rows: list[StepRow]) -> Steps:
    found: Steps = {}
    for row in rows:
        found.setdefault(row.case, {})[row.way] = row
    return found


def interval_text(row: StepRow) -> str:
    return f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"


def counts_text(counts: Iterable[int | None]) -> str:
    return " / ".join("-" if count is None else str(count) for count in counts)


def steps_table(rows: list[StepRow]) -> str:
    """Every case: plain's time, how many times faster each other way is, and what was seen of all four."""
    on_device = any(row.launches is not None for row in rows)
    header = ["model", "of", "dtype", "step", "largest input", "plain", "sums and products of it"]
    header += [*(f"{way}, times faster" for way in WAYS[1:]), "blocks", "peak memory", "takeovers", "CopySlices"]
    header += ["in kernels", "launches", "copies"] if on_device else []
    body = []
    for case, ways in by_case(rows).items():
        seen = [ways[way] for way in WAYS]
        plain = ways[PLAIN]
        cells = [case[0], plain.library, *case[1:], bytes_text(plain.size), seconds_text(plain.p50)]
        cells.append("-" if plain.sums is None else f"{plain.sums:.0%}")
        cells += [*(interval_text(row) for row in seen[1:]), str(ways[PATCHED].replaced)]
        cells += [" / ".join(bytes_text(row.peak) for row in seen)]
        cells += [counts_text(row.takeovers for row in seen), counts_text(row.copyslices for row in seen)]
        if on_device:
            cells.append(" / ".join(seconds_text(row.kernel_time or 0) for row in seen))
            cells += [counts_text(row.launches for row in seen), counts_text(row.copies for row in seen)]
        body.append(cells)
    return markdown(header, body, right=4)


def patched_table(rows: list[StepRow], gained: bool) -> str:
    """Of each model how many times faster it is patched: of those that gain in some case, or of those that do in none."""
    table = by_case(rows)
    cases = list(dict.fromkeys((dtype, mode) for _, dtype, mode in table))
    body = []
    for family in dict.fromkeys(row.family for row in rows):
        found = [table.get((family, *case), {}).get(PATCHED) for case in cases]
        if any(row is not None and row.low > 1 for row in found) == gained:
            body.append([family, *("-" if row is None else interval_text(row) for row in found)])
    return markdown(["model", *(f"{dtype}, {mode}" for dtype, mode in cases)], body) if body else "None."


def patch_section(folder: Path = MODELS) -> str:
    """What docs/patch.md says of the models that were measured."""
    parts = []
    for path in result_files(folder):
        about, rows = read(path, StepRow)
        parts += [
            f"**{about_text(about)}**",
            "Times faster than plain, with the interval of the median. No case is above 1 with its whole interval:",
            patched_table(rows, gained=False),
            "Some case is:",
            patched_table(rows, gained=True),
        ]
    return "\n\n".join(parts) or "Nothing has been measured yet: `python -m benchmarks models` does."


def models_page(folder: Path = MODELS) -> str:
    parts = [
        "# Models",
        "Written by `python -m benchmarks report` from the result files here. Each model of a library is built shallow, with "
        "random weights, and a step is forward and backward, or forward alone. Where four values stand in a cell they are of the "
        "plain model, of the same blocks with torch's best (`addcmul`, in-place methods), with the ops in place, and of "
        "`patch(model)`. What a plain step spends in sums and products, as the profiler sees it, is the most that another way to "
        "write them could save, if it took no time at all. GPT-2 and Llama have no rule: their blocks were written with the ops "
        "for this measurement.",
    ]
    for path in result_files(folder):
        about, rows = read(path, StepRow)
        parts += [
            f"## {about['device']}, torch {about['torch']}",
            f"[{path.name}]({path.name}). {about_text(about)}, {about['clock']} clock",
            f"![Times faster than plain]({path.with_suffix('.png').name})",
            steps_table(rows),
        ]
    return "\n\n".join(parts) + "\n"


WAY_COLORS = dict(zip(WAYS[1:], (COLORS[OUT_OF_PLACE], COLORS[COMPILED_IN_PLACE], COLORS[OURS]), strict=True))


def plot_steps(path: Path, out: Path) -> None:
    about, rows = read(path, StepRow)
    table = by_case(rows)
    dtypes, modes = (list(dict.fromkeys(values)) for values in zip(*((case[1], case[2]) for case in table), strict=True))
    names = list(dict.fromkeys(case[0] for case in table))
    size = (3.4 * len(dtypes) + 1.5, len(modes) * (0.24 * len(names) + 0.7) + 0.8)
    figure, axes = plt.subplots(
        len(modes), len(dtypes), figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for line, mode in zip(axes, modes, strict=True):
        for axis, dtype in zip(line, dtypes, strict=True):
            for height, name in enumerate(reversed(names)):
                for way, color in WAY_COLORS.items():
                    row = table.get((name, dtype, mode), {}).get(way)
                    if row is None:
                        continue
                    if way == PATCHED:
                        axis.plot([row.low, row.high], [height, height], color=color, linewidth=1.5, alpha=0.5)
                    axis.scatter(row.ratio, height, color=color, s=24 if way == PATCHED else 12, zorder=3, label=way)
            axis.axvline(1, color="0.3", linewidth=1)
            axis.set_title(f"{dtype}, {mode}", fontsize=10, loc="left")
            axis.grid(True, axis="x", color="0.92")
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(names)), names[::-1], fontsize=8)
    finish(figure, axes, f"Times faster than plain.  {title(about)}", out, list(WAY_COLORS))


def write_models(folder: Path = MODELS, page: Path = PATCH_PAGE) -> list[Path]:
    """Makes everything that is made from the result files of models, and tells what it wrote."""
    made = []
    for path in result_files(folder):
        plot_steps(path, path.with_suffix(".png"))
        made.append(path.with_suffix(".png"))
    (folder / "README.md").write_text(models_page(folder))
    page.write_text(insert(page.read_text(), patch_section(folder)))
    return [*made, folder / "README.md", page]
