"""What a model with residuals keeps: the named residuals, and its attention layers once something needs them."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.adapters.names import check_name
from loraplex.errors import AdapterError, AdapterExistsError, AdapterNotFoundError, RequestError
from loraplex.residual.calls import captures, forward_scope, generation_scope
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.residual.format import ResidualSettings, read_residual
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import Residual, check_rank, check_residual_fits, check_same_base
from loraplex.residual.rows import ChainLink, rows_of
from loraplex.residual.scope import AttentionScope, use_attention
from loraplex.residual.steering import Steering
from loraplex.routing.adapter_spec import Link


@dataclass(kw_only=True)
class AttentionRequest:
    """What a call asks of attention, by row, and what it got once it has run."""

    capture: CaptureRequest | Sequence[CaptureRequest | None] | None = None  # one for all rows, or one for each
    steering: Sequence[Steering | Sequence[Steering] | None] | None = None  # one entry for each row
    record_failures: bool = False  # a row whose function fails goes on without it, instead of ending the call
    captures: list[AttentionCapture | None] = field(default_factory=list, init=False)
    failures: dict[int, AdapterError] = field(default_factory=dict, init=False)  # by row


class LinkedAttention:
    """The residuals of one base model, by name. Safe to use from many threads."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._residuals: dict[str, Residual] = {}
        self._layers: AttentionLayers | None = None
        self._lock = threading.RLock()

    @property
    def layers(self) -> AttentionLayers:
        """The base's attention layers; the first use joins them to the attention scope."""
        with self._lock:
            if self._layers is None:
                self._layers = AttentionLayers(self._base)
            return self._layers

    def detach(self) -> None:
        """Give the base model its attention back."""
        with self._lock:
            if self._layers is not None:
                self._layers.detach()
                self._layers = None

    # Residuals by name

    def add(self, name: str, source: str | Path | Residual, *, replace: bool = False) -> None:
        """Register a residual, from a folder or from memory. What runs goes on with the one it started with.

        Raises NameFormatError, AdapterExistsError, AdapterFormatError, UnsupportedAdapterError, BaseModelError or
        BaseModelMismatchError, and then what is registered stays as it was.
        """
        check_name(name)
        if name in self and not replace:
            raise AdapterExistsError(
                f"residual {name!r} is loaded already. Pass replace=True to load a new version, or choose another name."
            )
        residual = self._read(name, source) if isinstance(source, str | Path) else source
        check_residual_fits(name, residual, self.layers.identity, self.layers.num_heads)
        with self._lock:
            self._residuals[name] = residual.to(self._base.device)

    def _read(self, name: str, folder: str | Path) -> Residual:
        def check(settings: ResidualSettings) -> None:
            check_same_base(name, settings.base, self.layers.identity)
            rank = 1 if settings.config is None else settings.config.r
            check_rank(rank, self.layers.identity.hidden_size)

        return read_residual(folder, check=check)

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
        rows = rows_of(chains, request.capture, request.steering)
        if not any(row.asks for row in rows):
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
        with use_attention(scope):
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
