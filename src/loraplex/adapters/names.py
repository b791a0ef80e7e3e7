"""The names that adapters may have."""

import re

from loraplex.errors import NameFormatError
from loraplex.validation import quoted

AUTO = "auto"  # in the place of a name: let the prompt choose

_NAME = re.compile(r"[A-Za-z0-9._/-]{1,128}")


def check_name(name: str) -> str:
    """Return `name` if an adapter may be called so; ':' and '+' belong to the grammar of links."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise NameFormatError(
            f"{quoted(name)} can't name an adapter: a name is 1 to 128 characters of letters, digits, '.', '_', "
            "'-' and '/'. Choose another name, for example 'team/protein-v2'."
        )
    if name == AUTO:
        raise NameFormatError(
            f"{AUTO!r} can't name an adapter: it is reserved for requests whose adapter is chosen by their prompt. "
            "Choose another name."
        )
    return name
