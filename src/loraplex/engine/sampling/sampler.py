"""Choose one sequence's next token from its logits."""

import math
from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from loraplex.engine.sampling.logprobs import top_tokens
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sampling.restrictions import Restrictions
from loraplex.errors import EngineError, RequestError

_BLOCK = 256  # logits whose largest is found at once: near the root of a vocabulary, so both searches are short


class Constraint(Protocol):
    """What a grammar allows next."""

    def allow(self, logits: Tensor) -> None:
        """Set the logits [vocab] of tokens that can't come next to -inf."""
        ...

    def take(self, token: int) -> None:
        """Go on with a chosen token."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        ...


class Sampler:
    """Sampling options, their random state and the counts that penalties need."""

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Sequence[int],
        end_tokens: Collection[int],
        seed: int,
        constraint: Constraint | None = None,
        restrictions: Restrictions | None = None,
    ) -> None:
        self.sampling = sampling
        self.constraint = constraint
        self._restrictions = restrictions
        self._last: deque[int] = deque(maxlen=0 if restrictions is None else restrictions.longest)  # of the answer
        seen = sorted(set(prompt)) if sampling.repetition_penalty != 1 else []
        self._prompt_tokens = torch.tensor(seen, dtype=torch.int64)
        self.end_at(end_tokens)
        self._biased = torch.tensor(list(sampling.logit_bias), dtype=torch.int64)
        self._biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self._counts: Counter[int] = Counter()  # of the answer
        self._generator = torch.Generator().manual_seed(seed) if sampling.temperature > 0 else None

    def end_at(self, end_tokens: Collection[int]) -> None:
        """Let the answer end with one of these tokens."""
        self.end_tokens = frozenset(end_tokens)
        self._ends = sorted(self.end_tokens)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is the largest logit's, so that a whole batch's can be found at once."""
        return self.sampling.temperature == 0 and not self.sampling.changes_logits

    def choose(self, logits: Tensor) -> int:  # [vocab], of the model
        """The next token; penalties, bias and grammar first, then temperature, top-k, top-p and min-p.

        Raises RequestError where the request's options leave no token, and EngineError for logits that are NaN.
        """
        logits = logits.float()
        if self.sampling.changes_logits:
            logits = self._changed(logits.clone())
        most = float(logits.max())
        if most == -math.inf:
            raise RequestError(
                "no token can follow: logit_bias, allowed_token_ids, bad_words, min_tokens and the grammar together "
                "exclude all of them. Allow some."
            )
        if math.isnan(most):
            raise EngineError("the model's logits for the next token are NaN, so none can be chosen.")
        if self._generator is None:
            return int(logits.argmax())
        return draw(logits, self.sampling, self._generator)

    def took(self, token: int) -> None:
        """Count a token of the answer."""
        self._counts[token] += 1
        self._last.append(token)
        if self.constraint is not None:
            self.constraint.take(token)

    def _changed(self, logits: Tensor) -> Tensor:
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            new = torch.tensor(list(self._counts), dtype=torch.int64)
            seen = torch.cat([self._prompt_tokens, new]).to(logits.device)  # some twice, which get one value
            values = logits[seen]
            penalty = sampling.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            tokens = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), device=logits.device)
            logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        largest_finite = torch.finfo(logits.dtype).max  # two infinite logits can't be compared
        logits.clamp_(max=largest_finite)
        if sampling.logit_bias:
            biased = logits[self._biased] + self._biases.to(logits.device)
            logits[self._biased] = biased.clamp(max=largest_finite)
        if self._restrictions is not None:
            self._restrictions.apply(logits, tuple(self._last))
        if self.constraint is not None:
            self.constraint.allow(logits)
        if self._ends and self._counts.total() < sampling.min_tokens:
            ends = logits[self._ends]
            logits[self._ends] = float("-inf")
            if self.constraint is not None and not logits.isfinite().any():
                logits[self._ends] = ends  # the grammar lets nothing else follow
        return logits


def draw(logits: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    """One token of the distribution softmax(logits / temperature) after top-k, top-p and min-p, in that order.

    One uniform number decides, looked up in the cumulated probabilities, largest first.
    """
    logits = logits.cpu()
    # Below the largest one, so that a temperature near 0 makes others -inf, and not all of them infinite.
    scaled = (logits - logits.max()) / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    if 0 < sampling.top_k < len(scaled):
        values, tokens = top_tokens(scaled, sampling.top_k)
    else:
        values, tokens = scaled.sort(descending=True, stable=True)
    probabilities = torch.softmax(values, dim=-1)
    kept = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.top_p < 1:
        kept &= probabilities.cumsum(dim=-1) - probabilities < sampling.top_p
    if sampling.min_p > 0:
        kept &= probabilities >= sampling.min_p * probabilities[0]
    kept[0] = True  # the likeliest stays whatever the options say
    cumulated = torch.where(kept, probabilities, 0).cumsum(dim=-1)
    threshold = torch.rand(1, generator=generator) * cumulated[-1]
    place = int(torch.searchsorted(cumulated, threshold, right=True))
    return int(tokens[min(place, int(kept.nonzero()[-1]))])


def largest(logits: Tensor) -> Tensor:  # [n, vocab]
    """What logits.argmax(dim=-1) gives [n]: the largest block first, as torch's CPU argmax doesn't use vectors."""
    whole = logits.shape[-1] // _BLOCK * _BLOCK
    if logits.device.type != "cpu" or whole == 0:
        return logits.argmax(dim=-1)
    maxima = [logits[:, :whole].unflatten(-1, (-1, _BLOCK)).amax(dim=-1)]
    if whole < logits.shape[-1]:
        maxima.append(logits[:, whole:].amax(dim=-1, keepdim=True))
    first = torch.cat(maxima, dim=-1).argmax(dim=-1, keepdim=True) * _BLOCK
    places = (first + torch.arange(_BLOCK)).clamp(max=logits.shape[-1] - 1)
    return (first + logits.gather(-1, places).argmax(dim=-1, keepdim=True)).squeeze(-1)
