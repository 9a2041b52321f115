"""What benchmarks.guard_step says of a target is said of an interval that holds the median as often as it claims."""

import random
import time

import pytest

from benchmarks import guard_step, measure, results


def test_the_interval_holds_the_median():
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        low, high = measure.interval_of_median([draw.expovariate(1.0) for _ in range(15)])
        held += low <= 0.6931471805599453 <= high
    assert 0.95 <= held / 2000 < 0.99


@pytest.mark.parametrize(("low", "high", "said"), [(1.0, 1.04, "reached"), (1.0, 1.06, "undecided"), (1.06, 1.2, "missed")])
def test_a_target_is_judged_by_the_interval(low, high, said):
    row = guard_step.Row("resnet18", "guard", 1, 1, 1, (low + high) / 2, low, high, low, high, 15)
    assert guard_step.verdict(row, 1.05) == said


def test_the_page_has_what_was_measured(tmp_path):
    assert guard_step.section() in guard_step.PAGE.read_text()
    rows = [guard_step.Row("resnet18", tool, 1, 2, 3, i, 1, 3, 1.25, 2.5, 15) for i, tool in enumerate(guard_step.TOOLS, 1)]
    about = {"device": "Some", "torch": "2.13", "python": "3.11", "commit": "abc", "load": "0.5", "date": "2026-11-28"}
    results.write(tmp_path / "some.csv", about | {"command": "it"}, rows)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{guard_step.BEGIN}\nold\n{guard_step.END}\nafter\n")
    guard_step.write_page(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "commit abc" in text
    assert "| resnet18 | 2 s | 2.00 (1.25 to 2.50) | 3.00 (1.25 to 2.50) |" in text


def test_every_tool_is_measured_beside_the_plain_step():
    calls = []
    rows = guard_step.measure("overhead", lambda: calls.append(1), 3, 1e-5, time.process_time)
    assert [row.tool for row in rows] == list(guard_step.TOOLS) and calls
    assert rows[0].ratio == 1 and all(row.ratio_low <= row.ratio <= row.ratio_high for row in rows)
