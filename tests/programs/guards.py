"""Running a program under guard."""

import warnings

from safe_inplace import HazardError, HazardWarning

REFUSED = "modified by an inplace operation"


def of_an_overwritten_value(refused):
    """Whether it is what torch says where a version tells."""
    return refused is not None and REFUSED in str(refused.error)


def names_the_write(refused):
    """Whether it is what guard says, with both places."""
    error = refused and refused.error
    return isinstance(error, HazardError) and error.mutation is not None and error.save is not None


def run_under(context, run, stop=None):
    """The run, and what the context gave."""
    with warnings.catch_warnings(), context as watch:
        warnings.simplefilter("ignore", HazardWarning)
        return run.run(stop), watch
