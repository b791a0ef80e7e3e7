"""Residuals of the batch that runs next: which of its tokens go through what."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.residual.intervention_pass import InterventionGroup, InterventionPass
from loraplex.residual.modules import LinkedResidual
from loraplex.residual.operations import ChainOperations, interventions_of
from loraplex.residual.positions import segments
from loraplex.residual.rows import ChainLink
from loraplex.vllm_plugin.batch_rows import BatchRow
from loraplex.vllm_plugin.linked_pass import LinkedChain, LinkedPass, LinkedRoute, token_index


class SlotResiduals:
    """What a slot's tokens go through."""

    def __init__(self, chain: Sequence[ChainLink], heads: slice) -> None:
        """`heads` are those of this worker."""
        linked = any(isinstance(link.residual, LinkedResidual) for link in chain)
        interventions = interventions_of(chain, with_vectors=True)
        self.operations = ChainOperations(interventions) if interventions else None
        kept = {id(link) for link in interventions}
        others = [link for link in chain if id(link) not in kept]
        self.linked = LinkedChain(others, heads) if linked else None

    @property
    def depends_on_prompt(self) -> bool:
        return self.operations is not None and self.operations.depends_on_prompt


class BatchResiduals:
    """Follows vLLM's mapping from tokens to slots.

    Between `begin_pass` and `end_pass`, `interventions` and `linked` are what the batch's tokens go through; elsewhere,
    in scaling passes for example, they are None.
    """

    def __init__(self, heads: slice) -> None:
        """`heads` are those of this worker, among the model's."""
        self._heads = heads
        self._slots: dict[int, SlotResiduals] = {}
        self._batch: Sequence[int] = ()
        self._in_batch: tuple[int, ...] = ()  # the slots with residuals among those of the batch
        self._made: tuple[InterventionPass | None, LinkedPass | None] | None = None  # of this batch
        self.interventions: InterventionPass | None = None
        self.linked: LinkedPass | None = None

    def set_slot(self, slot: int, chain: Sequence[ChainLink]) -> None:
        """What a slot holds from now on."""
        self._slots.pop(slot, None)
        self.forget_batch()  # the next batch is another one, even with the same slots
        if chain:
            self._slots[slot] = SlotResiduals(chain, self._heads)

    def set_tokens(self, slots: Sequence[int]) -> None:  # of the tokens; -1 for none
        """The batch that runs next."""
        if slots != self._batch:
            self._batch, self._made = slots, None
            self._in_batch = tuple(sorted(self._slots.keys() & set(slots)))

    def forget_batch(self) -> None:
        """Nothing runs next."""
        self._batch, self._in_batch, self._made = (), (), None

    @property
    def is_waiting(self) -> bool:
        """Whether some token of the batch goes through residuals."""
        return bool(self._in_batch)

    @property
    def depends_on_prompt(self) -> bool:
        """Whether some token of the batch goes through a residual on chosen tokens."""
        return any(self._slots[slot].depends_on_prompt for slot in self._in_batch)

    def begin_pass(self, rows: Sequence[BatchRow]) -> None:
        """The batch runs now; `rows` are its requests, which residuals on chosen tokens ask for."""
        if self._made is None or self.depends_on_prompt:
            self._made = self._interventions(rows), self._linked()
        self.interventions, self.linked = self._made

    def end_pass(self) -> None:
        self.interventions = self.linked = None

    def _tokens(self, slot: int) -> list[int]:
        return [token for token, own in enumerate(self._batch) if own == slot]

    def _interventions(self, rows: Sequence[BatchRow]) -> InterventionPass | None:
        groups: list[InterventionGroup] = []
        for slot in self._in_batch:
            operations = self._slots[slot].operations
            if operations is None or not operations.positions:
                continue
            if operations.depends_on_prompt:
                groups += [group for row in self._rows_of(slot, rows) for group in _groups(operations, row)]
            else:
                tokens = torch.tensor(self._tokens(slot))
                groups.append(InterventionGroup(operations, frozenset(operations.positions), tokens))
        return InterventionPass(groups) if groups else None

    def _rows_of(self, slot: int, rows: Sequence[BatchRow]) -> list[BatchRow]:
        return [row for row in rows if row.tokens.start < row.tokens.stop and self._batch[row.tokens.start] == slot]

    def _linked(self) -> LinkedPass | None:
        routes = [
            LinkedRoute(linked, token_index(self._tokens(slot)))
            for slot in self._in_batch
            if (linked := self._slots[slot].linked) is not None
        ]
        return LinkedPass(routes) if routes else None


def _groups(operations: ChainOperations, row: BatchRow) -> list[InterventionGroup]:
    first, start = row.tokens.start, row.first_position
    stop = start + row.tokens.stop - first
    return [
        InterventionGroup(operations, one.active, _range(one.start - start + first, one.stop - start + first))
        for one in segments(operations.positions, start, stop, row.num_prompt)
    ]


def _range(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop)
