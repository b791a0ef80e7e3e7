"""The adapter versions and mixtures that a request runs with, from its start to its end."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from loraplex.adapters.store.store import AdapterStore
from loraplex.adapters.store.version import AdapterVersion
from loraplex.adapters.vocabulary import Vocabulary
from loraplex.engine.kv.sequence_kv import ExtraKey, SequenceRoute
from loraplex.errors import AdapterChangedError
from loraplex.models.mixtures import AnyMixture, Mixtures
from loraplex.residual.modules import FunctionResidual
from loraplex.residual.operations import ChainOperations, positions_of
from loraplex.residual.registry import LinkedAttention
from loraplex.residual.rows import ChainLink
from loraplex.routers.mixture import RoutedMixture
from loraplex.routing.adapter_spec import Link
from loraplex.routing.invocation import invocation_start
from loraplex.xlora.mixture import Mixture

_serials: "WeakKeyDictionary[object, int]" = WeakKeyDictionary()
_next_serial = itertools.count()


def serial(version: object) -> int:
    """A number that no other object of this process ever has: versions are counted by name and may come again."""
    return _serials.setdefault(version, next(_next_serial))


@dataclass(frozen=True, kw_only=True)
class BoundMixture:
    """A mixture of a request's link."""

    mixture: Mixture
    weight: float
    slots: tuple[int, ...]  # of the experts, in head order
    versions: tuple[int, ...]  # serials of the experts
    scaling: int  # which of the sequence's scaling passes its head reads

    @property
    def identity(self) -> tuple[object, ...]:
        """What the keys and values of a main pass depend on; training a head in place changes it too."""
        head = tuple(parameter._version for parameter in self.mixture.head.parameters())
        return ("mixture", serial(self.mixture), head, self.versions, self.weight)


@dataclass(frozen=True, kw_only=True)
class BoundRouter:
    """A mixture of a request's link that gates its experts in each layer."""

    mixture: RoutedMixture
    weight: float
    slots: tuple[int, ...]  # of the experts, in the router's order
    versions: tuple[int, ...]  # serials of the experts

    @property
    def identity(self) -> tuple[object, ...]:
        """What keys and values depend on; training a router in place changes it too."""
        router = self.mixture.router
        weights = tuple(p._version for p in router.parameters()) if isinstance(router, nn.Module) else ()
        return ("routed", serial(self.mixture), weights, self.versions, self.weight)


class RequestAdapters:
    """A request's leases; `close` ends them."""

    def __init__(
        self,
        store: AdapterStore,
        mixtures: Mixtures,
        linked: LinkedAttention,
        link: Link,
        *,
        captured: bool = False,
        residual_layers: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """`captured`: the request captures attention; `residual_layers`: those of residuals that act at some.

        Raises AdapterNotFoundError, CapacityError (no slot is free now), AdapterChangedError or RequestError.
        """
        (link,), (chain,) = linked.split([link])  # residuals have no slots: the objects themselves are kept
        self.chain = linked.at_layers(chain, residual_layers or {})
        self.attention_chain, own = linked.split_chain(self.chain, captured=captured)
        self.interventions = ChainOperations(own) if own else None
        found, names = mixtures.expand([link])
        self.scaling_routes: list[tuple[SequenceRoute, ...]] = []  # of each scaling pass
        self.scaling_keys: list[tuple[ExtraKey, ...]] = []
        with ExitStack() as leases:
            leased = leases.enter_context(store.lease(names))
            for version in leased.values():
                mixtures.check_attached(version)
            self.plain = [(leased[name], weight) for name, weight in link if name in leased and name not in found]
            self.mixtures = self._bind_mixtures(link, found, leased)
            self.routed = [
                BoundRouter(
                    mixture=mixture,
                    weight=weight,
                    slots=tuple(_slot(leased[expert]) for expert in mixture.experts),
                    versions=tuple(serial(leased[expert]) for expert in mixture.experts),
                )
                for name, weight in link
                if isinstance(mixture := found.get(name), RoutedMixture)
            ]
            places = {name: place for place, (name, _) in enumerate(link)}
            bound: list[BoundMixture | BoundRouter] = [*self.mixtures, *self.routed]
            self.all_mixtures = sorted(bound, key=lambda one: places[one.mixture.name])  # in the order of the link
            self._leases = leases.pop_all()

    def close(self) -> None:
        self._leases.close()

    def check_vocabulary(self, known: Vocabulary | None) -> None:
        """Raise AdapterChangedError if the leased versions have other tokens than the prompt was read with."""
        for version, _ in self.plain:
            own = version.vocabulary
            if own is not None and (known is None or own.identity != known.identity):
                raise AdapterChangedError(
                    f"the adapter {version.name!r} was replaced by one with other tokens after the request's prompt "
                    "was read. Send the request again."
                )
        if known is not None and all(version.vocabulary is None for version, _ in self.plain):
            raise AdapterChangedError(
                "an adapter with tokens of its own was replaced after the request's prompt was read with them. Send "
                "the request again."
            )

    @property
    def slots(self) -> set[int]:
        """The slots that it holds."""
        experts = {slot for bound in self.all_mixtures for slot in bound.slots}
        return {_slot(version) for version, _ in self.plain} | experts

    def main_routes(self, prompt: Sequence[int]) -> list[SequenceRoute]:
        """The routes of a main pass: plain adapters, then the experts of all mixtures, routed ones first."""
        routes = [
            SequenceRoute(slot=_slot(version), weight=weight, active_from=_active_from(version, prompt))
            for version, weight in self.plain
            if version.invocation is None or _active_from(version, prompt) is not None
        ]
        for routed in self.routed:
            routes += [
                SequenceRoute(
                    slot=slot,
                    weight=routed.weight,
                    router=routed.mixture.router,
                    expert=expert,
                    mixture=self.all_mixtures.index(routed),
                )
                for expert, slot in enumerate(routed.slots)
            ]
        for use, bound in enumerate(self.mixtures):
            routes += [SequenceRoute(slot=slot, use=use, expert=expert) for expert, slot in enumerate(bound.slots)]
        return routes

    def main_keys(self, prompt: Sequence[int]) -> list[ExtraKey]:
        """What the main pass's keys and values depend on; an aLoRA before its invocation is the base model."""
        parts = []
        for version, weight in self.plain:
            active_from = _active_from(version, prompt)
            if version.invocation is None or active_from is not None:
                parts.append(ExtraKey(identity=("adapter", serial(version), weight), active_from=active_from))
        parts += [ExtraKey(identity=bound.identity) for bound in self.mixtures]
        parts += [ExtraKey(identity=bound.identity) for bound in self.routed]
        return parts + [self._residual_key(residual, len(prompt)) for residual in self.chain]

    def _residual_key(self, link: ChainLink, num_prompt: int) -> ExtraKey:
        """What a residual changes: of one on generated tokens, nothing before them."""
        identity = self._residual_identity(link)
        positions = positions_of(link.residual)
        if all(one.which == "generated" for one in positions):
            return ExtraKey(identity=identity, active_from=num_prompt)
        if any(one.depends_on_prompt for one in positions):  # another prompt ends elsewhere
            return ExtraKey(identity=(*identity, num_prompt))
        return ExtraKey(identity=identity)

    def _residual_identity(self, link: ChainLink) -> tuple[object, ...]:
        """What keys and values depend on, and u beside them; a function may change, so it shares within its request."""
        residual = link.residual
        if isinstance(residual, FunctionResidual):
            return ("function", serial(self), link.name, link.weight)
        changes = tuple(tensor._version for tensor in residual.tensors() if not tensor.is_inference())
        return ("residual", serial(residual), changes, link.weight)

    def _bind_mixtures(
        self, link: Link, found: Mapping[str, AnyMixture], leased: Mapping[str, AdapterVersion]
    ) -> list[BoundMixture]:
        bound: list[BoundMixture] = []
        base_pass: int | None = None  # mixtures whose scaling pass is the base model's share it
        for name, weight in link:
            mixture = found.get(name)
            if not isinstance(mixture, Mixture):
                continue
            slots = tuple(_slot(leased[expert]) for expert in mixture.experts)
            versions = tuple(serial(leased[expert]) for expert in mixture.experts)
            use = len(bound)
            if mixture.pass_value == 0:
                if base_pass is None:
                    base_pass = self._add_pass((), ())
                scaling = base_pass
            else:
                routes = tuple(SequenceRoute(slot=slot, use=use, expert=i) for i, slot in enumerate(slots))
                scaling = self._add_pass(routes, (ExtraKey(identity=("pass", serial(mixture), versions)),))
            bound.append(BoundMixture(mixture=mixture, weight=weight, slots=slots, versions=versions, scaling=scaling))
        return bound

    def _add_pass(self, routes: tuple[SequenceRoute, ...], keys: tuple[ExtraKey, ...]) -> int:
        self.scaling_routes.append(routes)
        self.scaling_keys.append(keys)
        return len(self.scaling_routes) - 1


def _slot(version: AdapterVersion) -> int:
    assert version.slot is not None, f"{version.name!r} is leased but in no slot"
    return version.slot


def _active_from(version: AdapterVersion, prompt: Sequence[int]) -> int | None:
    """Where an aLoRA's last invocation in the prompt begins; None if there is none, or for other adapters."""
    return None if version.invocation is None else invocation_start(prompt, version.invocation)
