"""Where an aLoRA (activated LoRA) begins: at the last occurrence of its invocation tokens."""

from collections.abc import Sequence


def invocation_start(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """The index of the first token that the adapter adapts; None: the row is the base model's.

    As PEFT finds it (`calculate_alora_offsets`): the last one counts, and tokens generated later are adapted too.
    """
    wanted, size = tuple(invocation), len(invocation)
    starts = (start for start in range(len(tokens) - size, -1, -1) if tuple(tokens[start : start + size]) == wanted)
    return next(starts, None)
