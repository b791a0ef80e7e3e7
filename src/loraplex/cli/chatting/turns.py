"""What a chat asks of a model, here or on a server, and what comes back piece by piece."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

BASE = "none"  # the adapters of a turn that the base model answers


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A conversation that waits for its next answer."""

    messages: Sequence[Mapping[str, str]]
    adapters: str = BASE
    options: Mapping[str, Any] = field(default_factory=dict)  # of sampling; what is missing is the model's default


@dataclass(frozen=True, kw_only=True)
class AnswerPiece:
    """What has been added to an answer."""

    text: str = ""
    num_tokens: int | None = None  # of the whole answer, with its last piece; None: nobody told
    finish_reason: str | None = None  # with the last piece
    chosen: str | None = None  # by "auto": a name, or BASE


class ChatModel(Protocol):
    """Where answers come from."""

    title: str

    def answer(self, turn: Turn) -> Iterator[AnswerPiece]:
        """The answer as it is made; closing the iterator cancels it. Raises LoraplexError.

        An interrupt arrives as KeyboardInterrupt where it does no harm.
        """
        ...

    def names(self) -> Sequence[str]:
        """Adapters, mixtures and residuals that a turn may name. Raises LoraplexError."""
        ...

    def load(self, name: str, folder: str) -> None:
        """Load an adapter, a mixture or a residual from a folder. Raises LoraplexError."""
        ...

    def close(self) -> None: ...
