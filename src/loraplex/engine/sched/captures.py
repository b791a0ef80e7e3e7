"""What an answer's main pass shows besides its tokens: captured attention and scalings."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraplex.engine.request import TokenScalings
from loraplex.engine.sched.request_adapters import BoundMixture, BoundRouter
from loraplex.residual.calls import token_texts
from loraplex.residual.capture import AttentionCapture, CaptureBuffer
from loraplex.residual.modules import FunctionResidual
from loraplex.residual.plan import RowPlans
from loraplex.residual.rows import RowAttention
from loraplex.xlora.scalings.row_scalings import RowScalings


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceAttention:
    """What an answer asks of attention, where it asks for something."""

    row: RowAttention
    buffer: CaptureBuffer | None

    @cached_property
    def plans(self) -> RowPlans:
        """What each layer does for this row by itself."""
        return RowPlans((self.row,), buffers={} if self.buffer is None else {0: self.buffer}, failures={})

    @cached_property
    def stands_alone(self) -> bool:
        """Whether its single tokens aren't computed beside those of others."""
        return self.buffer is not None or any(isinstance(link.residual, FunctionResidual) for link in self.row.chain)


class Captures:
    """Kept while an answer is made, also while it has given way."""

    def __init__(
        self, buffer: CaptureBuffer | None, tokenizer: PreTrainedTokenizerBase | None, *, wants_scalings: bool
    ) -> None:
        self.buffer = buffer
        self.wants_scalings = wants_scalings
        self.num_seen = 0  # tokens whose main pass has run with all of this
        self._tokenizer = tokenizer
        self._scalings: list[tuple[int, list[Tensor]]] = []  # first position; by mixture [tokens, lora_layers, experts]

    def most_reused(self, num_tokens: int, mixtures: Sequence[BoundMixture | BoundRouter]) -> int:
        """How many of the first tokens may come from the prefix cache: those that nothing is wanted of any more."""
        unwanted = num_tokens if self.buffer is None else self.buffer.first_query
        if self.wants_scalings and mixtures:
            unwanted = 0
        return min(num_tokens, max(unwanted, self.num_seen))

    def saw(self, start: int, stop: int, scalings: list[Tensor]) -> None:
        """A main pass has run the tokens [start, stop)."""
        self.num_seen = max(self.num_seen, stop)
        if self.wants_scalings:
            self._scalings.append((start, [_own(values) for values in scalings]))

    def step_scalings(self) -> tuple[TokenScalings, ...]:
        """One entry, of the last token that was run; none if scalings aren't wanted."""
        if not self.wants_scalings:
            return ()
        return (tuple(tuple(values[-1].float().mean(dim=0).tolist()) for values in self._scalings[-1][1]),)

    def capture(self, tokens: Sequence[int]) -> AttentionCapture | None:
        """What was captured; None if nothing ran."""
        if self.buffer is None or self.num_seen == 0:
            return None
        ids = list(tokens[: self.num_seen])
        return self.buffer.result(ids, token_texts(ids, self._tokenizer))

    def scalings(
        self, tokens: Sequence[int], mixtures: Sequence[BoundMixture | BoundRouter]
    ) -> tuple[RowScalings, ...] | None:
        """The scalings of each mixture; None if they weren't asked for or nothing ran. Raises ScalingsError."""
        if not self.wants_scalings or self.num_seen == 0:
            return None
        return tuple(
            RowScalings(
                mixture=bound.mixture.name,
                experts=bound.mixture.experts,
                layers=bound.mixture.layers,
                token_ids=tuple(tokens[: self.num_seen]),
                values=self._joined(use),
            )
            for use, bound in enumerate(mixtures)
        )

    def _joined(self, use: int) -> Tensor:  # [tokens, lora_layers, experts]  float32
        """One mixture's scalings of all tokens; a pass that ran tokens again counts for them."""
        chunks: list[Tensor] = []
        stop = self.num_seen
        for start, scalings in reversed(self._scalings):
            if start < stop:
                chunks.append(scalings[use][: stop - start])
                stop = start
        return torch.cat(chunks[::-1]).float().cpu()


def _own(values: Tensor) -> Tensor:  # [tokens, lora_layers, experts]
    """A copy that doesn't keep the scalings of the whole pass; layers that share theirs go on sharing."""
    if values.stride(1) == 0:
        return values[:, :1].clone().expand_as(values)
    return values.clone()
