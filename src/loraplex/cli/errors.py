"""How the command line shows errors and keeps libraries quiet."""

import logging
import sys
from collections.abc import Callable

from rich.console import Console

from loraplex.environment import ON, variable
from loraplex.errors import LoraplexError


def run(command: Callable[[], None]) -> None:
    """Run the command line; a LoraplexError ends it with its message and status 1 (LORAPLEX_DEBUG=1: a traceback)."""
    quiet_libraries()
    try:
        command()
    except LoraplexError as error:
        if variable("LORAPLEX_DEBUG", "0").lower() in ON:  # nonsense must not hide the error
            raise
        show_error(error)
        sys.exit(1)


def show_error(error: LoraplexError) -> None:
    """Print an error's message to standard error."""
    Console(stderr=True, highlight=False).print("[bold red]Error[/]: ", end="")
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(str(error))


def quiet_libraries() -> None:
    """Turn off the warnings and bars of transformers, where it has been imported, and of what it imports."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nobody asked for
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
