"""A sequence's scaling pass: how far ahead of the main pass it is, and what it has told so far."""

import torch
from torch import Tensor

from loraplex.engine.kv.sequence_kv import SequenceKV


class SequenceScalingPass:
    """The base model (or its experts at a fixed scaling) on the same tokens, whose hidden states the heads read.

    It runs ahead of the main pass: while that reads one chunk of the prompt, this reads the next one. In decoding, it
    runs the token that its own logits expect next (a draft) beside the main pass of the token before. Where another
    token is chosen, its result is thrown away; gates always come from the tokens that are there.
    """

    def __init__(self, kv: SequenceKV, *, needs_from: int) -> None:
        self.kv = kv
        self.guess: int | None = None  # the token that its logits expect behind the last computed one
        self.draft: int | None = None  # the guess that was computed ahead of the main pass's choice
        self._hidden: list[Tensor] = []  # [tokens, hidden] each
        self._first = needs_from  # position of the first hidden state kept

    def token_at(self, position: int) -> int:
        """The token that a pass over `position` reads: behind the certain ones it is the draft."""
        if position < len(self.kv.tokens):
            return self.kv.tokens[position]
        assert self.guess is not None, "a draft was planned without a guess"
        return self.guess

    def took(self, start: int, hidden: Tensor, guess: int | None) -> None:
        """Keep the result of a pass over the tokens from `start` on."""
        if start + len(hidden) > len(self.kv.tokens):
            self.draft = self.guess
        if start < self._first:
            hidden = hidden[self._first - start :]
        if len(hidden):
            self._hidden.append(hidden)
        self.guess = guess

    def hidden(self, start: int, stop: int) -> Tensor:  # [stop - start, hidden]
        """The hidden states of tokens that the main pass is about to run."""
        if len(self._hidden) > 1:
            self._hidden = [torch.cat(self._hidden)]
        return self._hidden[0][start - self._first : stop - self._first]

    def forget(self, stop: int) -> None:
        """The main pass has run the tokens before `stop`."""
        if stop > self._first:
            kept = self.hidden(stop, self.kv.num_computed)
            self._hidden = [kept] if len(kept) else []
            self._first = stop

    def settle(self) -> bool | None:
        """A token was chosen: keep the draft's result if it is that one. Returns whether it was; None without one."""
        if self.draft is None:
            return None
        right = self.draft == self.kv.tokens[-1]
        self.draft = None
        if not right:
            self.kv.num_computed = len(self.kv.tokens) - 1
            self._hidden = [self.hidden(self._first, self.kv.num_computed)]
            self.guess = None
        return right
