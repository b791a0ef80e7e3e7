"""What every request should have answered: transformers' generate, row by row, when all is over."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.bench.churn_adapters import DrawnSpec
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.routing.adapter_spec import AdapterSpec

_TIE = 1e-4  # two answers may differ where the best two logits are this close, of the logits' range
_ROWS = 8  # of one call: their adapters, and the two that stay, fit into the churn's slots


@dataclass(frozen=True)
class Answered:
    """An answer, and the versions of its changing adapter that it may have gone through."""

    prompt: int  # its number
    choice: DrawnSpec
    versions: frozenset[int | None]
    token_ids: tuple[int, ...]


class Reference:
    """Compares answers with those of `generate`, which are computed once for each prompt, choice and version."""

    def __init__(self, model: MultiLoraModel, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        self._model = model
        self._prompts = prompts
        self._num_tokens = num_tokens
        self._answers: dict[tuple[int, AdapterSpec], tuple[int, ...]] = {}

    def check(self, answers: Iterable[Answered]) -> tuple[int, list[str]]:
        """The number of ties, and what is wrong."""
        answers = list(answers)
        self._compute({(answer.prompt, row) for answer in answers for row in _rows(answer)})
        num_ties, wrong = 0, []
        for answer in answers:
            gap = min((self._gap(answer, row) for row in _rows(answer)), default=1.0)
            num_ties += 0 < gap <= _TIE
            if gap > _TIE:
                wrong.append(
                    f"prompt {answer.prompt} through {answer.choice.row()!r} (versions "
                    f"{sorted(answer.versions, key=str)}) was answered {list(answer.token_ids)}; logits are apart by "
                    f"{gap:.1e} of their range"
                )
        return num_ties, wrong

    def _compute(self, wanted: set[tuple[int, AdapterSpec]]) -> None:
        for number, prompt in enumerate(self._prompts):
            rows = sorted((row for asked, row in wanted if asked == number), key=str)
            for start in range(0, len(rows), _ROWS):
                part = rows[start : start + _ROWS]
                ids = torch.tensor([list(prompt)] * len(part), device=self._model.base.device)
                lengths: dict[str, Any] = {"min_new_tokens": self._num_tokens, "max_new_tokens": self._num_tokens}
                out = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    adapters=part,
                    do_sample=False,
                    packed=False,  # the engine is compared with another way of computing
                    **lengths,
                )
                for row, tokens in zip(part, out[:, len(prompt) :].tolist(), strict=True):
                    self._answers[number, row] = tuple(tokens)

    def _gap(self, answer: Answered, row: AdapterSpec) -> float:
        """How far apart the two tokens' logits are where the answer leaves the reference; 0 if it doesn't."""
        expected = self._answers[answer.prompt, row]
        pairs = zip(answer.token_ids, expected, strict=False)
        place = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if place is None:
            return 0.0
        ids = torch.tensor([[*self._prompts[answer.prompt], *expected[:place]]], device=self._model.base.device)
        with torch.no_grad():
            logits = self._model(ids, adapters=[row]).logits[0, -1].float()
        gap = (logits[expected[place]] - logits[answer.token_ids[place]]).abs() / (logits.max() - logits.min())
        return float(gap)


def _rows(answer: Answered) -> list[AdapterSpec]:
    if answer.choice.changing is None:
        return [answer.choice.row()]
    return [answer.choice.with_version(version) for version in answer.versions if version is not None]
