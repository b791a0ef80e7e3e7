"""The interventions of one pass of the base model: which tokens go through what, at every site."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from loraplex.residual.operations import Active, ChainOperations, Operation, SiteKey
from loraplex.residual.reft import SITES, Site
from loraplex.residual.scope import use_attention


@dataclass(frozen=True, eq=False)
class InterventionGroup:
    """Tokens of a pass that go through the same operations: of one row, with the same positions active."""

    operations: ChainOperations
    active: Active
    tokens: Tensor  # [n]  among all tokens of the pass


@dataclass(frozen=True, eq=False)
class _SitePlan:
    """What happens at one site."""

    index: Tensor | None  # [n]  the tokens that vectors are added to
    vectors: Tensor  # [groups, hidden]  float32
    which: Tensor  # [n]  each token's
    others: Sequence[tuple[Sequence[Operation], Tensor]]  # and the tokens that go through other operations


class Interventions(Protocol):
    """What hooks see of the interventions that are current."""

    def at_site(self, site: Site, number: int, hidden: Tensor) -> Tensor | None:
        """Hidden states [sequences, tokens, hidden] as they go on; None: unchanged."""
        ...

    def gate_input(self, path: str, x: Tensor) -> Tensor | None:
        """What a linear module reads [.., in]; None: unchanged."""
        ...

    def gate_output(self, path: str, y: Tensor) -> Tensor | None:
        """What a linear module makes [.., out]; None: unchanged."""
        ...


class InterventionPass:
    """The groups of a pass. Tokens are counted through all sequences, one after the other."""

    def __init__(self, groups: Sequence[InterventionGroup]) -> None:
        self.groups = tuple(groups)
        self.done: set[int] = set()  # blocks that a compiled call runs with the vectors there
        self._plans: dict[SiteKey, _SitePlan | None] = {}
        self._addresses: dict[tuple[tuple[int, ...], int], tuple[Tensor, Tensor]] = {}
        self._gates: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor] | None] = {}

    @cached_property
    def has_gates(self) -> bool:
        return any(group.operations.has_gates for group in self.groups)

    def at_site(self, site: Site, number: int, hidden: Tensor) -> Tensor | None:
        """As in `Interventions`."""
        key = (site, number)
        if key not in self._plans:
            self._plans[key] = self._plan(key)
        plan = self._plans[key]
        is_done = number in self.done
        if plan is None or (is_done and not plan.others):
            return None
        return _run(plan, hidden, adds=not is_done)

    def acts_inside(self, block: int) -> bool:
        """Whether something else than adding vectors is done inside of a block."""
        return self.has_gates or any(self._changes((site, block)) for site in SITES if site != "block")

    def acts_behind(self, block: int) -> bool:
        """Whether something else than adding vectors is done to what a block puts out."""
        return self._changes(("block", block))

    def _changes(self, key: SiteKey) -> bool:
        return any(
            operation.positions in group.active
            for group in self.groups
            if not group.operations.adds_only(group.active)
            for operation in group.operations.sites.get(key, ())
        )

    def gate_input(self, path: str, x: Tensor) -> Tensor | None:
        """As in `Interventions`."""
        return self._gated("inputs", path, x)

    def gate_output(self, path: str, y: Tensor) -> Tensor | None:
        """As in `Interventions`."""
        return self._gated("outputs", path, y)

    def addresses(self, blocks: tuple[int, ...], num_tokens: int) -> tuple[Tensor, Tensor]:
        """For a compiled call: where the sums of each group's vectors lie, of groups that only add such.

        int64 [groups, blocks, 3] addresses at the sites in the order of SITES, 0 for none; and each token's group
        [tokens], -1 for none.
        """
        key = (blocks, num_tokens)
        if key not in self._addresses:
            found = [
                group.operations.vectors(group.active) if group.operations.adds_only(group.active) else {}
                for group in self.groups
            ]
            table = [
                [[_address(vectors.get((site, block))) for site in SITES] for block in blocks] for vectors in found
            ]
            of_tokens = torch.full((num_tokens,), -1, dtype=torch.int64)
            for number, group in enumerate(self.groups):
                of_tokens[group.tokens] = number
            self._addresses[key] = (torch.tensor(table, dtype=torch.int64), of_tokens)
        return self._addresses[key]

    def _plan(self, key: SiteKey) -> _SitePlan | None:
        index: list[Tensor] = []
        which: list[Tensor] = []
        vectors: list[Tensor] = []
        others: list[tuple[Sequence[Operation], Tensor]] = []
        for group in self.groups:
            if group.operations.adds_only(group.active):
                vector = group.operations.vectors(group.active).get(key)
                if vector is not None:
                    which.append(torch.full_like(group.tokens, len(vectors)))
                    index.append(group.tokens)
                    vectors.append(vector)
                continue
            operations = [o for o in group.operations.sites.get(key, ()) if o.positions in group.active]
            if operations:
                others.append((operations, group.tokens))
        if not vectors and not others:
            return None
        if not vectors:
            return _SitePlan(None, torch.empty(0), torch.empty(0), others)
        return _SitePlan(torch.cat(index), torch.stack(vectors), torch.cat(which), others)

    def _gated(self, kind: str, path: str, states: Tensor) -> Tensor | None:
        key = (kind, path)
        if key not in self._gates:
            self._gates[key] = self._gate_plan(kind, path)
        plan = self._gates[key]
        if plan is None:
            return None
        index, gates, which = (tensor.to(states.device) for tensor in plan)
        flat = states.reshape(-1, states.shape[-1])
        chosen = flat[index]
        scaled = chosen.to(torch.promote_types(chosen.dtype, torch.float32)) * gates[which]
        return flat.index_copy(0, index, scaled.to(flat.dtype)).view(states.shape)

    def _gate_plan(self, kind: str, path: str) -> tuple[Tensor, Tensor, Tensor] | None:
        found = [(group.tokens, getattr(group.operations, kind).get(path)) for group in self.groups]
        found = [(tokens, gate) for tokens, gate in found if gate is not None]
        if not found:
            return None
        which = [torch.full_like(tokens, number) for number, (tokens, _) in enumerate(found)]
        return torch.cat([tokens for tokens, _ in found]), torch.stack([gate for _, gate in found]), torch.cat(which)


def _address(vector: Tensor | None) -> int:
    if vector is None:
        return 0
    assert vector.is_contiguous(), "sums of vectors lie as they were made"
    assert vector.dtype == torch.float32, "vectors are summed in float32"
    return vector.data_ptr()


def _run(plan: _SitePlan, hidden: Tensor, *, adds: bool) -> Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    dtype = torch.promote_types(flat.dtype, torch.float32)
    if adds and plan.index is not None:
        index, vectors, which = (tensor.to(flat.device) for tensor in (plan.index, plan.vectors, plan.which))
        added = flat[index].to(dtype) + vectors[which]
        flat = flat.index_copy(0, index, added.to(flat.dtype))
    for operations, own in plan.others:
        tokens = own.to(flat.device)
        states = flat[tokens].to(dtype)
        for operation in operations:
            states = operation.run(states)
        flat = flat.index_copy(0, tokens, states.to(flat.dtype))
    return flat.view(hidden.shape)


_current: ContextVar[Interventions | None] = ContextVar("loraplex_current_interventions", default=None)


def current_interventions() -> Interventions | None:
    """The interventions of the call that runs now; None outside of one."""
    return _current.get()


@contextmanager
def without_residuals() -> Iterator[None]:
    """Let the base model run inside the block without the residuals, captures and steering of the call."""
    with use_attention(None), use_interventions(None):
        yield


@contextmanager
def use_interventions(interventions: Interventions | None) -> Iterator[None]:
    """Make interventions current inside the block; None lets the base model run as it does by itself."""
    token = _current.set(interventions)
    try:
        yield
    finally:
        _current.reset(token)
