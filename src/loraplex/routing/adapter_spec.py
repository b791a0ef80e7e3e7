"""What a row asks for: no adapter, one, or several linked ones with weights."""

import re
from collections.abc import Sequence

from loraplex.adapters.names import AUTO, check_name
from loraplex.errors import BatchError, LinkSyntaxError, NameFormatError

Link = tuple[tuple[str, float], ...]  # (adapter, weight) in the order of travel; () is the base model
AdapterSpec = None | str | Sequence[tuple[str, float]]

_INFINITE_IN_FLOAT32 = 2.0**128 - 2.0**103  # what float32 rounds to infinity, from here on
_GRAMMAR = (
    "A row is None (the base model), 'name', a link 'name:weight+name:weight', or a list of (name, weight) pairs; "
    "weights are finite floats."
)
# A weight may carry an exponent's sign ("1e+2"), which is not a link's '+'.
_PART = re.compile(r"(?P<name>[^:+]+)(?::(?P<weight>-?[0-9.]+[eE][+-]?\d+|[^:+]*))?(?P<end>\+|$)")


def is_auto(choice: object) -> bool:
    """Whether a row's adapter is to be chosen by its prompt."""
    return isinstance(choice, str) and choice == AUTO


def parse_adapter_spec(choice: AdapterSpec) -> Link:
    """Read one row's choice. Raises LinkSyntaxError, which names the part at fault."""
    if choice is None:
        return ()
    pairs = _parse_text(choice) if isinstance(choice, str) else _check_pairs(choice)
    names = [name for name, _ in pairs]
    if AUTO in names:
        raise LinkSyntaxError(
            f"{AUTO!r} in {choice!r} is no adapter: alone it lets the prompt choose one, in requests to an engine or a "
            "server and in `generate` and calls of the model. Name an adapter here."
        )
    for name in names:
        try:
            check_name(name)
        except NameFormatError as error:
            raise LinkSyntaxError(f"in the link {choice!r}: {error}") from None
        if names.count(name) > 1:
            raise LinkSyntaxError(
                f"the link {choice!r} names {name!r} twice. Name it once, with the sum of the weights."
            )
    return tuple(pairs)


def parse_adapter_specs(choices: Sequence[AdapterSpec] | None, num_rows: int) -> list[Link]:
    """One link for each row of a batch; None stands for a batch of base rows."""
    if num_rows == 0:
        raise BatchError("the batch is empty: input_ids has no rows. Pass at least one row.")
    if choices is None:
        return [()] * num_rows
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise BatchError(
            f"adapters={choices!r} is not a list. Pass one entry for each of the {num_rows} rows, for example "
            f"adapters=[{choices!r}] * {num_rows}."
        )
    if len(choices) != num_rows:
        raise BatchError(
            f"adapters has {len(choices)} entries but the batch has {num_rows} rows. Pass one entry for each row; "
            "None is the base model."
        )
    return [parse_adapter_spec(choice) for choice in choices]


def _parse_text(text: str) -> list[tuple[str, float]]:
    pairs, position, ended = [], 0, False
    while not ended:
        part = _PART.match(text, position)
        if part is None:
            rest = text[position:]
            raise LinkSyntaxError(f"the link {text!r} can't be read from {rest!r} on. {_GRAMMAR}")
        weight = part["weight"]
        pairs.append((part["name"], 1.0 if weight is None else _check_weight(weight, text)))
        position, ended = part.end(), part["end"] == ""
    return pairs


def _check_pairs(choice: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    if not isinstance(choice, Sequence) or len(choice) == 0:
        raise LinkSyntaxError(f"{choice!r} is not a row's choice. {_GRAMMAR}")
    pairs = []
    for pair in choice:
        if not (isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2):
            raise LinkSyntaxError(f"{pair!r} in the link {choice!r} is not a (name, weight) pair. {_GRAMMAR}")
        pairs.append((pair[0], _check_weight(pair[1], choice)))
    return pairs


def _check_weight(weight: object, link: object) -> float:
    try:
        value = float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise LinkSyntaxError(f"the weight {weight!r} in the link {link!r} is not a number. {_GRAMMAR}") from None
    if not abs(value) < _INFINITE_IN_FLOAT32:  # not for NaN
        raise LinkSyntaxError(f"the weight {weight!r} in the link {link!r} is not finite in float32. {_GRAMMAR}")
    return value
