"""Errors in the command line's words: flags in the place of Python's names.

An error is raised by what a program calls too, so its message names parameters: "max_length is 1", "pass resume=False".
Whoever typed a command knows --max-length and --no-resume.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from loraplex.errors import LoraplexError

# Names of the configurations whose flags are called otherwise, by the parameter that the flag has.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "steps": ("max_steps",),
    "rank": ("r",),
    "alpha": ("lora_alpha",),
    "targets": ("target_modules", "lora.target_modules"),
    "dropout": ("lora_dropout",),
    "answers": ("n",),
    "raw": ("chat",),
    "combination": ("method",),
}
_INVERTED = {"chat"}  # what is True without the flag
_CALLS = (  # of Python, and the parameter whose flag does the same
    (r"model\.load_adapter\((['\"])(.+?)\1, path(?:, replace=True)?\)", "load", r" \2=FOLDER"),
    (r"model\.load_mixture\((['\"])(.+?)\1, path\)", "load_mixture", r" \2=FOLDER"),
)


@contextmanager
def errors_in_flags(parameters: Sequence[Any]) -> Iterator[None]:
    """Inside the block, messages of LoraplexErrors name the flags of these parameters (of a click command)."""
    try:
        yield
    except LoraplexError as error:
        error.args = tuple(in_flags(part, parameters) if isinstance(part, str) else part for part in error.args)
        raise


def in_flags(message: str, parameters: Sequence[Any]) -> str:
    """The message with the flags of a command's parameters for their names; what is quoted stays as it is."""
    for option in (parameter for parameter in parameters if parameter.param_type_name == "option"):
        on = next(flag for flag in option.opts if flag.startswith("--"))
        off = next(iter(option.secondary_opts), None)
        for pattern, parameter, rest in _CALLS:
            if parameter == option.name:
                message = re.sub(pattern, on + rest, message)
        for name in (option.name, *ALIASES.get(option.name, ())):
            message = _replaced(message, name, *((off or f"no {on}", on) if name in _INVERTED else (on, off)))
    return message


def _replaced(message: str, name: str, on: str, off: str | None) -> str:
    start, word = r"(?<![\w.'\"/=-])", re.escape(name)
    message = re.sub(rf"{start}{word}=True\b", on, message)
    if off is not None:
        message = re.sub(rf"{start}{word}=False\b", off, message)
    message = re.sub(rf"{start}{word}=(?=[\w'\"\[])", f"{on} ", message)
    if "_" in name:
        return re.sub(rf"{start}{word}(?![\w'\"(]|\.\w)", on, message)
    # One word may be English: it is the option's name only where it is given a value.
    return re.sub(rf"(^|: |; | and ){word}(?= is )", rf"\g<1>{on}", message)
