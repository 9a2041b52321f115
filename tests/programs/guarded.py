"""The programs of the differential test, by torch's own ops, under guard in each mode, and out of place.

They have detached aliases, views, hooks, writes under no_grad, several backwards and second derivatives.
"""

from safe_inplace import HazardError, guard

from .engine import Fuzz, expect
from .forward.check import Reference, Torch, compare, keeping_graphs
from .forward.generator import Generator
from .forward.steps import Step
from .guards import of_an_overwritten_value, run_under
from .machines import Unsupported


def check(program, under=guard):
    """How the program ended; raises Disagreement where guard did not do what the program out of place says."""
    plain = Torch(program).run()
    refused = plain.refused
    warned, raised, deferred = (run_under(under(mode), Torch(program))[0].refused for mode in ("warn", "raise", "defer"))
    repaired, watched = run_under(under("copy"), Torch(program))
    left = repaired.refused
    told = f"torch: {refused}, warn: {warned}, raise: {raised}, defer: {deferred}, copy: {left}"
    if refused is None:
        # A value that is overwritten and never asked for is a hazard all the same: "raise" may stop where torch does not.
        expect(warned is None and left is None and deferred is None, f"a false alarm. {told}")
        expect(raised is None or isinstance(raised.error, HazardError), f"raise stops for another reason. {told}")
        compare(repaired, plain, "copy against torch")
        return "finishes"
    expect(warned is not None and warned.step == refused.step and raised is not None, f"warn or raise missed it. {told}")
    if not of_an_overwritten_value(refused) and left is not None and left.step == refused.step:
        return "refused for another reason"
    # In backward torch also refuses what an unbind gave and a write to its base replaced: overwritten in other words.
    expect(of_an_overwritten_value(warned), f"warn does not end as torch does. {told}")
    expect(isinstance(raised.error, HazardError) and raised.step <= refused.step, f"raise missed it. {told}")
    expect(deferred is not None and isinstance(deferred.error, HazardError), f"defer missed it. {told}")
    expect(deferred.step == refused.step, f"defer stops elsewhere. {told}")
    expect(watched.hazards_seen > 0, f"copy saw no hazard. {told}")
    gone_on = left is None or (left.step >= refused.step and not of_an_overwritten_value(left))
    expect(gone_on, f"copy did not repair it. {told}")
    stop = None if left is None else left.step
    try:
        expected = Reference(program).run(stop)
    except Unsupported:
        return "refused, and the reference has no meaning for a step"
    expect(expected.refused is None, f"the program out of place is refused: {expected.refused}. {told}")
    if stop is not None:
        repaired, _ = run_under(under("copy"), Torch(program), stop)
    compare(repaired, expected, "copy against the program out of place", hooks=False)
    return "refused, repaired"


def generate(name):
    # A graph that backward freed ends a program for a reason that is none of guard's.
    return keeping_graphs(Generator(name).generate())


FUZZ = Fuzz("guarded", __doc__.split("\n")[0], Step, generate, check, programs=20_000)
