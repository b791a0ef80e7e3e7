"""One call of the base model: its rows' adapters, mixtures and residuals in force, and what it reports afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.layers.base.output_layer import choosing_tokens
from loraplex.layers.rows.images import use_image_rows
from loraplex.layers.rows.passes import cached_length
from loraplex.layers.rows.positions import use_row_positions
from loraplex.models.gate_report import collected_gates, in_link_order
from loraplex.models.registry import Registry
from loraplex.models.scope import RanMixtures, RowTokens, adapter_scope
from loraplex.models.text.end_tokens import generation_ends, stop_rows
from loraplex.models.text.row_vocabularies import RowVocabularies
from loraplex.residual.registry import AttentionRequest
from loraplex.residual.scope import AttentionScope
from loraplex.routing.adapter_spec import AdapterSpec, Link, parse_adapter_specs
from loraplex.xlora.scalings.report import collected_scalings
from loraplex.xlora.scalings.row_scalings import RowScalings
from loraplex.xlora.two_pass.generation import prepare_generation
from loraplex.xlora.two_pass.options import TwoPassOptions


@dataclass
class Ran:
    """What ran in one call, for its report."""

    row_ends: list[tuple[int, ...]]  # by row, the tokens after which what was generated is padding
    mixtures: RanMixtures = field(default_factory=RanMixtures)
    attention: AttentionScope | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One `forward` or `generate`. `inputs` is what the base model is given besides tokens and mask; it is changed."""

    base: PreTrainedModel
    registry: Registry
    input_ids: Tensor | None  # [rows, tokens]
    attention_mask: Tensor | None
    adapters: Sequence[AdapterSpec] | None
    inputs: dict[str, Any]
    options: TwoPassOptions
    attention: AttentionRequest | None
    generates: bool
    fast_decode: bool = False

    @contextmanager
    def running(self) -> Iterator[Ran]:
        """Run the base model's call inside. Raises what is wrong with the request before anything runs."""
        _ = self.row_tokens, self.vocabularies
        tokens, ends = self._tokens, self.row_ends
        links, chains = self.registry.linked.split(self.links)
        assert tokens is not None, "a call without tokens has an empty batch, which was refused"
        is_plain = not any(links) and not self.fast_decode
        scope = nullcontext(RanMixtures()) if is_plain else self._adapters(links)
        chooses = choosing_tokens() if self.generates else nullcontext()
        with scope as mixtures, chooses, use_row_positions(), use_image_rows(self.input_ids):
            two_pass = mixtures.two_pass
            if two_pass is not None and self.generates:
                prepare_generation(two_pass, self.base, self.inputs)
            with self.registry.linked.running(
                chains,
                self.attention,
                tokens.shape[1],
                self.attention_mask,
                self.inputs,
                generates=self.generates,
                new_cache=None if two_pass is None else two_pass.new_cache,
            ) as attention:
                yield Ran(row_ends=ends, mixtures=mixtures, attention=attention)

    def _adapters(self, links: Sequence[Any]) -> AbstractContextManager[RanMixtures]:
        return adapter_scope(
            self.base,
            self.registry.store,
            self.registry.mixtures,
            self.registry.bank,
            links,
            self.row_tokens,
            fast_decode=self.fast_decode,
            options=self.options,
        )

    @property
    def _tokens(self) -> Tensor | None:  # [rows, tokens] or [rows, tokens, hidden]
        return self.input_ids if self.input_ids is not None else self.inputs.get("inputs_embeds")

    @cached_property
    def links(self) -> list[Link]:
        """By row, its adapters. Raises BatchError or LinkSyntaxError."""
        return parse_adapter_specs(self.adapters, 0 if self._tokens is None else self._tokens.shape[0])

    @cached_property
    def vocabularies(self) -> RowVocabularies:
        """By row, how many tokens it has; `generate` is told, by its options, of those that it must not choose.

        Raises RequestError for a link of adapters with different tokens, and for tokens that a row doesn't have.
        """
        found = [self.registry.vocabulary(link) for link in self.links]
        if all(own is None for own in found):
            return RowVocabularies([], 0)
        num_base = self.registry.num_tokens
        made = RowVocabularies([num_base if own is None else own.num_tokens for own in found], num_base)
        made.check(self.input_ids, self.inputs)
        if self.generates and not made.is_plain:
            self.inputs["logits_processor"] = [*(self.inputs.get("logits_processor") or ()), made]
        return made

    def mask_logits(self, output: Any) -> None:
        """Let the logits of tokens that a row doesn't have be -inf."""
        logits = getattr(output, "logits", None)
        if not self.generates and not self.vocabularies.is_plain and isinstance(logits, Tensor):
            output.logits = self.vocabularies.mask(logits)

    @cached_property
    def row_ends(self) -> list[tuple[int, ...]]:
        """By row, the tokens after which what is generated is padding: also what ends its adapters' answers.

        `generate` is told, by its options, of those that it doesn't know. A call's own eos_token_id counts alone.
        """
        links = self.links
        if not self.generates:
            return [()] * len(links)
        known = generation_ends(self.base, self.inputs)
        if "eos_token_id" in self.inputs:
            return [known] * len(links)
        more = [tuple(end for end in ends if end not in known) for ends in self.registry.end_tokens(links)]
        if any(more):
            stop_rows(self.inputs, more, self.base)
        return [(*known, *ends) for ends in more]

    @cached_property
    def row_tokens(self) -> RowTokens:
        """The rows' tokens, those in the cache included; asked for before the base model runs, which changes it."""
        cache, ids = self.inputs.get("past_key_values"), self.input_ids
        if cache is None or self.generates or ids is None:  # `generate` is given all tokens beside a cache
            return RowTokens(new=ids)
        return RowTokens(new=ids, cached=self.registry.cached_ids.of(cache, len(ids)), num_cached=cached_length(cache))

    def note_cached(self, output: Any) -> None:
        """Remember which tokens the cache holds that `forward` returned."""
        cached_ids = self.registry.cached_ids
        if self.generates:
            cached_ids.forget(self.inputs.get("past_key_values"))
        elif self.input_ids is not None:
            cached_ids.note(getattr(output, "past_key_values", None), self.row_tokens.cached, self.input_ids)

    def report_attention(
        self, ran: Ran, sequences: Tensor | None, tokenizer: Callable[[], PreTrainedTokenizerBase | None]
    ) -> None:
        """Fill the attention request with what its rows captured."""
        if self.attention is not None:
            self.registry.linked.report(ran.attention, self.attention, sequences, tokenizer(), ran.row_ends)

    def scalings(self, ran: Ran, sequences: Tensor | None, *, wanted: bool) -> list[tuple[RowScalings, ...]]:
        """The rows' scalings; if only a log wants them, none rather than an error where they can't be told."""
        mask = self.attention_mask
        if mask is None and self.input_ids is not None:
            mask = torch.ones_like(self.input_ids)
        try:
            ran_mixtures = ran.mixtures
            found = collected_scalings(ran_mixtures.two_pass, sequences, mask, ran.row_ends)
            rest = (self.links, sequences, mask, ran.row_ends)
            return in_link_order(found, collected_gates(ran_mixtures.gate_log, ran_mixtures.routed, *rest), self.links)
        except RequestError:
            if wanted:
                raise
            return []
