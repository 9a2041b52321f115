"""Every remedy that is printed is applied as it stands, and cures: no hazard is left, and values and gradients are right."""

import ast
import inspect
import linecache
import sys
import textwrap
import types
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F  # noqa: F401 - the statements use it
from torch import nn

import safe_inplace
from safe_inplace import HazardError, guard

from . import bugs
from .bugs import BUGS


def apart(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


class _Apart(ast.NodeTransformer):
    """The remedy at the save: the marked expression gives out a clone, or takes clones."""

    def __init__(self, position, result):
        self.position, self.result = position, result

    @staticmethod
    def clone(node):
        return ast.Call(ast.Name("apart", ast.Load()), [node], [])

    def visit(self, node):
        node = self.generic_visit(node)
        if not isinstance(node, (ast.Call, ast.BinOp)) or (node.lineno, node.col_offset, node.end_col_offset) != self.position:
            return node
        if self.result:
            return self.clone(node)
        if isinstance(node, ast.BinOp):
            node.left, node.right = self.clone(node.left), self.clone(node.right)
        else:
            node.args = [argument if isinstance(argument, ast.Starred) else self.clone(argument) for argument in node.args]
            if isinstance(node.func, ast.Attribute):
                node.func.value = self.clone(node.func.value)
        return node


def cured(source, first, hazard):
    """The source, which begins at line `first` of its file, with the remedies of the hazard in it: a syntax tree."""
    lines = source.splitlines()
    rewritten = hazard.rewritten
    if rewritten.code or rewritten.clone:
        tree = ast.parse(source)
        at = hazard.mutation.lineno - first + 1
        simple = (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return)
        statement = next(n for n in ast.walk(tree) if isinstance(n, simple) and n.lineno <= at <= n.end_lineno)
        text = rewritten.code or f"{rewritten.clone} = {rewritten.clone}.clone(); {ast.unparse(statement)}"
        head, tail = lines[statement.lineno - 1], lines[statement.end_lineno - 1]
        pasted = head[: statement.col_offset] + text + tail[statement.end_col_offset :]
        lines[statement.lineno - 1 : statement.end_lineno] = [pasted]
        return ast.parse("\n".join(lines))
    save = hazard.save
    assert any("Keep the saved value apart" in remedy and f":{save.lineno}:" in remedy for remedy in hazard.remedies)
    line = lines[save.lineno - first]
    begin = line.index(save.source) + save.columns[0]
    position = (save.lineno - first + 1, begin, begin + save.columns[1] - save.columns[0])
    before = ast.parse(source)
    after = _Apart(position, hazard.result).visit(ast.parse(source))
    assert ast.dump(before) != ast.dump(after)
    return ast.fix_missing_locations(after)


# Another remedy than a line of code or a clone: an update of parameters, a module's own flag, running statistics.
WORDS = {
    "states_collected_in_a_buffer": "The saved bytes are intact",
    "running_statistics_broadcast_between_two_forwards": "Backward does not read the running statistics",
    "auxiliary_head_before_an_inplace_module": "What runs here writes with leaky_relu_(): use its out-of-place form, "
    "leaky_relu() (a module: inplace=False), and its result from here on.",
    "graph_layer_with_an_inplace_relu_between_two_uses": "What runs here writes with relu_()",
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


@pytest.mark.parametrize("bug", BUGS.values(), ids=list(BUGS))
def test_the_remedy_of_each_bug_cures_it(bug):
    wrong, _ = bug.programs()
    with pytest.raises(HazardError) as caught, guard():
        wrong()
    hazard = caught.value.hazard
    words = WORDS.get(bug.factory.__name__)
    if words is not None:
        assert any(words in remedy for remedy in hazard.remedies)
        assert not (hazard.rewritten.code or hazard.rewritten.clone)
        return
    lines, first = inspect.getsourcelines(bug.factory)
    tree = cured("".join(lines), first, hazard)
    tree.body[0].decorator_list.clear()
    names = {**vars(bugs), "apart": apart}
    exec(compile(tree, "<cured>", "exec"), names)
    torch.manual_seed(0)
    program, _ = names[bug.factory.__name__]()
    with guard("raise", verify=True) as watched:
        got = program()
    assert watched.hazards == []
    _, right = bug.programs()
    for a, b in zip(got, right(), strict=True):
        torch.testing.assert_close(a, b)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.ops = safe_inplace
        self.torch = torch
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("state", torch.full((3,), 2.0))

    @property
    def hidden(self):
        return self.h


WIDER = torch.arange(1.0, 4.0)
CLONE = object()
# Each writes to what `y` saved. What is printed for it; None: no code.
STATEMENTS = {
    "h.mul_(10)": "h = h.mul(10)",
    "h.mul_(10).add_(1)": "h = h.mul(10).add_(1)",
    "h.sigmoid_().mul_(2)": "h = h.sigmoid().clone().mul_(2)",  # sigmoid saves what the next writes
    "h.mul_(\n    10  # why\n).add_(\n    1\n)": "h = h.mul(10).add_(1)",
    "(\n    h\n    .mul_(10)\n)": "h = h.mul(10)",
    "h.data.mul_(10)  # why": None,
    "h.data *= 10": None,
    "h.detach().mul_(10)": None,
    "h[:1] = 0.5": CLONE,
    "h[:1] *= 3": CLONE,
    "h[0].mul_(3)": CLONE,
    "h.data[:1] = 0.5": None,
    "h[1:] = h[:-1] * 2": "new = h[:-1] * 2; h = h.clone(); h[1:] = new",
    "h[h > 3] = 0": "index = h > 3; h = h.clone(); h[index] = 0",
    "h[:2] = torch.exp(x[1:])": "new = torch.exp(x[1:]); h = h.clone(); h[:2] = new",
    "h[0], z = h[1] * 2, 1": None,
    "h[0] = z = x[0] * 2": None,
    "z = h.mul_(10) + 1": "z = (h := h.mul(10)) + 1",
    "z = h.mul_(10)": "h = z = h.mul(10)",
    "z, u, v = h.mul_(10)": "h = z, u, v = h.mul(10)",
    "h, z = h.mul_(10), 1": "h, z = (h.mul(10), 1)",
    "h = h.mul_(10) + 1": "h = h.mul(10) + 1",
    "z = h.mul_(10) + h": "z = (h := h.mul(10)) + h",
    "z = h + h.mul_(10)": None,
    "kept.append(h.mul_(10))": "kept.append((h := h.mul(10)))",
    "z = h.mul_(10).sum().exp()": "z = (h := h.mul(10)).sum().exp()",
    "z = [h.mul_(WIDER) for _ in range(2)]": None,
    "z = (lambda: h.mul_(10))()": None,
    "z = f'{h.mul_(10).sum()}'": None,
    "if h.mul_(10) is not None:\n    z = 1": None,
    "with torch.no_grad():\n    h.mul_(10)": None,
    "z = h\nh.mul_(10)": None,
    "z = h[0]\nh.mul_(10)": None,
    "z = h[0]\nz.mul_(10)": None,
    "z = h.detach()\nh.mul_(10)": None,
    "kept.append(h)\nh.mul_(10)": None,
    "z = types.SimpleNamespace(h=h)\nh.mul_(10)": None,
    "for z in [h]:\n    z -= WIDER": None,
    "halve(h)": None,
    "halve_by_another_name(h)": None,
    "for _ in range(2):\n    h.mul_(10)\n    kept.append(h)": None,
    "for _ in range(2):\n    h.mul_(10)\n    z = h + 1": "h = h.mul(10)",
    "for _ in range(2):\n    h = x * 2\n    z = h * h\n    h.mul_(10)\n    kept.append(h)": "h = h.mul(10)",
    "h.retain_grad()\nh.mul_(10)": None,
    "h *= WIDER + 1": "h = h * (WIDER + 1)",
    "h -= WIDER": "h = h - WIDER",
    "h /= torch.linalg.norm(h) + 1": "h = h / (torch.linalg.norm(h) + 1)",
    "h += WIDER.double()": "h = h.clone().add_(WIDER.double())",
    "h += WIDER.bfloat16()": "h = h + WIDER.bfloat16()",
    "with torch.autocast('cpu', torch.bfloat16):\n    h.exp_()": "h = h.clone().exp_()",
    "h.gt_(3)": "h = h.clone().gt_(3)",
    "h.clip_(0, 3)": "h = h.clone().clip_(0, 3)",
    "hs[0] += WIDER": "hs[0] = hs[0] + WIDER",
    "hs[0].mul_(2)": "hs[0] = hs[0].mul(2)",
    "hs[-1].mul_(2)": "hs[-1] = hs[-1].mul(2)",
    "i = 1\nhs[i - 1].mul_(2)": "hs[i - 1] = hs[i - 1].mul(2)",
    "i = -1\nhs[i + 1].mul_(2)": "hs[i + 1] = hs[i + 1].mul(2)",
    "hs[len(hs) - 1].mul_(2)": None,
    "hs[i - 1 if (i := 1) else 0].mul_(2)": None,
    "named = {'a': x * 5}\ny = y + named['a'] * named['a']\nnamed['a'].mul_(2)": "named['a'] = named['a'].mul(2)",
    "holder.h *= 2": "holder.h = holder.h * 2",
    "holder.h.mul_(2)": "holder.h = holder.h.mul(2)",
    "holder.state.mul_(2)": "holder.state = holder.state.mul(2)",
    "holder.hidden.mul_(2)": None,
    "kept.append(holder.h.mul_(2))": None,
    "h.zero_()": "h = h.clone().zero_()",
    "h.copy_(WIDER)": "h = h.clone().copy_(WIDER)",
    "safe_inplace.mul_add_(h, 2.0, 1.0)": "h = safe_inplace.mul_add_(h.clone(), 2.0, 1.0)",
    "mul_(h, 2.0)": "h = mul_(h.clone(), 2.0)",
    "holder.ops.addcmul_(h, WIDER, 2.0)": "h = holder.ops.addcmul_(h.clone(), WIDER, 2.0)",
    "z = holder.ops.addcmul_(h, WIDER, value=2.0, tensor2=WIDER)":
        "h = z = holder.ops.addcmul_(h.clone(), WIDER, value=2.0, tensor2=WIDER)",
    "F.elu_(h)": "h = F.elu(h)",
    "nn.init.zeros_(h)": None,
    "z = torch.relu_(h)": "h = z = torch.relu(h)",
    "holder.torch.relu_(h)": "h = holder.torch.relu(h)",
    "z = F.relu(h, inplace=True)": "h = z = F.relu(h, inplace=False)",
    "z = 'ä', F.relu(h, inplace=True)": "z = ('ä', (h := F.relu(h, inplace=False)))",
    "h.add_(torch.ones(3).add_(1))": "h = h.add(torch.ones(3).add_(1))",
    "torch.ops.aten.mul_.Tensor(h, WIDER)": None,
    "writes[0](h)": None,
    "holder.relu(h)": None,
    "torch.mul(h.data, 2, out=h.data)": None,
    "torch._foreach_mul_([h], 2)": None,
    "getattr(h, 'mul_')(2)": None,
    "return h.mul_(10)": "return h.mul(10)",
    "try:\n    return h.mul_(10)\nfinally:\n    kept.append(h)": "return (h := h.mul(10))",
    "try:\n    return h.mul_(10)\nexcept* ValueError:\n    kept.append(h)": "return (h := h.mul(10))",
    "(h if True else z).mul_(2)": None,
    "z = h.detach()\nz = z.numpy()\nh.mul_(10)": None,
    "z = plain.numpy()\nplain.mul_(10)": None,
    "plain.mul_(10)": "plain = plain.mul(10)",
}
if sys.version_info >= (3, 14):
    STATEMENTS |= {
        "z = t'{h.mul_(10).sum()}'": None,
        "z = t'{h.mul_(10).sum()}{h}'": None,
        "try:\n    h.mul_(10)\nexcept ValueError, TypeError:\n    pass": "h = h.mul(10)",
    }


def program(statement):
    """A module of its own, so that the lines can be read back: linecache knows it."""
    text = (
        textwrap.dedent(
            """
            def run(x):
                h = x * 2
                holder, hs, plain = Holder(), [x * 3], torch.full((3,), 2.0)
                holder.h, z, kept = x * 4, None, []
                y = h * h
                y = y + holder.h * holder.h
                y = y + hs[0] * hs[0]
                y = y + x * plain
                y = y + x * holder.state
            """
        ).lstrip()
        + textwrap.indent(statement, "    ")
        + "\n    return y, h, z, kept, hs, holder.h, holder.state, plain\n"
    )
    name = f"<statement {statement}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    return text, compile(text, name, "exec")


def halve(t):
    t.mul_(0.5)


def halve_by_another_name(t):
    own = t
    del t
    own.mul_(0.5)


def outcome(code, mode):
    names = {**globals(), "writes": [torch.relu_], "mul_": safe_inplace.mul_}
    exec(code, names)
    x = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    with guard(mode, verify=mode == "raise") as watched:
        values = names["run"](x)
        leaves = torch.utils._pytree.tree_leaves(list(values))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        loss = sum(tensor.sum() for tensor in tensors)
        loss.backward()
    assert mode != "raise" or watched.hazards == []
    return [*(tensor.detach() for tensor in tensors), x.grad]


def trace(frame, event, argument):
    return trace


# As a debugger, the coverage of lines and a profiler do it.
WATCHERS = {
    "nobody": (sys.gettrace, sys.settrace, None),
    "tracer of lines": (sys.gettrace, sys.settrace, trace),
    "tracer of calls": (sys.gettrace, sys.settrace, lambda *event: None),
    "profiler": (sys.getprofile, sys.setprofile, lambda *event: None),
}


@contextmanager
def watching(watcher):
    present, set, function = WATCHERS[watcher]
    before = present()
    set(function or before)
    try:
        yield
    finally:
        set(before)


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("statement", STATEMENTS)
def test_statements(statement, watcher):
    text, code = program(statement)
    names = {**globals(), "writes": [torch.relu_], "mul_": safe_inplace.mul_}
    exec(code, names)
    with pytest.raises(HazardError) as caught, guard(), watching(watcher):
        values = names["run"](torch.tensor([0.5, 1.0, 2.0], requires_grad=True))
        values[0].sum().backward()  # a write to a module's buffer waits for it
    hazard = caught.value.hazard
    expected = STATEMENTS[statement]
    assert hazard.rewritten.code == (None if expected is CLONE else expected)
    assert (hazard.rewritten.clone is not None) == (expected is CLONE)
    if expected is None:
        assert not any("out of place:" in remedy or "before this line" in remedy for remedy in hazard.remedies)
        # The sign in the line is what writes: nothing that the line calls could be exchanged.
        if any(isinstance(node, ast.AugAssign) for node in ast.walk(ast.parse(text))):
            assert not any("out-of-place form" in remedy for remedy in hazard.remedies)
    tree = cured(text, 1, hazard)
    right = outcome(code, "copy")
    for a, b in zip(outcome(compile(tree, "<cured>", "exec"), "raise"), right, strict=True):
        torch.testing.assert_close(a, b)


def test_an_argument_is_known_to_the_caller():
    x = torch.rand(3, requires_grad=True)
    kept = []

    def program(t):
        kept.append(t * t)
        t.mul_(0.5)

    with guard(), pytest.raises(HazardError) as caught:
        program(x * 2)  # today the caller has dropped it: the next may not
    assert caught.value.hazard.rewritten.code is None


def test_variables_of_the_frame_are_not_kept_alive():
    def program():
        x = torch.rand(3, requires_grad=True)
        other = torch.ones(5)
        gone = weakref.ref(other)
        with guard("copy") as watched:
            h = x * 2
            y = h * h
            h.mul_(2)
        assert watched.hazards_seen == 1
        del other
        assert gone() is None
        return y

    program()


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


def test_a_leaf_that_torch_refuses_to_write():
    linear = nn.Linear(3, 3)
    for write in (lambda w: w.mul_(2), lambda w: w[:, 1].sub_(0.5)):
        with guard(), pytest.raises(RuntimeError) as caught:
            linear(torch.randn(2, 3, requires_grad=True)).sum()
            score = linear(torch.randn(2, 3, requires_grad=True))
            write(linear.weight)
        assert "no_grad" in caught.value.remedies[0] if isinstance(caught.value, HazardError) else "leaf" in str(caught.value)
        assert score.shape == (2, 3)
    with guard(), pytest.raises(HazardError) as caught:
        score = linear(torch.randn(2, 3, requires_grad=True))
        with torch.no_grad():
            linear.weight.mul_(2)
        score.sum().backward()
    assert not any("Write under" in remedy for remedy in caught.value.remedies)
