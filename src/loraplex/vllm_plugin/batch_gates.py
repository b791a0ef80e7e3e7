"""Which tokens of the batch that runs next go through mixtures, and whether their gates are there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.errors import MixtureError
from loraplex.vllm_plugin.gate_buffers import GateBuffers
from loraplex.vllm_plugin.mixture_use import SlotMixture


@dataclass(frozen=True, kw_only=True)
class TokenGroup:
    """The tokens of one slot, and the mixtures that they go through."""

    tokens: Tensor  # [n] int64
    uses: tuple[SlotMixture, ...]


class BatchGates:
    """Follows vLLM's mapping from tokens to slots: which gates must a scaling pass give before they run?"""

    def __init__(self, buffers: GateBuffers) -> None:
        self.buffers = buffers
        self._uses: dict[int, tuple[SlotMixture, ...]] = {}  # by slot
        self._slots: Sequence[int] = ()
        self.groups: tuple[TokenGroup, ...] = ()
        self.is_waiting = False  # the batch has mixtures, and the pass that gives their gates hasn't run

    def set_slot(self, slot: int, uses: tuple[SlotMixture, ...], columns: Tensor | None) -> None:
        """What a slot holds from now on."""
        self.buffers.set_columns(slot, columns)
        self._uses[slot] = uses
        self._slots = ()  # the next mapping is another one, even for the same tokens

    def set_tokens(self, slots: Sequence[int]) -> None:  # of the tokens; -1 for none
        """The batch that runs next."""
        self.check_gated()
        if slots != self._slots:
            self._slots = slots
            self.buffers.set_slots(slots)
            self.groups = self._group(slots)
        self.is_waiting = bool(self.groups)

    def forget_batch(self) -> None:
        """Nothing runs next: what vLLM warms up with has no gates to wait for."""
        self._slots, self.groups, self.is_waiting = (), (), False

    @property
    def pass_is_base(self) -> bool:
        """Whether the scaling pass of this batch needs no expert."""
        return all(use.pass_is_base for group in self.groups for use in group.uses)

    def begin_scaling_pass(self) -> None:
        """Set the gates of the scaling pass."""
        for group in self.groups:
            for use in group.uses:
                use.write_pass_gates(self.buffers, group.tokens)
        self.buffers.is_on = not self.pass_is_base

    def begin_main_pass(self, hidden: Tensor) -> None:  # [tokens, hidden]
        """Set the gates that the scaling pass's last hidden states predict."""
        for group in self.groups:
            states = hidden[group.tokens]
            for use in group.uses:
                use.write_gates(self.buffers, group.tokens, states)
        self.buffers.is_on = True
        self.is_waiting = False

    def mixtures_of(self, token: int) -> tuple[SlotMixture, ...]:
        """The mixtures that a token of this batch goes through."""
        return self._uses.get(self._slots[token], ())

    def end_main_pass(self) -> None:
        self.buffers.is_on = False

    def check_gated(self) -> None:
        """Raise MixtureError if a batch with mixtures has run without its gates, as a full CUDA graph would."""
        if self.is_waiting:
            self.is_waiting = False
            raise MixtureError(
                "a batch with mixtures ran without its scaling pass: vLLM ran the model without calling it (a CUDA "
                "graph of the whole model?). Its tokens are not used. Start vLLM with cudagraph_mode=PIECEWISE, and "
                "report it."
            )

    def _group(self, slots: Sequence[int]) -> tuple[TokenGroup, ...]:
        device = self.buffers.slots.device
        tokens: dict[int, list[int]] = {}
        for token, slot in enumerate(slots):
            if self._uses.get(slot):
                tokens.setdefault(slot, []).append(token)
        return tuple(
            TokenGroup(tokens=torch.tensor(found).to(device, non_blocking=True), uses=self._uses[slot])
            for slot, found in tokens.items()
        )
