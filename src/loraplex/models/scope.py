"""The scope of one request batch: adapters leased into slots, and the rows' routing made current."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.adapters.store.store import AdapterStore
from loraplex.adapters.store.version import AdapterVersion
from loraplex.errors import RequestError
from loraplex.layers.rows.passes import cached_length
from loraplex.models.mixtures import AnyMixture, Mixtures
from loraplex.residual.intervention_pass import without_residuals
from loraplex.routers.mixture import RoutedMixture
from loraplex.routing.adapter_spec import Link
from loraplex.routing.gate_record import GateLog
from loraplex.routing.invocation import invocation_start
from loraplex.routing.routing import use_routing
from loraplex.routing.rows import Route, RowRouting
from loraplex.routing.weight_provider import WeightProvider
from loraplex.xlora.mixture import Mixture
from loraplex.xlora.two_pass.hooks import use_two_pass
from loraplex.xlora.two_pass.mixture_batch import MixtureRowGroup, plan_mixture_rows
from loraplex.xlora.two_pass.options import TwoPassOptions
from loraplex.xlora.two_pass.two_pass import TwoPass


@contextmanager
def adapter_scope(
    base: PreTrainedModel,
    store: AdapterStore,
    mixtures: Mixtures,
    bank: WeightProvider,
    links: Sequence[Link],
    tokens: "RowTokens",
    *,
    fast_decode: bool = False,
    options: TwoPassOptions,
) -> Iterator["RanMixtures"]:
    """Run the block with every row's link in force; its adapters keep their slots until it ends."""
    found, names = mixtures.expand(links)
    with store.lease(names) as leased:
        rows = [_routes(link, leased, tokens, row, found, options) for row, link in enumerate(links)]
        for version in leased.values():
            mixtures.check_attached(version)
        uses = [use for row, link in enumerate(links) for use in _uses(link, row, found, leased)]
        routed = {name: mixture for name, mixture in found.items() if isinstance(mixture, RoutedMixture)}
        gate_log = GateLog() if options.collect and routed else None
        if not uses:
            with use_routing(RowRouting(rows, bank, fast_decode=fast_decode, gate_log=gate_log)):
                yield RanMixtures(routed=routed, gate_log=gate_log)
            return
        two_pass = TwoPass(
            base,
            plan_mixture_rows(uses),
            rows,
            bank,
            options,
            cache_use=mixtures.cache_use,
            fast_decode=fast_decode,
            gate_log=gate_log,
            around_scaling=without_residuals,  # the scaling pass has no residuals, captures or steering
        )
        with use_routing(two_pass.routing), use_two_pass(two_pass):
            yield RanMixtures(two_pass=two_pass, routed=routed, gate_log=gate_log)


@dataclass(frozen=True, kw_only=True)
class RanMixtures:
    """What a call's mixtures leave for its report."""

    two_pass: TwoPass | None = None  # if any row goes through an X-LoRA
    routed: Mapping[str, RoutedMixture] = field(default_factory=dict)
    gate_log: GateLog | None = None  # of the routed ones, by (row, name), if that is wanted


def _uses(
    link: Link, row: int, found: Mapping[str, AnyMixture], leased: Mapping[str, AdapterVersion]
) -> Iterator[MixtureRowGroup]:
    for name, weight in link:
        mixture = found.get(name)
        if isinstance(mixture, Mixture):
            slots = tuple(_slot(leased[expert]) for expert in mixture.experts)
            yield MixtureRowGroup(row=row, mixture=mixture, weight=weight, slots=slots)


def _slot(version: AdapterVersion) -> int:
    assert version.slot is not None, f"{version.name!r} is leased but in no slot"
    return version.slot


def _routes(
    link: Link,
    leased: Mapping[str, AdapterVersion],
    tokens: "RowTokens",
    row: int,
    found: Mapping[str, AnyMixture],
    options: TwoPassOptions,
) -> list[Route]:
    """The routes of a link's plain adapters (an aLoRA that isn't invoked has none) and of routed mixtures."""
    routes = []
    for name, weight in link:
        mixture = found.get(name)
        if isinstance(mixture, RoutedMixture):
            record = (row, name) if options.collect else None
            routes += [
                Route(slot=_slot(leased[expert]), weight=weight, router=mixture.router, expert=place, record=record)
                for place, expert in enumerate(mixture.experts)
            ]
        if name in found or name not in leased:
            continue
        version, start = leased[name], None
        if version.invocation is not None:
            start = tokens.invoked_at(row, version.invocation, name)
            if start is None:
                continue
        routes.append(Route(slot=_slot(version), weight=weight, active_from=start))
    return routes


@dataclass(frozen=True, kw_only=True)
class RowTokens:
    """The tokens of a call's rows, where an aLoRA's invocation is looked for."""

    new: Tensor | None  # [rows, tokens]  those of the call; None: embeddings were given
    cached: Tensor | None = None  # [rows, tokens]  those in the cache before them, where they are known
    num_cached: int | None = 0  # None: there is a cache, and it isn't known how many tokens are in it

    def invoked_at(self, row: int, invocation: Sequence[int], name: str) -> int | None:
        """The column where the row's last invocation begins; None without one. Raises RequestError if unknown."""
        if self.new is None:
            raise RequestError(
                f"row {row} asks for the aLoRA {name!r}, whose start is found in input_ids, but only embeddings "
                "were given. Pass input_ids."
            )
        ids = self.new[row] if self.cached is None else torch.cat([self.cached[row], self.new[row]])
        num_before = 0 if self.cached is not None else self.num_cached
        start = invocation_start(ids.tolist(), invocation)
        if num_before is None or (num_before > 0 and start is None):
            raise RequestError(
                f"row {row} asks for the aLoRA {name!r}, but which tokens past_key_values holds is not known, and its "
                "invocation may be among them. Pass a cache that this model's forward returned, or all tokens of the "
                "row without past_key_values."
            )
        return None if start is None else num_before + start


class CachedIds:
    """The token ids of caches that `forward` returned, as long as somebody has them: an invocation may be in one."""

    def __init__(self) -> None:
        self._ids: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    def of(self, cache: Any, num_rows: int) -> Tensor | None:  # [rows, tokens]
        """What is in the cache; None where that isn't known."""
        length = cached_length(cache)
        if length is None:
            return None
        known = self._ids.get(cache)
        if known is None or len(known) != num_rows or known.shape[1] < length:
            return None
        return known[:, :length]  # it may have been cropped

    def forget(self, cache: Any) -> None:
        """What is in the cache from now on is not known."""
        if cached_length(cache) is not None:
            self._ids.pop(cache, None)

    def note(self, cache: Any, before: Tensor | None, new: Tensor) -> None:
        """Remember what is in a cache after a pass of `new` on top of `before`, which is None if that isn't known."""
        length = cached_length(cache)
        if length is None:
            return
        ids = new.detach() if before is None else torch.cat([before, new.detach()], dim=1)
        if ids.shape[1] == length:
            self._ids[cache] = ids.clone()
        else:
            self._ids.pop(cache, None)
