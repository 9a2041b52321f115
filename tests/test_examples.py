"""The demo does what it says: the tests look at what its runs found, not at what it prints about them."""

import argparse
import io
import re

import pytest
import torch
from rich.console import Console

import safe_inplace

pytest.importorskip("sklearn", reason="the demo's digits are scikit-learn's")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples import digits, dit, guard_report, side_by_side, tutorial_modules

QUIET = Console(quiet=True)


def make_runs(depth: int, dtype: torch.dtype, steps: int) -> list[digits.Run]:
    runs = []
    for name, ops in (
        ("torch", digits.out_of_place),
        ("safe_inplace", safe_inplace),
        ("torch, addcmul", digits.out_of_place_fused),
    ):
        torch.manual_seed(0)
        model = digits.Network(ops, width=8, depth=depth).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps + 1)
        runs.append(digits.Run(name, model, optimizer, schedule))
    return runs


@pytest.fixture(scope="module")
def small_digits():
    data = digits.Digits.load(seed=0, device=torch.device("cpu"))
    return digits.Digits(data.images[:320], data.labels[:320], data.held_out_images, data.held_out_labels)


def test_training_is_the_same_to_rounding(small_digits):
    options = argparse.Namespace(epochs=3, batch_size=64, seed=0)
    data = digits.Digits(
        small_digits.images.double(), small_digits.labels, small_digits.held_out_images.double(), small_digits.held_out_labels
    )
    runs = make_runs(depth=2, dtype=torch.float64, steps=15)
    digits.train(runs, data, options, QUIET)
    torch_run, ours, _ = runs
    assert len(ours.losses) == 15 and ours.losses[-1] < ours.losses[0]
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(torch_run.losses), rtol=1e-10, atol=0)


def test_measurements_and_plot(small_digits, tmp_path):
    options = argparse.Namespace(epochs=2, batch_size=64, seed=0, timed_steps=2, depth=1, width=8)
    runs = make_runs(depth=1, dtype=torch.float32, steps=10)
    digits.train(runs, small_digits, options, QUIET)
    digits.measure(runs, small_digits, options, QUIET)
    torch_run, ours, _ = runs
    # In place changes no value that backward needs, and makes no result of its own.
    for part, beside in ((ours.whole, torch_run.whole), (ours.alone, torch_run.alone)):
        assert 0 < part.saved_bytes <= beside.saved_bytes
        assert part.saved_bytes < max(part.memory) <= max(beside.memory)
    # The sums and products alone: at its peak torch has at least one activation more.
    assert max(torch_run.alone.memory) - max(ours.alone.memory) >= 64 * 8 * 64 * 32 * 4
    assert all(len(part.times) == 2 for run in runs for part in (run.whole, run.alone))
    digits.report(runs, options, QUIET)
    digits.plot(runs, options, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").stat().st_size > 10_000


EXPECTED = {
    # title, operation, operand, leaf: what happens
    ("A write to the input", "add_", "1", True): "refused at the write",
    ("A write to the input", "add_", "1", False): "right gradients",
    ("A write to the input", "mul_", "w", False): "right gradients",
    ("Read the input, then write to it", "add_", "1", False): "right gradients",
    ("Read the input, then write to it", "mul_", "3", False): "right gradients",
    ("Read the input, then write to it", "mul_", "w", True): "refused at the write",
    ("Read the input, then write to it", "mul_", "w", False): "refused in backward",
    ("Read the input, then write to a clone", "mul_", "w", True): "right gradients",
    ("Read a clone, then write to that clone", "mul_", "w", True): "refused in backward",
}


@pytest.mark.parametrize("library", ["torch", "safe_inplace"])
@pytest.mark.parametrize("title, operation, operand, leaf", EXPECTED)
def test_tutorial_modules(library, title, operation, operand, leaf):
    modules = tutorial_modules.versions(title, operation, operand)
    outcome = tutorial_modules.run(modules[library], modules["out of place"], leaf)
    assert outcome.what == EXPECTED[title, operation, operand, leaf]


def test_a_wrong_gradient_would_be_called_wrong():
    body = "x.data.mul_(w)\nreturn x * w"
    wrong = tutorial_modules.compile_module(body, "mul_", "w", "torch")
    reference = tutorial_modules.compile_module("return x * w", "mul_", "w", "out of place")
    assert tutorial_modules.run(wrong, reference, leaf=False).what == "WRONG GRADIENTS"


def test_the_table_of_the_tutorial(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tutorial_modules"])
    monkeypatch.setattr(tutorial_modules, "Console", lambda **options: Console(**options | {"width": 200}))  # each row on a line
    tutorial_modules.main()
    printed = capsys.readouterr().out
    rows = len(tutorial_modules.BODIES) * len(tutorial_modules.OPERANDS)
    assert len(re.findall(r"the same +$", printed, re.MULTILINE)) == rows and len(printed.splitlines()) < 3 * rows
    (row,) = re.findall(r"^ y = x \* w; x\.mul_\(w\); return y \* 2 .*$", printed, re.MULTILINE)
    assert re.search(r" refused at the write +refused in backward +'y = x \* w' saved what was overwritten +the same", row)
    assert "WRONG" not in printed and "a leaf Variable that requires grad is being used in an in-place operation" in printed


def test_the_table_of_the_tutorial_is_whole_on_a_narrow_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tutorial_modules.table())
    printed = console.export_text()
    assert "…" not in printed and "overwritten" in printed and "gradients" in printed


def test_guard_report(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["guard_report"])
    guard_report.main()
    printed = capsys.readouterr().out
    assert "x = self.ops.addcmul_(x, self.layer_scale, h)" in printed
    assert "h = self.space(self.norm(x).relu())" in printed
    assert re.search(r"^  0 hazards$", printed, re.MULTILINE)


def assert_trained_alike(runs, printed):
    """To rounding: the fused forms round once where the lines round twice."""
    plain, ours = runs
    assert len(plain.losses) == len(plain.times) == 4
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-5, atol=0)
    assert ours.losses[-1] != ours.losses[0]
    assert min(ours.memory, plain.memory) > 0
    assert re.search(rf"^{ours.name} +{ours.losses[-1]:.4f} ", printed, re.MULTILINE)


TINY = ["--steps", "4", "--guarded-steps", "2", "--batch-size", "8"]


@pytest.mark.parametrize("model, block, counted", [("vit", "Dinov2Layer", 4), ("convnextv2", "ConvNextV2Layer", 4)])
def test_a_patched_model_is_fine_tuned_as_the_plain_one(capsys, model, block, counted):
    pytest.importorskip("transformers")
    from examples import fine_tune

    torch.manual_seed(0)
    runs = fine_tune.main(["--model", model, *TINY])
    printed = capsys.readouterr().out
    assert_trained_alike(runs, printed)
    assert f"{counted} x {block} <-" in printed
    # Each of the four steps, and the one whose memory was measured.
    assert f"'forward.replaced': {5 * counted}" in printed


def test_a_dit_of_ready_modules_is_the_plain_one(capsys):
    torch.manual_seed(0)
    runs = dit.main(TINY)
    printed = capsys.readouterr().out
    assert_trained_alike(runs, printed)
    assert len(printed.splitlines()) == 3 + 8


def test_the_first_steps_are_guarded():
    """A model that writes to what its norm kept: named at its line, and where no step is guarded, refused in backward."""

    class Careless(torch.nn.Linear):
        def forward(self, images):
            h = super().forward(images.flatten(1)).sigmoid()
            return h.mul_(2)

    def loss(model, images, labels):
        return model(images).sum()

    for guarded, error in ((1, safe_inplace.HazardError), (0, RuntimeError)):
        options = argparse.Namespace(steps=1, guarded_steps=guarded, batch_size=8)
        with pytest.raises(error) as raised:
            side_by_side.train([side_by_side.Run("careless", Careless(64, 10), loss)], options)
        assert ("h.mul_(2)" in str(raised.value)) == bool(guarded)
