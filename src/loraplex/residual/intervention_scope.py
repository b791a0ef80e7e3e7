"""The interventions of one call of the base model, through transformers' own forward and generate."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.errors import BatchError, RequestError
from loraplex.layers.rows.passes import cached_length
from loraplex.residual.calls import generation_config_of
from loraplex.residual.intervention_pass import InterventionGroup, InterventionPass
from loraplex.residual.operations import ChainOperations, SiteKey
from loraplex.residual.positions import segments
from loraplex.residual.reft import Site
from loraplex.residual.rows import ChainLink


@dataclass(kw_only=True)
class InterventionScope:
    """What the rows of a call go through; of one thread."""

    rows: Sequence[ChainOperations | None]
    mask: Tensor | None  # [rows, columns]  bool: which tokens aren't padding, as far as that is known
    num_prompt: Sequence[int]  # by row, padding not counted
    fed_before: int = 0  # columns that the cache held when the scope began
    cached: bool = True  # whether a pass goes on from those before it; else each has all tokens
    _fed: dict[SiteKey, int] = field(default_factory=dict)
    _passes: dict[tuple[int, ...], InterventionPass] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._depends_on_prompt = any(row is not None and row.depends_on_prompt for row in self.rows)

    def at_site(self, site: Site, number: int, hidden: Tensor) -> Tensor | None:
        """As in `Interventions`."""
        num_sequences, num_tokens = hidden.shape[:2]
        first = self._feed((site, number), num_tokens) if self._depends_on_prompt else 0
        made = self._pass((first, num_tokens, num_sequences), hidden.device)
        return made.at_site(site, number, hidden)

    def gate_input(self, path: str, x: Tensor) -> Tensor | None:
        """As in `Interventions`."""
        return self._gate_pass(x).gate_input(path, x)

    def gate_output(self, path: str, y: Tensor) -> Tensor | None:
        """As in `Interventions`."""
        return self._gate_pass(y).gate_output(path, y)

    def _feed(self, key: SiteKey, num_tokens: int) -> int:
        """The column of a pass's first token. Raises RequestError for a block that saw fewer than one before it."""
        before = self._fed.get(key, self.fed_before) if self.cached else self.fed_before
        self._fed[key] = before + num_tokens
        if self._fed[key] != max(self._fed.values()):
            raise RequestError(
                f"block {key[1]} was given {self._fed[key]} of {max(self._fed.values())} tokens, because the logits of "
                "some only are wanted; residuals on chosen tokens need all of them. Call the base model without "
                "logits_to_keep."
            )
        return before

    def _pass(self, shape: tuple[int, int, int], device: torch.device) -> InterventionPass:
        if shape not in self._passes:
            self._passes = {shape: InterventionPass(self._groups(*shape, device))}
        return self._passes[shape]

    def _gate_pass(self, states: Tensor) -> InterventionPass:
        """Gates act on all tokens, which come row after row, flattened or not."""
        num_tokens = states.numel() // states.shape[-1]
        share, rest = divmod(num_tokens, len(self.rows))
        if rest:
            raise BatchError(f"a gated module got {num_tokens} tokens for {len(self.rows)} rows.")
        key = (num_tokens,)
        if key not in self._passes:
            groups = [
                InterventionGroup(row, frozenset(), torch.arange(r * share, (r + 1) * share, device=states.device))
                for r, row in enumerate(self.rows)
                if row is not None and row.has_gates
            ]
            self._passes[key] = InterventionPass(groups)
        return self._passes[key]

    def _groups(self, first: int, num_tokens: int, num_sequences: int, device: torch.device) -> list[InterventionGroup]:
        copies, rest = divmod(num_sequences, len(self.rows))
        if rest:
            raise BatchError(
                f"a block got {num_sequences} sequences for {len(self.rows)} rows. The batch must keep its rows in "
                "order, each repeated equally often (as beam search and num_return_sequences do)."
            )
        groups = []
        for r, operations in enumerate(self.rows):
            if operations is None or not operations.positions:
                continue
            start, columns = self._columns(r, first, num_tokens)
            for segment in segments(operations.positions, start, start + len(columns), self.num_prompt[r]):
                own = columns[segment.start - start : segment.stop - start]
                tokens = [s * num_tokens + own for s in range(r * copies, (r + 1) * copies)]
                groups.append(InterventionGroup(operations, segment.active, torch.cat(tokens).to(device)))
        return groups

    def _columns(self, row: int, first: int, num_tokens: int) -> tuple[int, Tensor]:
        """How many tokens stand before a pass's in the row, and the columns of its own that aren't padding."""
        if self.mask is None or not self._depends_on_prompt:
            return first, torch.arange(num_tokens)
        known = self.mask.shape[1]
        shown = self.mask[row, first : first + num_tokens]
        if len(shown) < num_tokens:  # generated since
            shown = torch.cat([shown, shown.new_ones(num_tokens - len(shown))])
        before = int(self.mask[row, :first].sum()) + max(0, first - known)
        return before, shown.nonzero().squeeze(1)


def intervention_scope(
    chains: Sequence[tuple[ChainLink, ...]],
    num_tokens: int,  # of the call
    attention_mask: Tensor | None,
    inputs: dict[str, Any],
    base: PreTrainedModel,
    *,
    generates: bool,
    prompt_lengths: Sequence[int] | None,
) -> InterventionScope | None:
    """The scope of a call; None if no row has interventions. Raises RequestError or BatchError."""
    if not any(chains):
        return None
    rows = [ChainOperations(chain) if chain else None for chain in chains]
    cache = inputs.get("past_key_values")
    fed_before = 0 if cache is None else cached_length(cache) or 0
    mask = None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        mask = (attention_mask != 0).cpu()
    cached = True
    if any(row is not None and row.depends_on_prompt for row in rows):
        num_prompt = _num_prompt(len(rows), num_tokens, mask, prompt_lengths, fed_before, generates=generates)
        if generates:
            cached = _caches(base, inputs)
    else:
        num_prompt = [0] * len(rows)
    return InterventionScope(rows=rows, mask=mask, num_prompt=num_prompt, fed_before=fed_before, cached=cached)


def _num_prompt(
    num_rows: int,
    num_tokens: int,
    mask: Tensor | None,
    given: Sequence[int] | None,
    fed_before: int,
    *,
    generates: bool,
) -> list[int]:
    """By row, how many tokens its prompt has."""
    if given is not None:
        lengths = list(given)
        if len(lengths) != num_rows or not all(isinstance(length, int) and length >= 0 for length in lengths):
            raise BatchError(f"prompt_lengths is {lengths}; give a whole number for each of the {num_rows} rows.")
        return lengths
    if fed_before and not generates:
        raise RequestError(
            "a row has a residual on chosen tokens (of the prompt, or generated), and a cache is continued, which "
            "doesn't tell where the prompt ends. Pass attention=AttentionRequest(prompt_lengths=[...])."
        )
    return [num_tokens] * num_rows if mask is None else mask[:, :num_tokens].sum(dim=1).tolist()


def _caches(base: PreTrainedModel, generation: dict[str, Any]) -> bool:
    """Whether a generation's passes go on from one another. Raises RequestError where tokens are taken back."""
    config = generation_config_of(base, generation)
    if generation.get("assistant_model") is not None or config.prompt_lookup_num_tokens is not None:
        raise RequestError("assisted generation can't be used with residuals on chosen tokens. Leave it out.")
    return generation.get("past_key_values") is not None or config.use_cache is not False
