"""Check that a residual belongs to a base model."""

from collections.abc import Mapping

from loraplex.errors import BaseModelMismatchError
from loraplex.residual.config import BaseFingerprint
from loraplex.residual.modules import FunctionResidual, LinkedResidual, Residual
from loraplex.validation import listed, quoted


def check_same_base(name: str, made_for: BaseFingerprint, identity: BaseFingerprint) -> None:
    """Raise BaseModelMismatchError unless a residual was made for such a base."""
    differences = [
        f"{what} {quoted(getattr(made_for, what))} (here {getattr(identity, what)!r})"
        for what in ("architecture", "hidden_size", "vocab_size", "num_heads")
        if getattr(made_for, what) != getattr(identity, what)
    ]
    if differences:
        raise BaseModelMismatchError(
            f"residual {name!r} was made for another base model ({quoted(made_for.name)}), with "
            f"{'; '.join(differences)}. Load that one."
        )


def check_residual_fits(name: str, residual: Residual, identity: BaseFingerprint, num_heads: Mapping[int, int]) -> None:
    """Raise BaseModelMismatchError unless the residual was made for such a base and its layers are there."""
    missing = [layer for layer in residual.layers or () if layer not in num_heads]
    if missing:
        raise BaseModelMismatchError(
            f"residual {name!r} has the layers {missing}, which this base model doesn't have: its attention layers are "
            f"{min(num_heads)} to {max(num_heads)}."
        )
    if isinstance(residual, FunctionResidual):
        return
    check_same_base(name, residual.base, identity)
    wrong = []
    for layer, weights in residual.layers.items():
        if isinstance(residual, LinkedResidual):
            linked = residual.layers[layer]
            shapes = (tuple(linked.a.shape), tuple(linked.b.shape), tuple(linked.head_logits.shape))
            hidden = (linked.rank, identity.hidden_size)
            if shapes != (hidden, hidden, (linked.rank, num_heads[layer])):
                wrong.append(f"layer {layer}")
        elif tuple(weights.shape) != (identity.hidden_size,):  # type: ignore[union-attr]
            wrong.append(f"layer {layer}")
    if wrong:
        raise BaseModelMismatchError(
            f"residual {name!r} has weights of other shapes than this base model needs, at {listed(wrong)}. Load the "
            "base model that it was made for."
        )
