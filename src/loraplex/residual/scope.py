"""The attention scope: what the rows of one call ask for, current while the base model runs."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from loraplex.errors import RequestError
from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.cache import ResidualState
from loraplex.residual.plan import LayerPlan, RowPlans


@dataclass(kw_only=True)
class AttentionScope:
    """Everything that one call's attention layers need; of one thread."""

    plans: RowPlans
    num_heads: Mapping[int, int]  # by attention layer
    state: ResidualState | None = None  # with a KV cache: u of the tokens before
    fed_before: int = 0  # tokens that the cache held when the scope began
    cached: bool = True  # whether a pass goes on from those before it; else each has all tokens
    pending: dict[int, AttentionWeights] = field(default_factory=dict)  # between attention and its block's output
    _fed: dict[int, int] = field(default_factory=dict)  # by layer: tokens so far

    def plan(self, layer: int, like: Tensor) -> LayerPlan | None:
        """What to do at `layer` for a pass of like.shape[0] sequences; None is nothing."""
        return self.plans.plan(layer, like, like.shape[0])

    def feed(self, layer: int, num_tokens: int) -> int:
        """Count a pass's tokens at a layer; returns how many were fed so far, these included."""
        before = self._fed.get(layer, self.fed_before) if self.cached else self.fed_before
        self._fed[layer] = before + num_tokens
        return self._fed[layer]

    def check_whole(self, layer: int) -> None:
        """Raise RequestError for a layer that saw fewer tokens of a pass than one before it."""
        if self._fed[layer] != max(self._fed.values()):
            raise RequestError(
                f"attention layer {layer} was given {self._fed[layer]} of {max(self._fed.values())} tokens, because "
                "the logits of some only are wanted; residuals and captures there need all of them. Call the base "
                "model without logits_to_keep."
            )

    def add_residuals(self, layer: int, x: Tensor, output: Tensor) -> Tensor:
        """An attention block's output [sequences, tokens, hidden] with the rows' residuals; x is its normed input."""
        weights = self.pending.pop(layer)
        plan = self.plan(layer, x)
        assert plan is not None, "attention weights wait for a layer without residuals"
        residual = plan.residual(x, weights, self.state).to(output.dtype)
        return output + residual if plan.index is None else output.index_add(0, plan.sequences, residual)


class BlockScope(Protocol):
    """What attention blocks see of the scope of the pass that runs now."""

    @property
    def pending(self) -> Container[int]:
        """The layers whose blocks have residuals to add."""
        ...

    def add_residuals(self, layer: int, x: Tensor, output: Tensor) -> Tensor:
        """A block's output with the residuals; x [sequences, tokens, hidden] is its normed input."""
        ...


_current: ContextVar[BlockScope | None] = ContextVar("loraplex_current_attention", default=None)


def current_attention() -> BlockScope | None:
    """The scope of the call that runs now; None outside of one."""
    return _current.get()


@contextmanager
def use_attention(scope: BlockScope | None) -> Iterator[None]:
    """Make `scope` current inside the block; None lets the base model attend as it does by itself."""
    token = _current.set(scope)
    try:
        yield
    finally:
        _current.reset(token)
