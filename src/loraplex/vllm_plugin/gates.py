"""Gates of mixtures inside vLLM: the operator, its buffers, the mixtures of a slot, and the batch that runs next."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.errors import MixtureError
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.head import ScalingHead
from loraplex.xlora.mixture import kept_scalings

_LIBRARY = torch.library.Library("loraplex", "FRAGMENT")
_SCHEMA = "gate_ranks_(Tensor(a!) x, Tensor gates, Tensor columns, Tensor slots, int first_module) -> ()"


def gate_ranks_(
    x: Tensor,  # [slices, tokens, rank]  changed in place
    gates: Tensor,  # [modules, most tokens, gate columns]
    columns: Tensor,  # [slots + 1, rank]  int64: the gate column of each rank column
    slots: Tensor,  # [most tokens]  int64: the slot of each token; the last row of `columns` for none
    first_module: int,  # the module of x[0]; the slices follow
) -> None:
    """Multiply x[s, t, r] by gates[first_module + s, t, columns[slots[t], r]].

    All tensors but x are static buffers: a compiled or captured graph reads what is in them when it runs. There is no
    branch on their contents, so a graph that was captured without mixtures is right with them.
    """
    num_slices, num_tokens, _ = x.shape
    chosen = columns[slots[:num_tokens]].expand(num_slices, -1, -1)  # [slices, tokens, rank]
    x.mul_(gates[first_module : first_module + num_slices, :num_tokens].gather(2, chosen))


def _fake(x: Tensor, gates: Tensor, columns: Tensor, slots: Tensor, first_module: int) -> None:
    return None


_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("gate_ranks_", gate_ranks_, "CompositeExplicitAutograd")
torch.library.register_fake("loraplex::gate_ranks_", _fake, lib=_LIBRARY)


PLAIN = 0  # the gate column of everything that no scaling head gates


class GateBuffers:
    """Gates [modules, tokens, 1 + experts]. Column PLAIN is 1, but 0 in scaling passes of tokens with a mixture."""

    def __init__(
        self,
        *,
        num_modules: int,
        max_tokens: int,
        max_experts: int,
        num_slots: int,
        max_rank: int,
        device: torch.device,
    ) -> None:
        self.gates = torch.ones(num_modules, max_tokens, 1 + max_experts, dtype=torch.float32, device=device)
        self.columns = torch.zeros(num_slots + 1, max_rank, dtype=torch.int64, device=device)
        self.slots = torch.full((max_tokens,), num_slots, dtype=torch.int64, device=device)
        self.no_slot = num_slots
        self._num_tokens = 0
        # On a GPU graphs are captured once and run for every batch: the operator must always be in them.
        self.is_always_on = device.type != "cpu"
        self.is_on = False  # elsewhere: whether any token of this pass has gates

    def set_columns(self, slot: int, columns: Tensor | None) -> None:  # [rank]
        """What a slot's rank columns are gated by; None: by nothing."""
        self.columns[slot] = PLAIN
        if columns is not None:
            self.columns[slot, : len(columns)] = columns.to(self.columns.device)

    def set_slots(self, slots: Sequence[int]) -> None:  # of the tokens; -1 for none
        """The slots of the tokens that run next; those behind them, which pad a graph, have none."""
        tokens = torch.tensor(slots, dtype=torch.int64)
        tokens[tokens < 0] = self.no_slot
        self.slots[len(slots) : max(len(slots), self._num_tokens)] = self.no_slot
        self.slots[: len(slots)].copy_(tokens, non_blocking=True)
        self._num_tokens = len(slots)

    def apply(self, x: Tensor | tuple[Tensor, ...], first_module: int) -> None:
        """Gate the values in rank space of a layer's slices, in place: [slices, tokens, rank], or one tensor each."""
        if not (self.is_always_on or self.is_on):
            return
        if isinstance(x, Tensor):
            torch.ops.loraplex.gate_ranks_(x, self.gates, self.columns, self.slots, first_module)
            return
        for i, part in enumerate(x):
            torch.ops.loraplex.gate_ranks_(part.unsqueeze(0), self.gates, self.columns, self.slots, first_module + i)


_TOKENS_AT_ONCE = 1024  # bounds the memory of a long prompt's scalings, [tokens, layers, experts]


@dataclass(frozen=True, kw_only=True)
class SlotMixture:
    """A mixture that a slot's tokens go through, alone or in a link."""

    name: str
    config: XLoraConfig
    weight: float  # of the mixture in its link; of no effect in the scaling pass
    head: ScalingHead
    layer_of_module: Tensor  # [modules]  int64: the LoRA layer whose scalings a module takes; 0 where none
    first_column: int  # of its gate columns, one an expert

    @property
    def num_experts(self) -> int:
        return self.head.num_experts

    @property
    def pass_is_base(self) -> bool:
        """Whether the scaling pass is the base model's own."""
        return self.config.pass_value(self.num_experts) == 0

    @property
    def gate_columns(self) -> slice:
        return slice(self.first_column, self.first_column + self.num_experts)

    def write_pass_gates(self, buffers: GateBuffers, tokens: Tensor) -> None:  # [n] int64
        """The gates of the scaling pass: scaling_pass_value through the same top-k; the link's other parts are off."""
        value = self.config.pass_value(self.num_experts)
        scalings = torch.full((1, self.num_experts), value, device=buffers.gates.device)
        buffers.gates[:, tokens, PLAIN] = 0
        kept = kept_scalings(scalings, self.config) * self.config.global_scaling_weight
        buffers.gates[:, tokens, self.gate_columns] = kept[0]

    def write_gates(self, buffers: GateBuffers, tokens: Tensor, hidden: Tensor) -> None:  # [n], [n, hidden]
        """The gates of the main pass, predicted from the scaling pass's hidden states."""
        buffers.gates[:, tokens, PLAIN] = 1
        for part, states in zip(tokens.split(_TOKENS_AT_ONCE), hidden.split(_TOKENS_AT_ONCE), strict=True):
            kept = kept_scalings(self.head(states), self.config)  # [n, layers, experts]
            gates = kept * (self.weight * self.config.global_scaling_weight)
            buffers.gates[:, part, self.gate_columns] = gates.transpose(0, 1)[self.layer_of_module]


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
