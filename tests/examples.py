"""How many examples hypothesis makes, and whether they are the same each time.

`make test` tries the same ones on every machine. `make test-full` sets LORAPLEX_EXAMPLES=random: five times as many,
others each time; a failure prints how to make its example again.
"""

import os

from hypothesis import settings

_PROFILE = os.environ.get("LORAPLEX_EXAMPLES", "fixed")
_FACTOR = {"fixed": 1, "random": 5}[_PROFILE]


def use_profile() -> None:
    """Load the profile that the environment names; tests that are defined from now on follow it."""
    settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
    settings.register_profile("random", max_examples=500, derandomize=False, print_blob=True, deadline=None)
    settings.load_profile(_PROFILE)


def examples(count: int) -> settings:
    """So many examples of a test, or as many more as the profile wants."""
    return settings(max_examples=count * _FACTOR)
