"""One decoding step of main pass and drafted scaling pass together.

The scaling pass at value 0 is the base model, so its logits are a guess of the next token for free. A step runs the
main pass of token t and the scaling pass of the guessed token t + 1 as rows of one batch. Where token t + 1 then turns
out to be another one, its scaling pass is run again before the next step. Scalings always come from the token that is
there: the result is that of two passes, for greedy search and for sampling alike.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraplex.xlora.two_pass.cache import PairedCache

if TYPE_CHECKING:
    from loraplex.xlora.two_pass.two_pass import TwoPass


@dataclass
class SpeculationCounts:
    """How many scaling passes ran for a guessed token, and how many guesses were right."""

    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """How many guesses to expect right of those to come: at first all, then what was seen."""
        return (self.accepted + 1) / (self.drafted + 1)

    def add(self, other: "SpeculationCounts") -> None:
        self.drafted += other.drafted
        self.accepted += other.accepted


class SpeculativeStep:
    """The state of one step. What the next one needs is carried by the cache, one entry a scaling sequence:

    `drafted` the token whose scaling pass has run, `hidden` [.., hidden] its result, `guess` the token after it.
    """

    def __init__(self, two_pass: "TwoPass", cache: PairedCache) -> None:
        self._two_pass = two_pass
        self._cache = cache

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Bring the scaling pass up to the step's tokens, set their gates, and widen the call by the drafted tokens."""
        ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs["position_ids"]
        if mask is None:  # nothing is padded
            mask = ids.new_ones(ids.shape[0], self._cache.main_length + 1)
        own = self._cache.scaling_sequences(ids.device)
        self._catch_up(ids[own], mask[own], positions[own])
        carried = self._cache.carried
        self._two_pass.set_gates(carried["hidden"].unsqueeze(1), copies=1)
        carried["drafted"] = carried["guess"]
        self._num_main = ids.shape[0]
        self._cache.show_both()
        self._two_pass.run_both()
        return inputs | {
            "input_ids": torch.cat([ids, carried["drafted"].unsqueeze(1)]),
            "position_ids": torch.cat([positions, positions[own] + 1]),
            "attention_mask": torch.cat(
                [torch.nn.functional.pad(mask, (1, 0)), torch.nn.functional.pad(mask[own], (0, 1), value=1)]
            ),
        }

    def after(self, output: Any) -> Any:
        """Take the drafted tokens' results out of the call's output."""
        hidden = self._two_pass.end_both()
        self._cache.carried["hidden"] = hidden[self._num_main :, -1]
        self._cache.carried["guess"] = self._guess_of(output.logits[self._num_main :, -1])
        self._cache.scaling_length += 1
        output.logits = output.logits[: self._num_main]
        return output

    @staticmethod
    def _guess_of(logits: Tensor) -> Tensor:  # [scaling sequences, vocab] -> [scaling sequences]
        return logits.argmax(dim=-1)

    def _catch_up(self, ids: Tensor, mask: Tensor, positions: Tensor) -> None:
        """Run the scaling pass of the tokens that were not drafted."""
        cache, carried = self._cache, self._cache.carried
        drafted = carried.get("drafted")
        wrong = torch.arange(len(ids), device=ids.device)
        if drafted is not None:
            wrong = wrong[drafted != ids[:, 0]]
            self._two_pass.counts.drafted += len(ids)
            self._two_pass.counts.accepted += len(ids) - len(wrong)
        if len(wrong) == 0:
            return
        cache.show_scaling(wrong, back=cache.scaling_length - cache.main_length)
        part = {"input_ids": ids[wrong], "attention_mask": mask[wrong], "position_ids": positions[wrong]}
        hidden = self._two_pass.run_scaling(part, cache, subset=True)[:, -1]
        cache.scaling_length = cache.main_length + 1
        if drafted is None:
            carried["hidden"], carried["guess"] = hidden, self._two_pass.guess(hidden)
        else:
            carried["hidden"] = carried["hidden"].index_copy(0, wrong, hidden)
            carried["guess"] = carried["guess"].index_copy(0, wrong, self._two_pass.guess(hidden))
