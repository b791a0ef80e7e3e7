"""The base model that a residual belongs to."""

from dataclasses import asdict, dataclass
from typing import Any

from loraplex.errors import BaseModelMismatchError
from loraplex.validation import quoted


@dataclass(frozen=True, kw_only=True)
class BaseFingerprint:
    """What a residual adapter must find in a base model: the same class with the same sizes."""

    architecture: str  # "LlamaForCausalLM"
    hidden_size: int
    vocab_size: int
    num_heads: tuple[int, ...]  # of each attention layer
    name: str | None = None  # informative: the same model may lie in any folder

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"num_heads": list(self.num_heads)}


def check_same_base(name: str, made_for: BaseFingerprint, identity: BaseFingerprint) -> None:
    """Raise BaseModelMismatchError unless a residual was made for such a base.

    One without heads says nothing about them: of a base model whose attention wasn't looked at.
    """
    knows_heads = made_for.num_heads and identity.num_heads
    compared = ("architecture", "hidden_size", "vocab_size", *(("num_heads",) if knows_heads else ()))
    differences = [
        f"{what} {quoted(getattr(made_for, what))} (here {getattr(identity, what)!r})"
        for what in compared
        if getattr(made_for, what) != getattr(identity, what)
    ]
    if differences:
        raise BaseModelMismatchError(
            f"residual {name!r} was made for another base model ({quoted(made_for.name)}), with "
            f"{'; '.join(differences)}. Load that one."
        )
