"""The attention scope: what the rows of one call ask for, current while the base model runs."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from loraplex.errors import AdapterError, BatchError, RequestError
from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.cache import ResidualState
from loraplex.residual.capture import CaptureBuffer
from loraplex.residual.chain import run_chain
from loraplex.residual.plan import LayerPlan, LayerPlanner
from loraplex.residual.rows import RowAttention


@dataclass(kw_only=True)
class AttentionScope:
    """Everything that one call's attention layers need; of one thread."""

    rows: Sequence[RowAttention]
    num_heads: Mapping[int, int]  # by attention layer
    paddings: Sequence[int]  # of each row, on the left
    buffers: Mapping[int, CaptureBuffer] = field(default_factory=dict)  # by row
    state: ResidualState | None = None  # with a KV cache: u of the tokens before
    fed_before: int = 0  # tokens that the cache held when the scope began
    cached: bool = True  # whether a pass goes on from those before it; else each has all tokens
    failures: dict[int, AdapterError] | None = None  # by row: recorded there, and the row goes on; None raises
    copies: int | None = None  # sequences a row; the first pass tells, later ones may have others behind them
    pending: dict[int, AttentionWeights] = field(default_factory=dict)  # between attention and its block's output
    _fed: dict[int, int] = field(default_factory=dict)  # by layer: tokens so far
    _plans: dict[tuple[int, int], LayerPlan | None] = field(default_factory=dict)

    def plan(self, layer: int, like: Tensor) -> LayerPlan | None:
        """What to do at `layer` for a pass of like.shape[0] sequences; None is nothing."""
        key = (layer, like.shape[0])
        if key not in self._plans:
            planner = LayerPlanner(
                layer=layer,
                rows=self.rows,
                paddings=self.paddings,
                buffers=self.buffers,
                failures=self.failures,
                dtype=torch.promote_types(like.dtype, torch.float32),
                device=like.device,
            )
            self._plans[key] = planner.build(self._copies(like.shape[0]), like.shape[0])
        return self._plans[key]

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
        residual = run_chain(plan, layer, x, weights, self.state)
        for place, buffer in plan.captures:
            buffer.keep_norms(layer, residual[place].norm(dim=-1), weights.first_key + weights.num_keys - x.shape[1])
        residual = residual.to(output.dtype)
        return output + residual if plan.index is None else output.index_add(0, plan.sequences, residual)

    def _copies(self, num_sequences: int) -> int:
        if self.copies is not None and num_sequences >= len(self.rows) * self.copies:
            return self.copies
        if num_sequences % len(self.rows) != 0:
            raise BatchError(
                f"an attention layer got {num_sequences} sequences for {len(self.rows)} rows. The batch must keep its "
                "rows in order, each repeated equally often (as beam search and num_return_sequences do)."
            )
        self.copies = num_sequences // len(self.rows)
        return self.copies


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
