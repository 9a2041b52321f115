"""The code that a report suggests: it is right, or it is not there."""

import ast
import inspect
import linecache
import textwrap
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import safe_inplace
from safe_inplace import HazardError, guard

from . import bugs
from .bugs import BUGS


def suggestion(bug):
    wrong, _ = bug.programs()
    with pytest.raises(HazardError) as caught, guard():
        wrong()
    return caught.value.hazard.rewritten


def cured(bug, rewritten):
    """The bug's programs, with the line of the write as the report has it."""
    lines, first = inspect.getsourcelines(bug.factory)
    at = bug.line("WRITE") - first
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    new = [rewritten.code] if rewritten.code else [f"{rewritten.clone} = {rewritten.clone}.clone()", lines[at].strip()]
    lines[at] = "".join(f"{indent}{line}\n" for line in new)
    tree = ast.parse("".join(lines))
    (factory,) = tree.body
    factory.decorator_list.clear()
    # A test's program finds some of its tensors in the factory; what it now binds anew stays theirs.
    outer = {target.id for node in factory.body if isinstance(node, ast.Assign) for target in ast.walk(node)
             if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)}
    for function in [node for node in factory.body if isinstance(node, ast.FunctionDef)]:
        bound = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        if bound & outer:
            function.body.insert(0, ast.Nonlocal(sorted(bound & outer)))
    names = dict(vars(bugs))
    exec(compile(ast.fix_missing_locations(tree), "<cured>", "exec"), names)
    torch.manual_seed(0)
    return names[bug.factory.__name__]()


@pytest.mark.parametrize("bug", BUGS.values(), ids=list(BUGS))
def test_the_code_suggested_for_each_bug_cures_it(bug):
    rewritten = suggestion(bug)
    if not (rewritten.code or rewritten.clone):
        # Another remedy than other code for this line: an update of parameters, a module's own flag, running statistics.
        assert rewritten.parameter or bug.factory.__name__ in NO_CODE
        return
    assert bug.factory.__name__ not in NO_CODE
    program, _ = cured(bug, rewritten)
    with guard("raise", verify=True) as watched:
        got = program()
    assert watched.hazards == []
    _, right = bug.programs()
    if bug.plain == "raises":
        for a, b in zip(got, right(), strict=True):
            torch.testing.assert_close(a, b)


NO_CODE = {
    "auxiliary_head_before_an_inplace_module": "What runs here writes with leaky_relu_(): use its out-of-place form, "
    "leaky_relu() (a module: inplace=False).",
    "embedding_renormed_after_its_weight_was_used": "max_norm rescales the weight in place at every lookup",
    "eval_statistics_updated_by_a_forward_in_train_mode": "Run backward of the eval-mode forward before the next forward",
    "discriminator_steps_before_the_generator_goes_backward": "Run backward() before this step",
    "generator_steps_twice_on_one_fake_image": "Run backward() before this step",
    "autoencoder_steps_before_the_discriminator_loss": "Run backward() before this step",
    "critic_steps_before_the_actor_of_sac": "Run backward() before this step",
    "state_carried_over_an_optimizer_step": "Run backward() before this step",
    "policy_loss_computed_before_the_critic_is_updated_by_hand": "Run backward() before this update",
    "critic_clipped_through_data_before_backward": "Run backward() before this update",
    "target_network_averaged_through_its_state_dict": "Run backward() before this update",
    "target_network_averaged_with_out": "Run backward() before this update",
}


@pytest.mark.parametrize("name", NO_CODE)
def test_what_is_said_where_there_is_no_such_code(name):
    wrong, _ = BUGS[name].programs()
    with pytest.raises(HazardError) as caught, guard():
        wrong()
    remedies = caught.value.remedies
    assert NO_CODE[name] in remedies[0]
    assert not any("out of place:" in remedy for remedy in remedies)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.ops = safe_inplace
        self.torch = torch
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("state", torch.randn(3))


WIDER = torch.ones(3)
# Each writes to h, which is saved.
STATEMENTS = {
    "h.mul_(10)": "h = h.mul(10)",
    "h.mul_(10).add_(1)": "h = h.mul(10).add_(1)",
    "h.data.mul_(10)  # why": "h = h.mul(10)",
    "h.detach().mul_(10)": "h = h.mul(10)",
    "z = h.mul_(10) + 1": "z = h.mul(10) + 1",
    "h *= WIDER + 1": "h = h * (WIDER + 1)",
    "h -= WIDER": "h = h - WIDER",
    "hs[0] += WIDER": "hs[0] = hs[0] + WIDER",
    "holder.h *= 2": "holder.h = holder.h * 2",
    "holder.h.mul_(2)": "holder.h = holder.h.mul(2)",
    "h.zero_()": "h = h.clone().zero_()",
    "h.copy_(WIDER)": "h = h.clone().copy_(WIDER)",
    "safe_inplace.mul_add_(h, 2.0, 1.0)": "h = safe_inplace.mul_add_(h.clone(), 2.0, 1.0)",
    "holder.ops.addcmul_(h, WIDER, 2.0)": "h = holder.ops.addcmul_(h.clone(), WIDER, 2.0)",
    "z = holder.ops.addcmul_(h, WIDER, value=2.0, tensor2=WIDER)":
        "z = holder.ops.addcmul_(h.clone(), WIDER, value=2.0, tensor2=WIDER)",
    "F.elu_(h)": "h = F.elu(h)",
    "z = torch.relu_(h)": "z = torch.relu(h)",
    "holder.torch.relu_(h)": "h = holder.torch.relu(h)",
    "z = F.relu(h, inplace=True)": "z = F.relu(h, inplace=False)",
    "z = 'ä', F.relu(h, inplace=True)": "z = 'ä', F.relu(h, inplace=False)",
    "h.add_(torch.ones(3).add_(1))": "h = h.add(torch.ones(3).add_(1))",
    "torch.ops.aten.mul_.Tensor(h, WIDER)": None,
    "writes[0](h)": None,
    "holder.relu(h)": None,
    "torch.add(h.data, 1, out=h.data)": None,
    "torch._foreach_mul_([h], 2)": None,
    "getattr(h, 'mul_')(2)": None,
    "(h if True else z).mul_(2)": None,
    "hs[0].mul_(2)": None,  # hs may be a tensor
}


def program(statement):
    """A module of its own, so that the line can be read back: linecache knows it."""
    text = textwrap.dedent(
        f"""
        def run(x):
            h = x * 2
            hs, holder, z = [h], Holder(), None
            holder.h = h
            y = h * h + holder.h.exp()
            {statement}
            return y, h, hs, holder
        """
    ).lstrip()
    name = f"<statement {statement}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    names = {"Holder": Holder, "WIDER": WIDER, "writes": [torch.relu_], "torch": torch, "F": F, "safe_inplace": safe_inplace}
    exec(compile(text, name, "exec"), names)
    return names["run"]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statements(statement):
    x = torch.rand(3, requires_grad=True)
    with pytest.raises(HazardError) as caught, guard():
        program(statement)(x)
    assert caught.value.hazard.rewritten.code == STATEMENTS[statement]
    if STATEMENTS[statement] is None:
        assert not any("out of place:" in remedy for remedy in caught.value.remedies)
        return
    with guard(verify=True) as watched:
        y = program(STATEMENTS[statement])(x)[0]
        y.sum().backward()
    assert watched.hazards == [] and torch.allclose(x.grad, 8 * x + 2 * (2 * x).exp())


def test_an_assignment_to_a_part_goes_to_a_clone():
    with guard(), pytest.raises(HazardError) as caught:
        h = torch.rand(3, requires_grad=True) * 2
        y = h * h
        h[1:] = 0
    assert caught.value.hazard.rewritten.clone == "h"
    assert "h = h.clone() before this line" in caught.value.remedies[0]
    with guard(), pytest.raises(HazardError) as caught:
        h = torch.rand(3, requires_grad=True) * 2
        y = h * h  # noqa: F841
        h[1:] *= 2
    assert caught.value.hazard.rewritten.clone == "h"


def test_a_value_named_by_a_property_is_not_asked_for():
    class Lazy(types.SimpleNamespace):
        asked = 0

        @property
        def h(self):
            Lazy.asked += 1
            return self.hidden

    with guard(), pytest.raises(HazardError) as caught:
        lazy = Lazy(hidden=torch.rand(3, requires_grad=True) * 2)
        y = lazy.hidden.exp() * lazy.hidden  # noqa: F841
        lazy.h.mul_(2)
    assert Lazy.asked == 1 and caught.value.hazard.rewritten.code is None
