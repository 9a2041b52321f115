"""The benchmarks: that they measure what they say, and that what is shown is what was measured."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import cases, compare, families, first_look, models, pages, report, results, steps, targets
from benchmarks.cases import (
    CALL,
    FORWARD,
    LAYOUTS,
    MEETING,
    MODES,
    RECORDED,
    Case,
    KiB,
    MiB,
    default_cases,
    full_cases,
    past_cache,
    product,
    target_cases,
)
from benchmarks.implementations import COMPILED, COMPILED_IN_PLACE, IN_PLACE, OURS, OUT_OF_PLACE, implementations
from benchmarks.measure import Clock, Workload, interval_of_median
from benchmarks.runner import Effort, in_turns, run_case, run_model
from tests.op_table import BY_NAME, OPS

CPU = torch.device("cpu")
TINY = Effort(rounds=1, seconds=1e-6, compile=False)
SIZE = 64 * KiB


class NoReference:
    bytes = 1

    @staticmethod
    def samples(seconds):
        return [1.0]


def case(op, layout, mode, dtype=torch.float32, size=SIZE) -> Case:
    return Case(BY_NAME[op], LAYOUTS[layout], dtype, size, MODES[mode])


def measured(*arguments, **keywords) -> dict[str, results.Row]:
    return {row.implementation: row for row in run_case(case(*arguments, **keywords), CPU, TINY, NoReference())}


@pytest.mark.parametrize(
    "op, layout", [(op, layout) for op in BY_NAME for layout in LAYOUTS if case(op, layout, "forward").makes_sense()]
)
def test_every_implementation_computes_the_same(op, layout):
    chosen = case(op, layout, "forward")
    outcomes = []
    for function in implementations(chosen, CPU, compile=False).values():
        outcomes.append(function(Workload(chosen, CPU).input, *Workload(chosen, CPU).operands))
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0])


def test_a_pause_within_a_pause_is_skipped_once():
    clock = Clock()
    before = clock()
    clock.pause()
    clock.pause()
    time.sleep(0.05)
    clock.resume()
    clock.resume()
    time.sleep(0.02)
    assert 0.02 <= clock() - before < 0.05


def test_turns_go_round_and_end_when_a_case_takes_too_long():
    took: list[str] = []
    samplers = {name: lambda seconds, name=name: took.append(name) or [seconds] for name in "abc"}
    samples = in_turns(samplers, Effort(rounds=4, seconds=0.5))
    assert samples == dict.fromkeys("abc", [0.5] * 4)
    assert "".join(took) == "abcbcacababc"
    assert len(in_turns(samplers, Effort(rounds=4, limit=0))["a"]) == 3


@pytest.mark.parametrize("mode", [m for m in MODES if "backward" in m])
def test_backward_is_timed(mode):
    """A pass over 4 MiB takes longer than 10 us, whoever holds the gradient."""
    for row in measured("mul_", "last_dim_vector", mode, size=4 * 1024 * KiB).values():
        assert row.p20 > 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_every_mode(mode):
    rows = measured("mul_add_", "last_dim_vector", mode)
    assert list(rows) == [IN_PLACE, OUT_OF_PLACE, OURS]
    for row in rows.values():
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert row.samples > 0
        assert (row.saved is None) == (mode == "forward")
    assert MODES[mode].grad is False or rows[OURS].saved == case("mul_add_", "last_dim_vector", mode).saved()


def test_peak_sees_a_full_size_tensor_where_there_is_one():
    rows = measured("mul_add_", "last_dim_vector", "backward, frozen, held by engine")
    assert rows[OUT_OF_PLACE].peak >= SIZE
    assert rows[OURS].peak < SIZE
    rows = measured("mul_add_", "last_dim_vector", "backward, frozen, held by caller")
    assert SIZE <= rows[OURS].peak < 2 * SIZE


def test_bytes_come_from_the_op_table():
    vector = 4 * LAYOUTS["last_dim_vector"].operand(0, LAYOUTS["last_dim_vector"].shape(SIZE // 4))[0]
    assert case("add_", "full", "forward").bytes() == 3 * SIZE
    assert case("add_", "scalar", "forward").bytes() == 2 * SIZE
    assert case("mul_add_", "last_dim_vector", "forward").bytes() == 2 * SIZE + 2 * vector
    # The gradient of a sum is the gradient: nothing moves.
    assert case("add_", "full", "forward+backward, frozen, held by engine").bytes() == 3 * SIZE
    # Backward reads the gradient, the kept input and the scale, and writes one full-size gradient and two vectors.
    assert case("mul_add_", "last_dim_vector", "backward, trainable, held by caller").bytes() == 3 * SIZE + 3 * vector


@pytest.mark.parametrize("select", [target_cases, default_cases, full_cases])
def test_selections_cover_the_table(select):
    selected = select(CPU)
    assert {c.op.name for c in selected} == set(BY_NAME)
    assert {c.layout.name for c in selected} == set(LAYOUTS)
    assert len({c.key for c in selected}) == len(selected)
    for chosen in selected:
        assert math.prod(chosen.shape) * chosen.dtype.itemsize == chosen.size
        assert all(math.prod(s) > 0 for s in chosen.operand_shapes() if s is not None)


@pytest.mark.parametrize("cache, size", [(0, 64), (32, 64), (42, 64), (43, 128), (300, 512)])
def test_what_is_past_the_cache_follows_the_machine(monkeypatch, cache, size):
    monkeypatch.setattr(cases, "last_cache", lambda: cache * MiB)
    # Without its memory of this machine's.
    assert past_cache.__wrapped__(CPU) == size * MiB
    assert past_cache.__wrapped__(torch.device("cuda")) == 64 * MiB


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")
def test_compiled_beside_eager():
    chosen = case("add_", "full", "forward")
    rows = run_case(chosen, CPU, replace(TINY, compile=True), NoReference())
    assert {COMPILED, COMPILED_IN_PLACE} <= {row.implementation for row in rows}
    # Each still does its own once all of them are compiled.
    found = implementations(chosen, CPU)
    for _ in range(2):
        for name, function in found.items():
            workload = Workload(chosen, CPU)
            before = workload.input.clone()
            with torch.no_grad():
                function(workload.input, *workload.operands)
            assert torch.equal(workload.input, before) == (name in (OUT_OF_PLACE, COMPILED)), name


@pytest.mark.parametrize("model", models.models(batch=1, width=128, depth=2), ids=lambda m: m.name)
def test_models_written_both_ways_are_the_same(model):
    ways = {}
    for formulas in (models.Plain, models.InPlace):
        module, inputs = model.make(formulas, CPU)
        loss = models.step(module, inputs)
        ways[formulas] = [loss, *(p.grad for p in module.parameters())]
    for plain, in_place in zip(*ways.values(), strict=True):
        torch.testing.assert_close(in_place, plain, rtol=1e-4, atol=1e-6)


def rows_of_a_tiny_run() -> list[results.Row]:
    rows = []
    for mode, size in ((FORWARD, SIZE), (RECORDED, CALL), (MODES["forward+backward, trainable, held by engine"], SIZE)):
        for chosen in product(OPS, ["full", "last_dim_vector"], [torch.float32], [size], [mode]):
            rows += run_case(chosen, CPU, TINY, NoReference())
    return rows + run_model(models.models(batch=1, width=128, depth=1)[2], CPU, TINY, compile=False)


def test_files_tables_and_plots_follow_from_the_rows(tmp_path):
    rows, about = rows_of_a_tiny_run(), results.provenance(CPU)
    path = tmp_path / results.file_name(about)
    results.write(path, about, rows)
    back = results.read(path)
    assert back[0] == about
    assert [row.case for row in back[1]] == [row.case for row in rows]
    results.write(path, *back)
    assert results.read(path) == back

    readme = tmp_path / "README-of-the-project.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    made = report.write(tmp_path, readme)
    first = {p: p.read_bytes() for p in made}
    assert report.write(tmp_path, readme) == made
    assert {p: p.read_bytes() for p in made} == first
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert made[1].name in text
    assert all(f"| `{name}` |" in made[-2].read_text() for name in BY_NAME)


def test_readme_is_what_the_result_files_say():
    text = report.README.read_text()
    assert report.insert(text, report.readme_section()) == text
    if results.result_files():
        assert report.DETAILS.read_text() == report.details()


def test_the_first_picture_shows_what_happens(tmp_path):
    """Torch alone is wrong and silent, guard names both lines, and the bars are the patched steps of models with a rule."""
    gradient = json.loads(first_look.said().removeprefix("x.grad = "))
    assert gradient == pytest.approx([math.e + 1] * 3)  # exp's is e
    report_of_guard = first_look.report_of_guard()
    assert "examples/silently_wrong.py:7" in report_of_guard and "examples/silently_wrong.py:6" in report_of_guard
    _, rows = first_look.rows()
    assert rows and all(row.replaced for row in rows)
    assert first_look.draw(tmp_path / "picture.png").stat().st_size > 10_000


def test_targets_can_be_missed():
    """Ours with torch's times is no better than torch, and says so."""
    rows = rows_of_a_tiny_run()
    calls = [r for r in rows if r.mode == RECORDED.name and r.layout == "full"]
    table = results.Table(calls)
    same = [replace(r, p50=table.get(IN_PLACE, *r.case).p50) if r.implementation == OURS else r for r in calls]
    verdicts = [v for v in targets.judge(same, results.provenance(CPU)) if "one call" in v.promise]
    assert {v.measured for v in verdicts} == {1.0}
    assert {v.met for v in verdicts if v.target < 1} == {False}
    assert {v.met for v in verdicts if v.target == 1} == {True}


@pytest.mark.parametrize("mode", ["forward", "forward+backward, trainable, held by caller"])
@pytest.mark.parametrize("layout", MEETING)
def test_another_order_of_memory_is_measured_and_judged(layout, mode):
    work = Workload(case("mul_add_", layout, mode), CPU)
    others = [work.operands[1]] if mode == "forward" else [work.operands[1], work.gradient]
    assert all(other.shape == work.input.shape and other.stride() != work.input.stride() for other in others)
    rows = [replace(row, p50=2.0 if name == OURS else 1.0) for name, row in measured("mul_add_", layout, mode).items()]
    (verdict,) = (v for v in targets.judge(rows, results.provenance(CPU)) if "another order" in v.promise)
    assert (verdict.measured, verdict.met) == (0.5, False)


def test_what_stays_in_the_cache_is_not_judged_as_past_it():
    rows, about = rows_of_a_tiny_run(), results.provenance(CPU)
    for past, forward in ((SIZE, True), (SIZE + 1, False)):
        verdicts = targets.judge(rows, about | {"past_cache": str(past)})
        assert any("past the last cache" in v.promise for v in verdicts) == forward


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_memory_of_backward_is_judged_in_every_layout(layout):
    frozen, trained = (f"backward, {of}, held by engine" for of in ("frozen", "trainable"))
    modes = [mode for mode in (frozen, trained) if case("mul_add_", layout, mode).makes_sense()]
    rows = [row for mode in modes for row in measured("mul_add_", layout, mode).values()]
    verdicts = [v for v in targets.judge(rows, results.provenance(CPU)) if "full-size tensors" in v.promise]
    full = layout in ("full", "vector_and_full", "full_and_vector", *MEETING)
    assert [v.what for v in verdicts] == [f"mul_add_ {layout}, {mode}" for mode in modes if mode == frozen or not full]
    assert all(v.met for v in verdicts)


def test_the_command_that_is_kept_says_what_was_measured_and_not_where_to():
    arguments = ["models", "--output", "some/rows.csv", "--rounds", "6"]
    assert results.command_line(arguments) == "python -m benchmarks models --rounds 6"
    assert results.command_line(["--ops", "add_"]) == "python -m benchmarks --ops add_"


def test_narrowed_run_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    options = ["--ops", "add_", "--layouts", "full", "--sizes", "4KiB", "--rounds", "1", "--seconds", "1e-6"]
    assert command.main(["--device", "cpu", *options, "--no-compile", "--output", str(out)]) == 0
    about, rows = results.read(out)
    assert "--no-compile" not in about["command"] or about["commit"]
    assert {row.op for row in rows} == {"add_"}
    assert "add_" in capsys.readouterr().out


def test_a_run_stops_when_its_time_is_up(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    options = ["--ops", "add_", "mul_", "--layouts", "full", "--sizes", "4KiB", "--rounds", "1", "--seconds", "1e-6"]
    assert command.main(["--device", "cpu", *options, "--within", "1e-9", "--output", str(out)]) == 0
    about, rows = results.read(out)
    assert {row.op for row in rows} == {"add_"}
    assert "1 of 2 cases" in report.about_text(about)
    assert "1 of 2 were not measured" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.csv"

    def interrupted(*arguments, **keywords):
        yield next(whole(*arguments, **keywords))
        raise KeyboardInterrupt

    whole = command.run
    monkeypatch.setattr(command, "run", interrupted)
    options = ["--layouts", "full", "--sizes", "4KiB", "--sample", "3", "--rounds", "1", "--seconds", "1e-6"]
    assert command.main(["--device", "cpu", *options, "--no-compile", "--output", str(out)]) == 0
    about, rows = results.read(out)
    assert len({row.case for row in rows}) == 1
    assert "1 of 3 cases" in report.about_text(about)
    assert "2 of 3 were not measured: interrupted" in capsys.readouterr().out


def test_a_sample_is_drawn_from_all_and_is_the_same_each_time():
    options = command.parse(["--full", "--dtypes", "bfloat16", "--sample", "200"])
    drawn = command.narrow(full_cases(CPU), options)
    assert len({c.key for c in drawn}) == 200
    assert {c.dtype for c in drawn} == {torch.bfloat16}
    assert {c.op.name for c in drawn} == set(BY_NAME)
    assert drawn == command.narrow(full_cases(CPU), options)
    assert command.is_narrowed(options)


def test_triton_kernels_compute_the_ops():
    pytest.importorskip("triton")
    # Triton's interpreter is chosen when its kernels are defined: in a process of its own.
    code = """
import torch
from benchmarks.cases import FORWARD, LAYOUTS, MEETING, product
from benchmarks.measure import Clock, Workload, interval_of_median
from benchmarks.triton_kernels import elementwise
from tests.op_table import OPS
for case in product(OPS, LAYOUTS.keys() - MEETING, [torch.float32], [16 << 10], [FORWARD]):
    work = Workload(case, torch.device("cpu"))
    work.input.copy_(torch.arange(work.input.numel()).view(case.shape))
    work.operands = [torch.randn_like(v) if isinstance(v, torch.Tensor) else v for v in work.operands]
    expected = case.op.reference(work.input, *work.operands)
    torch.testing.assert_close(elementwise(case, work.input, *work.operands), expected, msg=str(case.key))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pages.ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def gpu_host(tmp_path, **environment):
    script = pages.ROOT / "benchmarks" / "gpu_host.sh"
    environment = os.environ | {"PYTHON": sys.executable, "COMMIT": "0123abc"} | environment
    done = subprocess.run([script, tmp_path], env=environment, capture_output=True, text=True)
    return done.returncode, (tmp_path / "summary.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="stages of a machine without a device")
def test_a_gpu_hosts_stages_say_why_they_did_not_run(tmp_path):
    status, summary = gpu_host(tmp_path, STAGES="memcheck")
    assert status == 0
    assert f"torch {torch.__version__}" in summary
    assert "memcheck   not run: no CUDA device" in summary
    status, summary = gpu_host(tmp_path, STAGES="tests", LIMIT="0")
    assert status == 1
    assert "tests      not run: the 0 s are used up" in summary


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a device")
def test_a_gpu_host_measures_models_where_asked(tmp_path):
    pytest.importorskip("transformers")
    tiny = "--tiny --families Dinov2 --modes inference --dtypes float32 --rounds 1"
    status, _ = gpu_host(tmp_path, STAGES="models", BENCH_ARGS=tiny)
    assert status == 0
    _, rows = results.read(tmp_path / "models.csv", results.StepRow)
    assert [row.way for row in rows] == list(results.WAYS)


def tree_in_a_repository(folder):
    """A tree without a history of its own, in the repository of something else."""
    tree = folder / "tree"
    shutil.copytree(pages.ROOT / "benchmarks", tree / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "of something else"]):
        name = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        subprocess.run(["git", "-C", folder, *name, *arguments], check=True)
    return tree


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="makes a repository")


@needs_git
def test_a_repository_around_the_tree_is_not_its_history(tmp_path, monkeypatch):
    tree = tree_in_a_repository(tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    assert pages.commit(tree) == "unknown"
    monkeypatch.setenv("COMMIT", "0123abc")
    assert pages.commit(tree) == "0123abc"
    # What has a history goes by that.
    head = pages.git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert pages.commit(tmp_path) == head
    (tmp_path / "tree" / "benchmarks" / "cases.py").unlink()
    assert pages.commit(tmp_path) == f"{head}-dirty"


@needs_git
def test_a_gpu_host_asks_for_the_commit_of_a_tree_without_history(tmp_path):
    tree = tree_in_a_repository(tmp_path)
    command = [tree / "benchmarks" / "gpu_host.sh", tmp_path / "out"]
    environment = {k: v for k, v in os.environ.items() if k != "COMMIT"} | {"PYTHON": sys.executable, "STAGES": "none"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "COMMIT=" in done.stdout
    done = subprocess.run(command, env=environment | {"COMMIT": "0123abc"}, capture_output=True, text=True)
    assert done.returncode == 0
    assert "commit 0123abc\n" in (tmp_path / "out" / "summary.txt").read_text()


@pytest.fixture
def base_tree(tmp_path):
    """This very package once more, as another build."""
    tree = tmp_path / "base"
    shutil.copytree(pages.ROOT / "safe_inplace", tree / "safe_inplace", ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def test_two_builds_are_compared_until_one_breaks(base_tree, tmp_path, capfd, monkeypatch):
    """The base knows no add_, and its add_mul_ ends the process. One run for all: it starts two processes."""
    module = base_tree / "safe_inplace" / "__init__.py"
    module.write_text(module.read_text() + "\ndel add_\ndef add_mul_(*_):\n    raise SystemExit(7)\n")
    monkeypatch.setenv("BASE_COMMIT", "4567def")
    out = tmp_path / "compare.csv"
    options = ["--device", "cpu", "--ops", "add_", "mul_", "add_mul_", "--layouts", "full", "--sizes", "4KiB"]
    options += ["--rounds", "3", "--seconds", "1e-5", "--output", str(out)]
    assert command.main(["compare", "--base", str(base_tree), *options]) == 1
    said = capfd.readouterr().out
    assert "the process of the base build ended with 7" in said
    assert "1 are of ops that one of the builds does not have" in said
    assert "in 1 cases" in said
    first, *lines = out.read_text().splitlines()
    about, rows = json.loads(first.removeprefix("# ")), list(csv.DictReader(lines))
    assert (about["base"], about["measured"]) == ("4567def", "1 of 2 cases")
    assert about["extension"] == about["base_extension"]
    assert "--serve" not in about["command"]
    assert [(row["op"], row["implementation"]) for row in rows] == [("mul_", who) for who in (IN_PLACE, OUT_OF_PLACE, OURS)]
    for row in rows:
        assert row["turns"] == "3"
        assert 0 < float(row["low"]) <= float(row["ratio"]) <= float(row["high"])


def test_nothing_but_the_package_of_a_base_can_be_imported(base_tree):
    (base_tree / "benchmarks").mkdir()
    wheel = Path(shutil.make_archive(str(base_tree), "zip", base_tree)).rename(base_tree.with_suffix(".whl"))
    with compare.package_of(base_tree) as package:
        assert os.listdir(package.parent) == ["safe_inplace"]
        assert package.resolve() == base_tree / "safe_inplace"
    with compare.package_of(wheel) as package:
        assert sorted(os.listdir(package)) == sorted(os.listdir(base_tree / "safe_inplace"))
        assert os.listdir(package.parent) == ["safe_inplace"]


def test_a_ratio_is_taken_within_a_turn():
    """The machine is ten times slower in the second turn: for both builds, and for no ratio."""
    row = rows_of_a_tiny_run()[0]
    asked = []

    class Pretended:
        def __init__(self, name, times):
            self.name, self.times = name, iter(times)

        def measure(self, job):
            asked.append(self.name)
            return [replace(row, p50=next(self.times))]

    (found,) = compare.in_turns(Pretended("new", [2.0, 30.0, 2.0]), Pretended("base", [1.0, 10.0, 2.0]), 0, 3)
    assert (found.ratio, found.low, found.high) == (2.0, 1.0, 3.0)
    assert (found.new, found.base) == (2.0, 2.0)
    assert asked == ["base", "new", "new", "base", "base", "new"]


def run_tiny(name, dtype="float32", mode="train"):
    (family,) = (family for family in families.FAMILIES if family.name == name)
    if not family.installed:
        pytest.skip(f"{family.library} is not installed")
    rows = steps.run_step(family, families.TINY, dtype, mode, CPU, TINY)
    assert [row.way for row in rows] == list(results.WAYS)
    return {row.way: row for row in rows}


@pytest.mark.parametrize("name", [family.name for family in families.FAMILIES])
def test_every_way_of_every_model_does_its_own(name):
    """Each way is held against the plain model before it is timed, so a step that computes something else raises."""
    training = run_tiny(name)
    assert [row.replaced > 0 for row in training.values()] == [False, True, True, True]
    assert {row.copyslices for row in training.values()} == {0}
    assert all(row.size > 0 and row.peak > row.size and row.p50 > 0 for row in training.values())
    assert 0 < training[results.PLAIN].sums < 1
    inference = run_tiny(name, "bfloat16", "inference")
    # What nobody needs afterwards is written over by the patched model alone: the others are told where.
    assert [row.takeovers > 0 for row in inference.values()] == [False, False, False, True]


def test_a_way_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(steps.OPS[results.IN_PLACE], "mul_add", lambda branch, scale, shift: branch + shift)
    with pytest.raises(AssertionError):
        run_tiny("ConvNeXtV2")


def test_views_that_torch_writes_to_are_seen(monkeypatch):
    """Swin's second branch is what a linear layer returned: torch's own add_ to it goes through CopySlices."""
    monkeypatch.setattr(steps.OPS[results.TORCH], "add", lambda branch, other: branch.add_(other))
    rows = run_tiny("Swin")
    assert [row.copyslices > 0 for row in rows.values()] == [False, True, False, False]


def test_the_time_in_kernels_is_read_from_a_trace():
    events = [
        {"cat": "kernel", "name": "a", "dur": 2.0},
        {"cat": "kernel", "name": "b", "dur": 3.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "dur": 7.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "dur": 7.0},
        {"cat": "cpu_op", "name": "aten::add", "dur": 9.0},
    ]
    assert steps.on_device(events) == (5e-6, 2, 1)


def test_the_share_of_sums_and_products_is_read_from_a_trace():
    events = [
        {"cat": "cpu_op", "name": name, "ts": start, "dur": duration, "tid": thread}
        for name, start, duration, thread in [
            ("MulBackward0", 0.0, 10.0, 1),
            ("aten::mul", 1.0, 3.0, 1),
            ("aten::mul", 1.0, 1.0, 1),  # within the other
            ("aten::sum", 5.0, 2.0, 1),
            ("aten::mm", 10.0, 9.0, 1),
            ("aten::add", 2.0, 1.0, 2),
        ]
    ]
    assert steps.share_of_sums([*events, {"cat": "user_annotation", "name": "step", "ts": 0.0, "dur": 99.0, "tid": 1}]) == 6 / 20


@pytest.mark.parametrize("count, low, high", [(5, 0, 4), (6, 0, 5), (9, 1, 7), (15, 3, 11)])
def test_the_interval_of_a_median(count, low, high):
    assert interval_of_median([float(i) for i in range(count)][::-1]) == (low, high)


def test_what_is_printed_is_what_the_file_says(tmp_path):
    """Rounded once: 0.134996 is 13 percent, and 14 where it was 0.1350 in between."""
    rows = list(measured("mul_add_", "full", "forward").values())
    rows = [replace(row, p50=0.134996) for row in rows]
    found = command.gather([rows], 1, "", SimpleNamespace(within=None), Console(quiet=True)).rows
    results.write(tmp_path / "rows.csv", results.provenance(CPU), found)
    assert found == results.read(tmp_path / "rows.csv")[1] and found[0].p50 == 0.135


def test_models_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "models" / "rows.csv"
    threads = str(torch.get_num_threads())
    options = ["--families", "Dinov2", "GPT-2", "--modes", "inference", "--rounds", "1", "--threads", threads]
    assert command.main(["models", "--device", "cpu", "--tiny", *options, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    about, rows = results.read(out, results.StepRow)
    assert about["clock"] == "wall" and rows[0].launches is None
    assert len(report.by_case(rows)) == 2 * len(results.STEP_DTYPES)
    assert report.steps_table(rows).splitlines()[-1] in printed
    page = tmp_path / "patch.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    made = report.write_models(out.parent, page)
    assert [path.name for path in made] == ["rows.png", "README.md", "patch.md"]
    first = {path: path.read_bytes() for path in made}
    assert report.write_models(out.parent, page) == made and {path: path.read_bytes() for path in made} == first
    assert "old" not in page.read_text() and "GPT-2" in page.read_text()


def test_a_family_that_there_is_not_is_said_to_be_none():
    with pytest.raises(SystemExit, match=r"no families \['Dinov9'\]: there are \['Dinov2'"):
        command.main(["models", "--tiny", "--families", "Dinov9", "Dinov2"])


def test_models_gain_where_the_whole_interval_does():
    pytest.importorskip("transformers")
    rows = list(run_tiny("Dinov2").values())
    for low, gained in ((0.99, False), (1.01, True)):
        judged = [replace(row, ratio=1.1, low=low, high=1.2) for row in rows]
        assert report.patched_table(judged, gained).splitlines()[-1] == f"| Dinov2 | 1.10 ({low} to 1.20) |"
        assert report.patched_table(judged, not gained) == "None."


def test_the_page_of_patch_is_what_the_result_files_say():
    text = report.PATCH_PAGE.read_text()
    assert report.insert(text, report.patch_section()) == text
    if results.result_files(results.MODELS):
        assert (results.MODELS / "README.md").read_text() == report.models_page()
