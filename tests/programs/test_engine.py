"""What holds for every fuzz, and the engine on a program of three steps."""

import pytest

from . import __main__, engine
from .engine import Disagreement, Fuzz, Var, shrink

FUZZES = pytest.mark.parametrize("fuzz", __main__.FUZZES.values(), ids=__main__.FUZZES)


@FUZZES
def test_generator_is_reproducible(fuzz):
    texts = [str(fuzz.generate(f"0:{index}")) for index in range(50)]
    assert texts == [str(fuzz.generate(f"0:{index}")) for index in range(50)]
    assert len({text.partition("\n")[2] for text in texts}) == 50


@FUZZES
def test_every_step_is_met(fuzz):
    met = {type(step) for index in range(500) for step in fuzz.generate(f"0:{index}").steps}
    assert met == set(fuzz.steps.kinds())


@FUZZES
def test_what_is_left_of_a_program_refers_to_what_it_did(fuzz):
    for index in range(20):
        program = fuzz.generate(f"0:{index}")
        for left_out in range(len(program.steps)):
            smaller = program.without(left_out)
            if smaller is not None:
                rest = program.steps[:left_out] + program.steps[left_out + 1 :]
                assert traced(smaller.steps) == traced(rest, program.steps)


def traced(steps, among=None):
    """The steps, and for each variable of theirs the step that made it."""
    made = [step for step in among or steps if isinstance(step, engine.Producer)]
    texts = []
    for step in steps:
        makers = []
        step.renamed(lambda var: makers.append(type(made[var.index])) or var)
        texts.append((type(step), makers))
    return texts


@FUZZES
def test_command_line(fuzz, capsys):
    assert __main__.main([fuzz.name, "--programs", "3", "--seed", "3"]) == 0
    assert sum(int(line.rpartition(": ")[2]) for line in capsys.readouterr().out.splitlines()) == 3
    assert __main__.main([fuzz.name, "--only", "7"]) == 0
    assert str(fuzz.generate("0:7")) in capsys.readouterr().out


class Step(engine.Referenced):
    @classmethod
    def generate(cls, generator):
        generator.add(cls())


class One(Step, engine.Producer):
    def run(self, run):
        return 1

    reference = run


class Twice(Step, engine.Producer):
    of: Var

    def run(self, run):
        return run[self.of] * 2

    reference = run


class Tell(Step):
    all: tuple

    def run(self, run):
        if run[self.all[0]] + self.all[1] == 5:
            raise RuntimeError("five")

    reference = run


STEPS = [One(), One(), Twice(Var(1)), Twice(Var(2)), Twice(Var(0)), Tell((Var(3), 1)), Tell((Var(4), 1))]
PROGRAM = engine.Program("by hand", STEPS)


def check(program):
    run = engine.Run(program).run()
    if run.refused:
        raise Disagreement(f"{run.refused.error} at {run.refused.step}")
    return "no five"


def test_shrinking_keeps_what_the_failure_needs():
    small = shrink(PROGRAM, check)
    assert small.steps == [One(), Twice(Var(0)), Twice(Var(1)), Tell((Var(2), 1))]
    assert str(small) == "# by hand\n  0: v0 = One()\n  1: v1 = Twice(v0)\n  2: v2 = Twice(v1)\n  3: Tell((v2, 1))"


def test_a_program_is_run_until_a_step_is_refused():
    run = engine.Run(PROGRAM).run()
    assert (run.refused.step, str(run.refused.error), run.variables) == (5, "five", [1, 1, 2, 4, 2])
    assert engine.Run(PROGRAM).run(stop=5).refused is None


def test_a_failure_is_reported_with_how_to_see_it_again(capsys):
    fuzz = Fuzz("by-hand", "", Step, lambda name: PROGRAM, check)
    with pytest.raises(Disagreement) as found:
        fuzz.search("s", [3])
    reproduce = "python -m tests.programs by-hand --seed s --only 3"
    assert str(found.value) == f"seed 'by hand': five at 5\nreproduce: {reproduce}\nshrunk:\n{shrink(PROGRAM, check)}"
    assert fuzz.main(["--programs", "1"]) == fuzz.main(["--only", "0"]) == 1
    assert "five at 5" in capsys.readouterr().err


def test_a_step_without_a_reference_cannot_be_made():
    class Forgotten(engine.Referenced):
        @classmethod
        def generate(cls, generator): ...

        def run(self, run): ...

    with pytest.raises(TypeError, match=r"abstract method '?reference"):
        Forgotten()


def test_a_number_is_not_taken_for_a_variable():
    with pytest.raises(AttributeError):
        engine.Run(PROGRAM).run()[2]


def test_a_step_that_does_not_make_what_it_says_is_an_error():
    class Lazy(Step, engine.Producer):
        def run(self, run): ...

        reference = run

    with pytest.raises(TypeError, match="made None"):
        engine.Run(engine.Program("", [Lazy()])).run()
