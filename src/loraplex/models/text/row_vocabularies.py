"""The tokens of a call's rows, where adapters have other ones than the base model."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loraplex.errors import RequestError


class RowVocabularies:
    """How many tokens each row has; tokens that a row doesn't have get no logits."""

    def __init__(self, sizes: Sequence[int], num_base: int) -> None:
        self._sizes = torch.tensor(sizes)
        self._is_plain = all(size == num_base for size in sizes)
        self._num_base = num_base

    @property
    def is_plain(self) -> bool:
        """Whether all rows have the base model's tokens."""
        return self._is_plain

    def check(self, input_ids: Tensor | None, inputs: dict[str, Any]) -> None:
        """Raise RequestError for a token that its row doesn't have, and where that can't be told."""
        if self._is_plain:
            return
        if input_ids is None or inputs.get("labels") is not None:
            what = "labels" if input_ids is not None else "inputs_embeds"
            raise RequestError(
                f"a row's adapter has tokens of its own, with which {what} can't be used. Pass input_ids alone."
            )
        sizes = self._sizes.to(input_ids.device).unsqueeze(1)
        wrong = (input_ids >= sizes).nonzero()
        if len(wrong):
            row, place = wrong[0].tolist()
            raise RequestError(
                f"row {row} has the token {int(input_ids[row, place])}, but its adapters have "
                f"{int(self._sizes[row])} tokens. Tokenize it with model.tokenizer_of(adapters)."
            )

    def mask(self, logits: Tensor) -> Tensor:  # [sequences, .., tokens]
        """-inf for tokens that a row doesn't have; rows follow each other, each equally often."""
        copies = logits.shape[0] // len(self._sizes)
        sizes = self._sizes.to(logits.device).repeat_interleave(copies).view(-1, *[1] * (logits.ndim - 1))
        return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= sizes, -math.inf)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As a LogitsProcessor of transformers' `generate`."""
        return self.mask(scores)
