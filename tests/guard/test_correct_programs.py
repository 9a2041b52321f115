"""Programs that overwrite what autograd saved and never ask for it again: right in plain torch, so never stopped; and the
same programs where they do ask, which are named in that backward."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

from safe_inplace import HazardError, HazardWarning, guard
from safe_inplace._C import guard_live

from .test_guard import leaf


def net(width=4, out=4):
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, out))


def batch(rows=3, width=4):
    return torch.randn(rows, width)


# A program is a factory of (steps, ask). The steps are right; `ask` goes backward through what they overwrote.
PROGRAMS = {}


def program(factory):
    PROGRAMS[factory.__name__] = factory
    return factory


def optimized(name, make):
    def factory():
        model = net()
        optimizer = make(model.parameters())

        def steps():
            validation = model(batch())
            for _ in range(2):
                optimizer.zero_grad()
                model(batch()).square().mean().backward()
                optimizer.step()
            return validation

        return steps, lambda validation: validation.sum().backward()

    factory.__name__ = name
    return program(factory)


optimized("outputs_kept_over_sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False))
optimized("outputs_kept_over_foreach", lambda p: torch.optim.RMSprop(p, foreach=True))
optimized("outputs_kept_over_fused", lambda p: torch.optim.AdamW(p, fused=True))
optimized("outputs_kept_over_adagrad", lambda p: torch.optim.Adagrad(p, lr=0.1))


@program
def lbfgs_with_a_closure():
    model, x = net(), batch()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def steps():
        kept = []

        def closure():
            optimizer.zero_grad()
            kept.append(model(x).square().mean())
            kept[-1].backward(retain_graph=True)
            return kept[-1]

        optimizer.step(closure)
        return kept[0]

    return steps, lambda loss: loss.backward()


@program
def trunk_with_two_losses():
    trunk, a, b = net(), nn.Linear(4, 1), nn.Linear(4, 1)
    optimizer = torch.optim.SGD([*trunk.parameters(), *a.parameters(), *b.parameters()], lr=0.1)

    def steps():
        for _ in range(2):
            optimizer.zero_grad()
            h = trunk(batch())
            loss_a, loss_b = a(h).square().mean(), b(h).square().mean()
            loss_a.backward(retain_graph=True)
            loss_b.backward(retain_graph=True)
            optimizer.step()
        return loss_a

    return steps, lambda loss: loss.backward()


@program
def several_optimizers_in_turn():
    generator, critic = net(), net(out=1)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1, foreach=True) for m in (generator, critic)]

    def steps():
        for _ in range(2):
            fake = generator(batch())
            judged = critic(fake)
            judged.mean().backward(retain_graph=True)
            optimizers[0].step()
            optimizers[1].zero_grad()
            critic(fake.detach()).mean().backward()
            optimizers[1].step()
        return judged

    return steps, lambda judged: judged.sum().backward()


@program
def gradient_penalty():
    critic = net(out=1)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)

    def steps():
        for _ in range(2):
            x = batch().requires_grad_()
            score = critic(x).sum()
            (gradient,) = torch.autograd.grad(score, x, create_graph=True)
            gradient.square().sum().backward(retain_graph=True)
            optimizer.step()
        return score

    return steps, lambda score: score.backward()


def differentiated(name, write, frozen=False):
    """The backward that is differentiated saves parameters once more, as tensors that are no parameters."""

    def factory():
        model = net().requires_grad_(not frozen)

        def steps():
            x = batch().requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            for p in model.parameters():
                write(p)
            return gradient

        return steps, lambda gradient: gradient.square().sum().backward()

    factory.__name__ = name
    return program(factory)


differentiated("differentiated_backward", torch.no_grad()(lambda p: p.mul_(0.9)))
differentiated("differentiated_backward_through_data", lambda p: p.data.mul_(0.9))
differentiated("differentiated_backward_of_frozen_parameters", lambda p: p.data.mul_(0.9), frozen=True)


def averaged(name, average, frozen=False):
    def factory():
        online, head = net(), nn.Linear(4, 4)
        target = copy.deepcopy(online).requires_grad_(not frozen)
        optimizer = torch.optim.SGD([*online.parameters(), *head.parameters()], lr=0.1)

        def steps():
            for _ in range(2):
                optimizer.zero_grad()
                x = batch()
                goal = target(head(x))
                (head(online(x)) - goal.detach()).square().mean().backward()
                optimizer.step()
                average(target, online)
            return goal

        return steps, lambda goal: goal.sum().backward()

    factory.__name__ = name
    return program(factory)


def lerp(target, online):
    with torch.no_grad():
        for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


def through_data(target, online):
    for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
        mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)


def foreach(target, online):
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 0.1)


def state_dict(target, online):
    theirs = online.state_dict()
    for name, mine in target.state_dict().items():
        mine.copy_(0.9 * mine + 0.1 * theirs[name])


def loaded(target, online):
    target.load_state_dict(online.state_dict())


averaged("target_network", lerp)
averaged("target_network_through_data", through_data)
averaged("target_network_frozen_through_data", through_data, frozen=True)
averaged("target_network_foreach", foreach, frozen=True)
averaged("target_network_by_state_dict", state_dict, frozen=True)
averaged("target_network_loaded", loaded)


@program
def weights_clamped():
    critic = net(out=1)
    optimizer = torch.optim.RMSprop(critic.parameters())

    def steps():
        score = critic(batch())
        for _ in range(2):
            critic(batch()).mean().backward()
            optimizer.step()
            for p in critic.parameters():
                p.data.clamp_(-0.01, 0.01)
        return score

    return steps, lambda score: score.sum().backward()


@program
def statistics_and_buffers():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)

    def steps():
        model.eval()
        average.eval()
        kept = model(batch()), average(batch().requires_grad_())
        model.train()
        model(batch()).sum().backward()
        average.update_parameters(model)
        average.update_parameters(model)
        return kept

    return steps, lambda kept: (kept[0].sum() + kept[1].sum()).backward()


@program
def a_buffer_under_no_grad():
    codebook, x = torch.randn(5, 4), leaf(3, 4)

    def steps():
        scores = x @ codebook.t()
        with torch.no_grad():
            codebook.mul_(0.9).add_(0.1)
        return scores

    return steps, lambda scores: scores.sum().backward()


@program
def spectral_norm():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def steps():
        first = model(batch())
        for _ in range(2):
            model(batch()).sum().backward()
            optimizer.step()
        return first

    return steps, lambda first: first.sum().backward()


@program
def checkpointed():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def steps():
        kept = model[3](torch.utils.checkpoint.checkpoint(model[:3], batch(), use_reentrant=False))
        torch.utils.checkpoint.checkpoint(model, batch(), use_reentrant=False).sum().backward()
        optimizer.step()
        return kept

    return steps, lambda kept: kept.sum().backward()


@program
def activations_after_a_retained_backward():
    model = net()

    def steps():
        h = model[:3](batch())
        loss = model[3](h).sum()
        loss.backward(retain_graph=True)
        h.detach().mul_(2)
        return loss

    return steps, lambda loss: loss.backward()


@program
def functional_call_with_the_modules_own_parameters():
    model = net()
    parameters = dict(model.named_parameters())

    def steps():
        kept = torch.func.functional_call(model, parameters, (batch(),))
        torch.func.functional_call(model, parameters, (batch(),)).sum().backward()
        with torch.no_grad():
            for p in parameters.values():
                p -= 0.1 * p.grad
        return kept

    return steps, lambda kept: kept.sum().backward()


programs = pytest.mark.parametrize("factory", PROGRAMS.values(), ids=list(PROGRAMS))


@programs
@pytest.mark.parametrize("mode", ["raise", "warn", "defer"])
@pytest.mark.parametrize("verify", [False, True])
def test_a_correct_program_is_not_stopped(factory, mode, verify):
    steps, _ = factory()
    with warnings.catch_warnings():
        warnings.simplefilter("error", HazardWarning)
        with guard(mode, verify=verify) as watched:
            steps()
    assert watched.hazards == []


@programs
@pytest.mark.parametrize("mode", ["raise", "defer"])
def test_the_backward_that_asks_is_refused_with_both_lines(factory, mode):
    steps, ask = factory()
    with guard(mode) as watched:
        result = steps()
        with pytest.raises(HazardError, match="has been modified by an inplace operation") as caught:
            ask(result)
    error = caught.value
    assert error.mutation is not None and error.save is not None and error.hazard.kind == "overwritten"
    assert error.mutation.filename == error.save.filename == __file__
    assert watched.hazards == [error.hazard] and error.hazard.count == 1
    assert not any("retain_graph" in remedy for remedy in error.remedies)


@programs
def test_warn_tells_in_the_backward_that_asks(factory):
    steps, ask = factory()
    with guard("warn") as watched:
        result = steps()
        with pytest.warns(HazardWarning) as caught:
            try:
                ask(result)
            except HazardError as error:
                assert error.save == caught[0].message.save
    assert caught[0].message.mutation is not None and watched.hazards


@programs
def test_copy_repairs_them(factory):
    torch.manual_seed(0)
    steps, ask = factory()
    with guard("copy") as watched:
        ask(steps())
    assert watched.hazards_seen > 0


def test_advice_where_an_update_meets_a_graph_that_is_asked_for():
    steps, ask = PROGRAMS["target_network"]()
    with guard():
        goal = steps()
        with pytest.raises(HazardError) as caught:
            ask(goal)
    first, second, *_ = caught.value.remedies
    assert "Run backward() before this update" in first
    assert "torch.no_grad()" in second and "detach()" in second and "drop the outputs" in second


@pytest.mark.parametrize("mode", ["raise", "defer", "copy"])
def test_statistics_that_a_differentiated_backward_saves_and_does_not_read(mode):
    norm, x = nn.BatchNorm1d(4), batch(5).requires_grad_()
    with guard(mode, verify=True) as watched:
        (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
        norm(batch(5))
        gradient.square().sum().backward()
    assert watched.hazards == []


# ---- where raise still stops at the write


@pytest.mark.parametrize(
    "write",
    [lambda h: h.mul_(2), lambda h: h.data.mul_(2), lambda h: h.detach().mul_(2), lambda h: torch._foreach_mul_([h], 2)],
)
@pytest.mark.parametrize("grad", [True, False])
def test_what_the_graph_computed_is_refused_at_the_write(write, grad):
    x = leaf(3)
    with guard(), torch.set_grad_enabled(True):
        h = x * 1
        y = h * h
        with pytest.raises(HazardError, match="about to be modified"), torch.set_grad_enabled(grad):
            write(h)
        y.sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_an_input_written_with_grad_mode_on_is_refused_at_the_write():
    w, x = leaf(3), torch.ones(3)
    with guard():
        y = w * x
        with pytest.raises(HazardError, match="about to be modified"):
            x.mul_(2)
        y.sum().backward()


def test_a_write_that_is_refused_for_one_of_its_targets_is_noted_for_none():
    p, x = nn.Parameter(torch.ones(3)), leaf(3)
    with guard():
        h = x * 1
        y = (p * h + h * h).sum()
        with pytest.raises(HazardError), torch.no_grad():
            torch._foreach_mul_([p, h], 2)
        y.backward()
    assert torch.equal(p.grad, x) and torch.equal(x.grad, 1 + 2 * x)


@pytest.mark.parametrize("write", [lambda p: p.mul_(2), lambda p: p[:1].zero_(), lambda p: torch._foreach_mul_([p], 2)])
@pytest.mark.parametrize("mode", ["raise", "warn", "defer"])
def test_a_write_that_torch_refuses_is_torchs_to_refuse_and_writes_nothing(write, mode):
    p, x = nn.Parameter(torch.ones(3)), leaf(3)
    with guard(mode):
        y = (p * x).sum()
        with pytest.raises(RuntimeError, match="leaf") as caught:
            write(p)
        y.backward()
    assert not isinstance(caught.value, HazardError)
    assert torch.equal(x.grad, torch.ones(3))


def test_a_write_that_fails_half_way_is_noted():
    p, x = nn.Parameter(torch.ones(3)), leaf(3)
    with guard():
        y = (p * x).sum()
        with pytest.raises(IndexError):
            p.data.index_fill_(0, torch.tensor([0, 7]), 9.0)
        with pytest.raises(HazardError):
            y.backward()


# ---- notes


@pytest.mark.parametrize("raises_version", [True, False])
def test_of_several_writes_the_first_is_named(raises_version):
    p, x = nn.Parameter(torch.ones(3)), leaf(3)
    with guard() as watched, torch.no_grad():
        with torch.enable_grad():
            y = (p * x).sum()
        target = p if raises_version else p.data
        target.mul_(2)  # FIRST
        target.mul_(3)
        with pytest.raises(HazardError) as caught:
            y.backward()
    assert caught.value.mutation.source.endswith("# FIRST") and watched.hazards_seen == 1


def test_the_bytes_tell_more_than_a_version_that_rose_before():
    base, x = nn.Parameter(torch.ones(2, 3)), leaf(3)
    with guard():
        y = (base[0] * x).sum()
        with torch.no_grad():
            base[1] = 2
            base[0] = 3  # WRITE
        with pytest.raises(HazardError) as caught:
            y.backward()
    assert caught.value.hazard.kind == "overwritten" and "# WRITE" in caught.value.mutation.source


def test_each_value_is_shown_as_itself():
    """The lines are the same, the values are not."""
    small, large, x = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3)), leaf(3)
    with guard():
        first, second = [(p * x).sum() for p in (small, large)]
        with torch.no_grad():
            torch._foreach_mul_([small, large], 2)
        del first
        with pytest.raises(HazardError) as caught:
            second.backward()
    assert caught.value.shape == (2, 3)


def test_a_second_backward_through_a_retained_graph_after_a_step():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with guard():
        loss = model(batch()).sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        optimizer.step()  # STEP
        with pytest.raises(HazardError) as caught:
            loss.backward()
    assert "# STEP" in caught.value.mutation.source and "model(" in caught.value.save.source
    assert "Run backward() before this step" in caught.value.remedies[0]


def test_looking_at_a_saved_value_is_no_backward():
    x = leaf(3)
    with guard():
        h = x * 1
        y = h.exp()
        assert y.grad_fn._saved_result is not None
        with pytest.raises(HazardError, match="about to be modified"):
            y.detach().mul_(2)


def test_a_backward_outside_of_the_guard_is_refused_as_well():
    p, x = nn.Parameter(torch.ones(3)), leaf(3)
    with guard():
        y = (p * x).sum()
        p.data.mul_(2)
    with pytest.raises(HazardError):
        y.backward()


def test_the_guard_that_saved_decides_what_backward_meets():
    p, x = nn.Parameter(torch.ones(3)), leaf(3)
    with guard("copy"):
        y = (p * x).sum()
        with guard("defer"):
            p.data.mul_(2)
        with pytest.raises(HazardError) as caught:
            y.backward()
    assert caught.value.mutation.source == "p.data.mul_(2)"


def test_notes_keep_nothing_alive():
    class Big:
        pass

    p, x = nn.Parameter(torch.ones(3)), leaf(3)

    def update():
        big = Big()
        p.data.mul_(2)
        return weakref.ref(big)

    gc.collect()
    before = guard_live()
    gc.disable()
    try:
        with guard():
            y = p * x
            gone = update()
            assert gone() is None and guard_live() == before + 2
            del y
            assert guard_live() == before
    finally:
        gc.enable()


# ---- defer


def test_defer_is_silent_at_the_write_and_refuses_backward():
    x = leaf(3)
    with guard("defer") as watched:
        h = x * 1
        y = h * h
        h.data.mul_(10)  # no version rises
        dropped = h.exp()
        dropped.data.zero_()
        del dropped
        assert watched.hazards == [] and watched.summary() == "safe_inplace guard: no hazards"
        with pytest.raises(HazardError) as caught:
            y.sum().backward()
    assert caught.value.mutation.source.startswith("h.data.mul_(10)") and caught.value.save.source == "y = h * h"
    assert x.grad is None and [hazard.late for hazard in watched.hazards] == [True]
    assert "y = h * h" in caught.value.hazard.text()


def test_defer_of_an_op_that_overwrites_what_it_saves_itself():
    x = leaf(3)
    with guard("defer"):
        h = x * 1
        h.mul_(h)
        with pytest.raises(HazardError) as caught:
            h.sum().backward()
    assert caught.value.mutation == caught.value.save and caught.value.mutation.source == "h.mul_(h)"


def test_code_is_suggested_from_the_frame_that_wrote():
    def program():
        h = leaf(3) * 1
        y = h * h
        h.mul_(10)
        return y

    with guard("defer"), pytest.raises(HazardError) as caught:
        program().sum().backward()
    assert "h = h.mul(10)" in caught.value.remedies[0]


def test_a_buffer_of_a_frozen_module():
    class Codebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.randn(5, 4))

        def forward(self, x):
            return x @ self.codes.t()

    model, x = Codebook(), leaf(3, 4)
    gc.freeze()  # hides the module from a search of all objects
    try:
        with guard() as watched:
            scores = model(x)
            model.codes.mul_(0.9)
            del scores
        assert watched.hazards == []
    finally:
        gc.unfreeze()
