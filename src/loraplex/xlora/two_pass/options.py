"""How a call runs its mixtures."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TwoPassOptions:
    """How the scaling pass is run."""

    draft: bool | None = None  # run it for a drafted next token beside the main pass; None: where that is faster
    collect: bool = False  # keep all scalings
