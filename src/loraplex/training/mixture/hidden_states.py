"""What the scaling head reads: the scaling pass's last hidden states, computed once for each text."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.layers.base.decoder import find_decoder
from loraplex.routing.layer_gates import LayerGates
from loraplex.routing.routing import use_routing
from loraplex.training.data.examples import Example
from loraplex.training.forward.batch import RowBatch, cut_sizes, forward_cost
from loraplex.training.mixture.routing import Experts, no_positions, scaled_routing
from loraplex.xlora.mixture import Mixture

OnProgress = Callable[[int, int], None]  # texts done, of how many


class HiddenStates:
    """The hidden states of examples, kept in the base model's dtype up to a budget, by their tokens.

    While experts are frozen the scaling pass depends on nothing that is trained. Which texts are kept, and in which
    batches they are computed, follows from the data alone: a resumed run computes the same bits.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        mixture: Mixture,
        experts: Experts,
        *,
        budget_bytes: int,
        tokens_per_forward: int,
    ) -> None:
        self._base = base
        decoder = find_decoder(base)
        assert decoder is not None, "mixtures are made for models with a decoder only"
        self._decoder = decoder
        self._mixture = mixture
        self._experts = experts
        self._gates = LayerGates()
        self._budget_bytes = budget_bytes if experts.frozen or mixture.pass_value == 0 else 0
        self._tokens_per_forward = tokens_per_forward
        self._kept: dict[tuple[int, ...], Tensor] = {}  # inputs -> [tokens, hidden]
        self.num_computed = 0  # texts that went through the scaling pass

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.values())

    def fill(self, examples: Sequence[Example], on_progress: OnProgress) -> None:
        """Compute and keep what fits the budget, first come first kept."""
        texts = self._fitting(examples)
        texts.sort(key=len, reverse=True)
        first = 0
        for size in _cut(texts, self._tokens_per_forward, forward_cost(self._base.device)):
            group = texts[first : first + size]
            first += size
            padded = torch.zeros(size, len(group[0]), dtype=torch.int64)
            for row, text in enumerate(group):
                padded[row, : len(text)] = torch.tensor(text)
            hidden = self.compute(padded.to(self._base.device))
            for row, text in enumerate(group):
                self._kept[text] = hidden[row, : len(text)].clone()
            on_progress(first, len(texts))

    def of(self, batch: RowBatch) -> Tensor:  # [rows, padded, hidden]
        """The batch's hidden states; zeros, or whatever the base model makes of it, at padding."""
        kept = [self._kept.get(row.example.inputs) for row in batch.rows]
        if any(states is None for states in kept):
            return self.compute(batch.input_ids)
        hidden = torch.zeros(
            *batch.input_ids.shape, self._mixture.head.hidden_size, dtype=self._base.dtype, device=self._base.device
        )
        for row, states in enumerate(kept):
            assert states is not None, "checked above"
            hidden[row, : len(states)] = states
        return hidden

    @torch.no_grad()
    def compute(self, input_ids: Tensor) -> Tensor:  # [rows, padded] -> [rows, padded, hidden]
        """Run the scaling pass: the base model, or the experts with the scaling pass's gates."""
        self.num_computed += len(input_ids)
        if self._mixture.pass_value == 0:
            hidden: Tensor = self._decoder(input_ids=input_ids, use_cache=False).last_hidden_state
            return hidden
        rows, length = input_ids.shape
        self._gates.set(self._mixture.pass_gates(1, 1, rows * length).to(input_ids.device))
        nothing = no_positions(input_ids.device)
        with use_routing(scaled_routing(self._experts, self._gates, rows, length, nothing)):
            hidden = self._decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden

    def _fitting(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        token_bytes = self._mixture.head.hidden_size * self._base.dtype.itemsize
        texts, left = [], self._budget_bytes
        for text in dict.fromkeys(example.inputs for example in examples):
            if len(text) * token_bytes <= left:
                texts.append(text)
                left -= len(text) * token_bytes
        return texts


def _cut(texts: Sequence[Sequence[int]], max_tokens: int, cost: int) -> list[int]:
    """Group sizes of texts in descending length; in parts, as the best cut takes long for very many."""
    part = 2048
    lengths = [len(text) for text in texts]
    return [
        size
        for first in range(0, len(texts), part)
        for size in cut_sizes(lengths[first : first + part], max_tokens, cost)
    ]
