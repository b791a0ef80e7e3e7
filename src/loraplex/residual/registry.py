"""What a model with residuals keeps: the named residuals, and its attention layers once something needs them."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.adapters.names import check_name
from loraplex.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    BaseModelError,
    ConfigError,
    RequestError,
)
from loraplex.json_files import damaged_as
from loraplex.layers.attach import AdaptableModel
from loraplex.residual.calls import captures, forward_scope, generation_scope
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.residual.fingerprint import BaseFingerprint, check_same_base
from loraplex.residual.format_settings import ResidualSettings
from loraplex.residual.gates import GateResidual
from loraplex.residual.intervention_fit import check_intervention_fits, restricted
from loraplex.residual.intervention_pass import use_interventions
from loraplex.residual.intervention_scope import intervention_scope
from loraplex.residual.layers import AttentionLayers, base_fingerprint
from loraplex.residual.modules import FunctionResidual, LinkedResidual, Residual, check_rank, check_residual_fits
from loraplex.residual.operations import ChainOperations, interventions_of, is_intervention
from loraplex.residual.other_formats.pyreft import is_pyreft_folder
from loraplex.residual.positions import Positions, parse_positions
from loraplex.residual.reft import ReftResidual
from loraplex.residual.rows import ChainLink, rows_of
from loraplex.residual.scope import AttentionScope, use_attention
from loraplex.residual.sites import BlockSites
from loraplex.residual.sources import read_any_residual
from loraplex.residual.steering import Steering
from loraplex.routing.adapter_spec import Link
from loraplex.validation import listed

_MAX_RESTRICTED = 64  # sets of layers that are kept of one residual


@dataclass(kw_only=True)
class AttentionRequest:
    """What a call asks of attention, by row, and what it got once it has run."""

    capture: CaptureRequest | Sequence[CaptureRequest | None] | None = None  # one for all rows, or one for each
    steering: Sequence[Steering | Sequence[Steering] | None] | None = None  # one entry for each row
    # By row, how many tokens its prompt has, for residuals on chosen tokens; None: all that a call begins with.
    prompt_lengths: Sequence[int] | None = None
    record_failures: bool = False  # a row whose function fails goes on without it, instead of ending the call
    captures: list[AttentionCapture | None] = field(default_factory=list, init=False)
    failures: dict[int, AdapterError] = field(default_factory=dict, init=False)  # by row


class LinkedAttention:
    """The residuals of one base model, by name. Safe to use from many threads."""

    def __init__(self, base: PreTrainedModel, adaptable: AdaptableModel | None = None) -> None:
        """`adaptable` are the linear modules of the same base model, for gates."""
        self._base = base
        self._adaptable = adaptable
        self._sites: BlockSites | None = None
        self.num_detached = 0  # how often hooks were taken away
        self._residuals: dict[str, Residual] = {}
        self._restricted: WeakKeyDictionary[Residual, dict[tuple[int, ...], Residual]] = WeakKeyDictionary()
        self._layers: AttentionLayers | None = None
        self._lock = threading.RLock()

    @property
    def layers(self) -> AttentionLayers:
        """The base's attention layers; the first use joins them to the attention scope."""
        with self._lock:
            if self._layers is None:
                self._layers = AttentionLayers(self._base)
            return self._layers

    @property
    def sites(self) -> BlockSites:
        """The base's blocks, where interventions act; hooks come with the first one that is used."""
        with self._lock:
            if self._sites is None:
                self._sites = BlockSites(self._base)
            return self._sites

    def attach(self, operations: ChainOperations) -> None:
        """Let the base model's modules go through interventions; those that do already stay as they are."""
        if operations.sites:
            self.sites.hook_sites(operations.sites)
        if operations.has_gates:
            self.sites.hook_gates(operations.inputs, operations.outputs)

    def detach(self) -> None:
        """Give the base model its attention, and its blocks, back."""
        with self._lock:
            self.num_detached += 1
            if self._sites is not None:
                self._sites.detach()
                self._sites = None
            if self._layers is not None:
                self._layers.detach()
                self._layers = None

    # Residuals by name

    def add(
        self,
        name: str,
        source: str | Path | Residual,
        *,
        replace: bool = False,
        layers: Iterable[int] | None = None,
        positions: str | Positions | None = None,
    ) -> None:
        """Register a residual, from a folder or file or from memory. What runs goes on with the one it started with.

        `layers` and `positions` restrict a vector or ReFT interventions, or move them to other tokens.

        Raises NameFormatError, AdapterExistsError, AdapterFormatError, UnsupportedAdapterError, BaseModelError or
        BaseModelMismatchError, and then what is registered stays as it was.
        """
        check_name(name)
        if name in self and not replace:
            raise AdapterExistsError(
                f"residual {name!r} is loaded already. Pass replace=True to load a new version, or choose another name."
            )
        chosen = None if positions is None else parse_positions(positions)
        if isinstance(source, str | Path):
            with damaged_as(AdapterFormatError, source):
                residual = self._read(name, source, chosen)
                chosen = None if is_pyreft_folder(source) else chosen  # whose interventions share the positions
        else:
            residual = source
        residual = restricted(residual, layers, chosen)
        self._check(name, residual)
        with self._lock:
            self._residuals[name] = residual.to(self._base.device)

    def _check(self, name: str, residual: Residual) -> None:
        """Raise unless a residual fits the base model."""
        if isinstance(residual, LinkedResidual | FunctionResidual) or not is_intervention(residual):
            assert not isinstance(residual, ReftResidual | GateResidual), "these are interventions"
            check_residual_fits(name, residual, self.layers.identity, self.layers.num_heads)
        else:
            check_intervention_fits(name, residual, self.identity, lambda: self.sites, lambda: self.adaptable)

    @property
    def identity(self) -> BaseFingerprint:
        """The base model's; without its heads as long as its attention isn't joined."""
        with self._lock:
            return base_fingerprint(self._base) if self._layers is None else self._layers.identity

    @property
    def adaptable(self) -> AdaptableModel:
        """The base model's linear modules."""
        with self._lock:
            if self._adaptable is None:
                self._adaptable = AdaptableModel(self._base)
            return self._adaptable

    def _read(self, name: str, source: str | Path, positions: Positions | None) -> Residual:
        def check(settings: ResidualSettings) -> None:
            identity = self.layers.identity if settings.version == 1 else self.identity
            if settings.base is not None:
                check_same_base(name, settings.base, identity)
            check_rank(settings.rank, identity.hidden_size)

        return read_any_residual(source, self._base.config, check=check, positions=positions)

    def check_free(self, name: str) -> None:
        """Raise AdapterExistsError if `name` is a residual's."""
        if name in self:
            raise AdapterExistsError(
                f"{name!r} is the name of a residual already, which nothing else can replace. Choose another name, or "
                "unload it first."
            )

    def remove(self, name: str) -> None:
        with self._lock:
            self.get(name)
            del self._residuals[name]

    def get(self, name: str) -> Residual:
        if name not in self._residuals:
            raise AdapterNotFoundError(f"residual {name!r} is not loaded. Loaded: {self.names()}. Load it first.")
        return self._residuals[name]

    def names(self) -> list[str]:
        return sorted(self._residuals)

    def __contains__(self, name: object) -> bool:
        return name in self._residuals

    def split(self, links: Sequence[Link]) -> tuple[list[Link], list[tuple[ChainLink, ...]]]:
        """The rows' links without residuals, and their residuals, both in the links' order."""
        residuals = dict(self._residuals)  # one moment's: another thread may replace some
        others = [tuple(pair for pair in link if pair[0] not in residuals) for link in links]
        chains = [
            tuple(
                ChainLink(name=name, residual=residuals[name], weight=weight)
                for name, weight in link
                if name in residuals
            )
            for link in links
        ]
        return others, chains

    def at_layers(self, chain: tuple[ChainLink, ...], layers: Mapping[str, tuple[int, ...]]) -> tuple[ChainLink, ...]:
        """A row's residuals, of which the named ones act at some of their layers. Raises RequestError."""
        unknown = layers.keys() - {link.name for link in chain}
        if unknown:
            raise RequestError(
                f"residual_layers names {listed(unknown)}, which the link doesn't have as residuals. It has "
                f"{listed(link.name for link in chain) or 'none'}."
            )
        return tuple(
            replace(link, residual=self._at_layers(link, tuple(layers[link.name]))) if link.name in layers else link
            for link in chain
        )

    def _at_layers(self, link: ChainLink, layers: tuple[int, ...]) -> Residual:
        """The same object for the same layers: rows that have it share keys and values."""
        with self._lock:
            known = self._restricted.setdefault(link.residual, {})
            if layers not in known:
                try:
                    made = restricted(link.residual, layers)
                except ConfigError as error:
                    raise RequestError(f"residual_layers of {link.name!r}: {error}") from None
                while len(known) >= _MAX_RESTRICTED:
                    known.pop(next(iter(known)))
                known[layers] = made
            return known[layers]

    def split_chain(
        self, chain: tuple[ChainLink, ...], *, captured: bool = False
    ) -> tuple[tuple[ChainLink, ...], tuple[ChainLink, ...]]:
        """A row's residuals on attention, and its interventions; both in the link's order."""
        if all(is_intervention(link.residual) for link in chain):
            return (), chain
        interventions = interventions_of(chain, with_vectors=not captured and self._blocks_hold_attention)
        kept = {id(link) for link in interventions}
        return tuple(link for link in chain if id(link) not in kept), interventions

    @cached_property
    def _blocks_hold_attention(self) -> bool:
        """Whether attention layer N is what puts out the states of block N's attention."""
        try:
            sites, layers = self.sites, self.layers
        except BaseModelError:
            return False
        paths = {number: layer.path for number, layer in layers.layers.items()}
        return all(
            number < sites.num_blocks
            and sites.has("attention", number)
            and sites.module("attention", number) is self._base.get_submodule(path)
            for number, path in paths.items()
        )

    # Running

    @contextmanager
    def running(
        self,
        chains: Sequence[tuple[ChainLink, ...]],
        request: AttentionRequest | None,
        num_tokens: int,
        attention_mask: Tensor | None,
        inputs: dict[str, Any],  # of forward or generate; gains a cache that follows, where there is none
        *,
        generates: bool,
        new_cache: Callable[[], Any] | None = None,  # makes a cache with `followers`; None: a FollowedCache
    ) -> Iterator[AttentionScope | None]:
        """Run the block with the rows' residuals, captures and steerings; yields None if no row asks for any."""
        request = request or AttentionRequest()
        captured = [row.capture is not None for row in rows_of(chains, request.capture)]
        pairs = [self.split_chain(chain, captured=own) for chain, own in zip(chains, captured, strict=True)]
        rows = rows_of([attention for attention, _ in pairs], request.capture, request.steering)
        interventions = intervention_scope(
            [own for _, own in pairs],
            num_tokens,
            attention_mask,
            inputs,
            self._base,
            generates=generates,
            prompt_lengths=request.prompt_lengths,
        )
        for operations in () if interventions is None else interventions.rows:
            if operations is not None:
                self.attach(operations)
        if not any(row.asks for row in rows):
            with use_interventions(interventions):
                yield None
            return
        make = generation_scope if generates else forward_scope
        scope = make(
            rows,
            self.layers,
            num_tokens,
            attention_mask,
            inputs,
            self._base,
            record_failures=request.record_failures,
            new_cache=new_cache,
        )
        with use_attention(scope), use_interventions(interventions):
            yield scope
        request.failures = dict(scope.plans.failures or {})

    def report(
        self,
        scope: AttentionScope | None,
        request: AttentionRequest | None,
        sequences: Tensor | None,  # [rows, tokens]  prompt and, after generation, what was generated
        tokenizer: PreTrainedTokenizerBase | None,
        ends: Sequence[Sequence[int]] | None = None,  # by row
    ) -> None:
        """Put what the rows captured into the request."""
        if request is not None and scope is not None and scope.plans.buffers:
            if sequences is None:
                raise RequestError("captures tell attention by token, but only embeddings were given. Pass input_ids.")
            request.captures = captures(scope, sequences, tokenizer, ends)
