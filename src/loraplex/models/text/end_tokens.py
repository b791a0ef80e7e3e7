"""Which tokens end an answer: one rule for training, which writes them, and for serving, which stops at them.

Three places may name them, and don't always agree: the base model's generation_config (one or several), the
tokenizer's eos_token, and the chat template, which writes a token after an assistant's turn.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from loraplex.models.text.chat_template import turn_end
from loraplex.xlora.two_pass.generation import generation_setting

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingEnds:
    """What training ends answers with."""

    plain: int | None  # appended to completions and texts, and to turns of a template that ends them with nothing
    turn: int | None  # that the chat template writes after an answer

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(token for token in (self.turn, self.plain) if token is not None))


def end_token_ids(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, num_tokens: int | None = None
) -> tuple[int, ...]:
    """The tokens that end an answer of the base model: those of all three places; without tokenizer, of the first.

    With an adapter's own tokenizer, `num_tokens` are the rows of its embedding.
    """
    named: list[int] = list(generation_ends(base))
    if tokenizer is not None:
        named += [token for token in (tokenizer.eos_token_id, turn_end(tokenizer)) if token is not None]
    most = _vocab_size(base) if num_tokens is None else num_tokens
    return tuple(dict.fromkeys(token for token in named if 0 <= token < most))


def generation_ends(base: PreTrainedModel, generation: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """The tokens at which transformers' `generate` stops with these options, of those that the model has."""
    named = generation_setting(base, generation or {}, "eos_token_id")
    ends = () if named is None else (named,) if isinstance(named, int) else tuple(int(end) for end in named)
    return tuple(end for end in ends if 0 <= end < _vocab_size(base))


def _vocab_size(base: PreTrainedModel) -> int:
    return int(next(base.get_input_embeddings().parameters()).shape[0])


def training_ends(base: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> TrainingEnds:
    """What to end answers with: a token at which transformers stops too, where there is one.

    Warns where tokenizer, chat template and generation_config disagree.
    """
    stops = () if base is None else generation_ends(base)
    eos, turn = tokenizer.eos_token_id, turn_end(tokenizer)
    preferred = [token for token in (eos, turn, *stops) if token is not None]
    plain = next((token for token in preferred if token in stops), next(iter(preferred), None))
    if base is not None:
        _warn_of_differences(tokenizer, stops, TrainingEnds(plain=plain, turn=turn))
    return TrainingEnds(plain=plain, turn=turn)


def _warn_of_differences(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], ends: TrainingEnds) -> None:
    def named(token: int) -> str:
        return f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"

    where = f"generation_config.eos_token_id is {list(stops)}"
    if ends.plain is None:
        logger.warning("no token ends an answer: the tokenizer has no eos_token, and %s", where)
        return
    eos = tokenizer.eos_token_id
    if eos is not None and eos != ends.plain:
        logger.warning(
            "the tokenizer's eos_token is %s, but %s: completions and texts are trained to end with %s",
            *(named(eos), where, named(ends.plain)),
        )
    for token in ends.all:
        if token not in stops:
            logger.warning(
                "answers are trained to end with %s, but %s: loraplex stops there, because the adapter's folder "
                "says so; elsewhere, add it to eos_token_id or to a request's stop tokens",
                *(named(token), where),
            )


class RowEnds(StoppingCriteria):
    """Ends each row of a generation at its own tokens."""

    def __init__(self, ends: Sequence[Sequence[int]]) -> None:
        most = max(map(len, ends))
        self._table = torch.tensor([[*of_row, *[-1] * (most - len(of_row))] for of_row in ends])  # [rows, most]
        # By this attribute `generate` knows that rows which have ended are filled up with padding.
        self.eos_token_id = sorted({token for of_row in ends for token in of_row})

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # [sequences]  bool
        copies = input_ids.shape[0] // len(self._table)  # beams and returned sequences of a row follow each other
        table = self._table.to(input_ids.device).repeat_interleave(copies, dim=0)
        return (input_ids[:, -1:] == table).any(dim=1)


def stop_rows(generation: dict[str, Any], ends: Sequence[Sequence[int]], base: PreTrainedModel) -> None:
    """Tell transformers' `generate`, by its options, to end each row at these tokens too."""
    generation["stopping_criteria"] = [*(generation.get("stopping_criteria") or ()), RowEnds(ends)]
    config = generation.get("generation_config") or base.generation_config
    if generation.get("pad_token_id") is None and (config.pad_token_id, config.eos_token_id) == (None, None):
        generation["pad_token_id"] = next(end for of_row in ends for end in of_row)  # what follows the end of a row
