"""Log probabilities of tokens, as a request may ask for them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of probabilities, of the model's own logits: before penalties, temperature and filters."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, in order


def token_logprobs(logits: Tensor, token: int, num_top: int) -> TokenLogprobs:  # [vocab]
    """Of the model's own distribution. Its order is the logits': subtracting their sum can make two of them equal."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    top = top_tokens(logits, num_top)[1] if num_top else None
    before = int((logits > logits[token]).sum()) + int((logits[:token] == logits[token]).sum())
    return TokenLogprobs(
        token_id=token,
        logprob=float(logprobs[token]),
        rank=before + 1,
        top=() if top is None else tuple(zip(top.tolist(), logprobs[top].tolist(), strict=True)),
    )


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:  # [vocab]
    """The `count` largest logits and their tokens, largest first; of equal ones the lowest token, as argmax chooses."""
    count = min(count, len(logits))
    least = logits.topk(count).values[-1]
    tokens = (~(logits < least)).nonzero().squeeze(-1)  # ascending; more than `count` where several are equal
    values, order = logits[tokens].sort(descending=True, stable=True)
    return values[:count], tokens[order[:count]]
