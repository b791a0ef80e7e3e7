"""What each attention layer does for the rows of a batch: kept from pass to pass, for each layout of sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.errors import AdapterError, BatchError
from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.cache import Key, ResidualStates
from loraplex.residual.capture import CaptureBuffer
from loraplex.residual.compute import Extend, FunctionTerm, LinkedTerm, ResidualTerm, VectorTerm, stack_linked
from loraplex.residual.modules import FunctionResidual, LinkedResidual, SteeringVector
from loraplex.residual.rows import ChainLink, RowAttention
from loraplex.residual.steering import KeyShare, Steering, key_shares, log_strengths

RouteSpan = list[tuple[int, ChainLink]]  # places among the rows concerned, in order


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one attention layer does for one layout of sequences."""

    layer: int
    index: Tensor | None  # [rows] the sequences concerned; None is all of them
    sequences: Tensor  # [rows] the same, always there
    links: Sequence[Sequence[ResidualTerm]]  # by place in the link
    captures: Sequence[tuple[int, CaptureBuffer]]  # place among the rows concerned, where to
    steered: Sequence[tuple[int, Sequence[Steering], int]]  # place, steerings, padding on the left

    def log_strength(self, num_heads: int, first_key: int, num_keys: int) -> Tensor | None:
        """What steering adds to the logits [rows, heads, keys] of the keys from one on; None if no row is steered."""
        if not self.steered:
            return None
        num_rows, device = self.sequences.numel(), self.sequences.device
        return log_strengths(self.steered, num_rows, num_heads, first_key, num_keys, device)

    def shares(self, first_key: int, num_keys: int) -> list[KeyShare]:
        """The shares that keys get of the attention, of the keys from one on."""
        return key_shares(self.steered, first_key, num_keys, self.sequences.device)

    @property
    def steered_places(self) -> Tensor:  # [rows]  among those concerned
        return torch.tensor([place for place, _, _ in self.steered], device=self.sequences.device)

    def capture(self, weights: AttentionWeights) -> None:
        """Keep what rows capture of the layer's weights."""
        for place, buffer in self.captures:
            buffer.keep(self.layer, weights, place)

    def residual(
        self,
        x: Tensor,  # [sequences, tokens, hidden]  the attention block's normed input
        weights: AttentionWeights,
        states: ResidualStates | None,
    ) -> Tensor:  # [rows, tokens, hidden]
        """The sum of each row's residuals: the j-th of a link reads x plus the residuals of those before it."""
        chosen = x if self.index is None else x[self.index]
        chosen = chosen.to(torch.promote_types(x.dtype, torch.float32))
        total: Tensor | None = None
        for position, terms in enumerate(self.links):
            read = chosen if total is None else chosen + total
            added = None if len(terms) == 1 and terms[0].index is None else torch.zeros_like(read)
            for term in terms:
                extend = self._extender(term, (self.layer, position), weights, states)
                residual = term.run(read if term.index is None else read[term.index], weights, extend)
                added = residual if added is None else added.index_add(0, self._places(term), residual)
            assert added is not None, "a place in the links has at least one residual"
            total = added if total is None else total + added
        assert total is not None, "a plan without links has no residual"
        for place, buffer in self.captures:
            buffer.keep_norms(self.layer, total[place].norm(dim=-1), weights.first_query)
        return total

    def _places(self, term: ResidualTerm) -> Tensor:
        if term.index is not None:
            return term.index
        return torch.arange(self.sequences.numel(), device=self.sequences.device)

    def _extender(
        self, term: ResidualTerm, key: Key, weights: AttentionWeights, states: ResidualStates | None
    ) -> Extend:
        def extend(u: Tensor) -> Tensor:  # [rows, tokens, rank] -> [rows, keys, rank]
            if states is not None:
                u = states.extend(key, self.sequences if term.index is None else self.sequences[term.index], u)
            missing = weights.num_keys - u.shape[1]
            if missing > 0:  # keys on the left that the mask hides from these rows: another's prefix, an empty column
                return torch.nn.functional.pad(u, (0, 0, missing, 0))
            return u[:, -missing:] if missing < 0 else u  # a sliding window's cache forgets the earliest keys

        return extend


class RowPlans:
    """What each layer does for some rows."""

    def __init__(
        self,
        rows: Sequence[RowAttention],
        *,
        paddings: Sequence[int] | None = None,  # of each row, on the left
        buffers: Mapping[int, CaptureBuffer] | None = None,  # by row that captures
        failures: dict[int, AdapterError] | None = None,  # by row: recorded there, and the row goes on; None raises
    ) -> None:
        self.rows = tuple(rows)
        self.paddings = [0] * len(self.rows) if paddings is None else paddings
        self.buffers = buffers or {}
        self.failures = failures
        self._copies: int | None = None  # sequences a row; the first pass tells, later ones may have others behind them
        self._plans: dict[tuple[int, int], LayerPlan | None] = {}
        self._ranks: dict[Key, Tensor] = {}

    def plan(self, layer: int, like: Tensor, num_sequences: int) -> LayerPlan | None:
        """What to do at a layer with states on the device of `like`, in its precision; None is nothing.

        The sequences of a row stand together.
        """
        key = (layer, num_sequences)
        if key not in self._plans:
            dtype = torch.promote_types(like.dtype, torch.float32)
            planner = _LayerPlanner(plans=self, layer=layer, dtype=dtype, device=like.device)
            self._plans[key] = planner.build(self._sequences_a_row(num_sequences), num_sequences)
        return self._plans[key]

    def concerns(self, layer: int) -> bool:
        """Whether some row asks for anything at a layer."""
        return any(
            row.chain_at(layer)
            or row.steering_at(layer)
            or (number in self.buffers and layer in self.buffers[number].layers)
            for number, row in enumerate(self.rows)
        )

    def ranks(self, key: Key, device: torch.device) -> Tensor:  # [rows]
        """The rank of each row's residual at a layer and place in the link; 0 where there is none or it has no rank."""
        if key not in self._ranks:
            self._ranks[key] = torch.tensor([row.rank(*key) for row in self.rows], device=device)
        return self._ranks[key]

    def _sequences_a_row(self, num_sequences: int) -> int:
        num_rows = len(self.rows)
        if self._copies is not None and num_sequences >= num_rows * self._copies:
            return self._copies
        if num_sequences % num_rows != 0:
            raise BatchError(
                f"an attention layer got {num_sequences} sequences for {num_rows} rows. The batch must keep its rows "
                "in order, each repeated equally often (as beam search and num_return_sequences do)."
            )
        self._copies = num_sequences // num_rows
        return self._copies


@dataclass(frozen=True, kw_only=True)
class _LayerPlanner:
    """Builds the plans of one layer from what the rows ask for."""

    plans: RowPlans
    layer: int
    dtype: torch.dtype  # of computing
    device: torch.device

    def build(self, copies: int, num_sequences: int) -> LayerPlan | None:
        asked = self.plans.rows
        concerned = [row for row in range(len(asked)) if self._concerns(row)]
        if not concerned:
            return None
        sequences = [row * copies + copy for row in concerned for copy in range(copies)]
        rows = [row for row in concerned for _ in range(copies)]
        index = torch.tensor(sequences, device=self.device)
        chains = [asked[row].chain_at(self.layer) for row in rows]
        steered = [
            (place, asked[row].steering_at(self.layer), self.plans.paddings[row]) for place, row in enumerate(rows)
        ]
        return LayerPlan(
            layer=self.layer,
            index=None if len(sequences) == num_sequences else index,
            sequences=index,
            links=[self._terms(rows, chains, position) for position in range(max(map(len, chains)))],
            captures=[(place, self.plans.buffers[row]) for place, row in enumerate(rows) if self._captures(row)],
            steered=[entry for entry in steered if entry[1]],
        )

    def _concerns(self, row: int) -> bool:
        asked = self.plans.rows[row]
        return bool(asked.chain_at(self.layer)) or self._captures(row) or bool(asked.steering_at(self.layer))

    def _captures(self, row: int) -> bool:
        return row in self.plans.buffers and self.layer in self.plans.buffers[row].layers

    def _terms(self, rows: list[int], chains: list[list[ChainLink]], position: int) -> list[ResidualTerm]:
        """The residuals at one place of the links: all trained ones together, all constant ones, each function."""
        here = [(place, chain[position]) for place, chain in enumerate(chains) if len(chain) > position]
        linked = [(place, link) for place, link in here if isinstance(link.residual, LinkedResidual)]
        constant = [(place, link) for place, link in here if isinstance(link.residual, SteeringVector)]
        terms: list[ResidualTerm] = []
        if linked:
            terms.append(self._linked_term(linked, len(rows)))
        if constant:
            terms.append(self._vector_term(constant, len(rows)))
        for place, link in here:
            if isinstance(link.residual, FunctionResidual):
                terms.append(self._function_term(place, rows[place], link, link.residual))
        return terms

    def _linked_term(self, linked: RouteSpan, num_rows: int) -> LinkedTerm:
        weights, scales = [], []
        for _, link in linked:
            assert isinstance(link.residual, LinkedResidual), "chosen by its kind"
            weights.append(link.residual.layers[self.layer].to(self.device))
            scales.append(link.weight * link.residual.config.scaling)
        return stack_linked(weights, scales, self._index(linked, num_rows), self.dtype)

    def _vector_term(self, constant: RouteSpan, num_rows: int) -> VectorTerm:
        vectors = []
        for _, link in constant:
            assert isinstance(link.residual, SteeringVector), "chosen by its kind"
            vectors.append(link.residual.vectors[self.layer].to(self.device, self.dtype) * link.weight)
        return VectorTerm(index=self._index(constant, num_rows), vectors=torch.stack(vectors).unsqueeze(1))

    def _function_term(self, place: int, row: int, link: ChainLink, residual: FunctionResidual) -> FunctionTerm:
        return FunctionTerm(
            index=torch.tensor([place], device=self.device),
            residual=residual,
            name=link.name,
            layer=self.layer,
            row=row,
            weight=link.weight,
            num_padding=self.plans.paddings[row],
            failures=self.plans.failures,
        )

    def _index(self, chosen: RouteSpan, num_rows: int) -> Tensor | None:
        if len(chosen) == num_rows:
            return None
        return torch.tensor([place for place, _ in chosen], device=self.device)
