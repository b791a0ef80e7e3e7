"""How the command line shows errors and keeps libraries quiet."""

import logging
import sys
from collections.abc import Callable

from rich.console import Console

from loraplex.environment import ON, variable
from loraplex.errors import LoraplexError

_KERNELS_OF_BITSANDBYTES = "bitsandbytes.backends.cpu.ops"  # tells at import of a package for a faster 4-bit kernel


def run(command: Callable[[], None]) -> None:
    """Run the command line; a LoraplexError ends it with its message and status 1 (LORAPLEX_DEBUG=1: a traceback)."""
    quiet_transformers()
    try:
        command()
    except LoraplexError as error:
        if variable("LORAPLEX_DEBUG", "0").lower() in ON:  # nonsense must not hide the error
            raise
        Console(stderr=True, highlight=False).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(str(error))
        sys.exit(1)


def quiet_transformers() -> None:
    """Turn off the warnings and bars of transformers, where it has been imported."""
    logging.getLogger(_KERNELS_OF_BITSANDBYTES).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
