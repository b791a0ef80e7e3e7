"""Which replica a request should go to: one that holds its adapters already, unless that is crowded."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loraplex.errors import LinkSyntaxError
from loraplex.routing.adapter_spec import parse_adapter_spec

_SPARE = 8  # requests that a replica may have beyond twice those of the idlest, before others help out


@dataclass(frozen=True, kw_only=True)
class ReplicaView:
    """What is known of a replica."""

    id: str
    held: frozenset[str]  # adapters in its slots or host memory, as it told last
    num_ongoing: int


def adapter_key(model: object, base_name: str) -> str:
    """The adapters that a request's `model` names, sorted and joined by +; empty for the base model."""
    if not isinstance(model, str) or model == base_name:
        return ""
    try:
        return "+".join(sorted({name for name, _ in parse_adapter_spec(model)}))
    except LinkSyntaxError:  # any replica can tell the client
        return ""


def rank_replicas(names: Iterable[str], views: Sequence[ReplicaView]) -> list[list[str]]:
    """Ids of replicas, best group first; within a group the router takes the idlest.

    Of several that hold the adapters, and of all if none does, it is always the same one: that with the largest hash of
    adapters and replica (rendezvous hashing, Thaler and Ravishankar 1998). When a replica comes or goes, only its own
    adapters move.
    """
    wanted = frozenset(names)
    if not wanted or not views:
        return [[view.id for view in views]]
    key = "+".join(sorted(wanted))
    most = 2 * min(view.num_ongoing for view in views) + _SPARE

    def place(view: ReplicaView) -> tuple[bool, bool, bytes]:
        weight = hashlib.blake2b(f"{key}|{view.id}".encode(), digest_size=8).digest()
        return view.num_ongoing <= most, wanted <= view.held, weight

    return [[view.id] for view in sorted(views, key=place, reverse=True)]
