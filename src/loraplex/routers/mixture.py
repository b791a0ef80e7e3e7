"""A mixture that needs no second pass: experts, and a router that reads each LoRA layer's own input."""

from dataclasses import dataclass

from loraplex.routers.config import RouterConfig
from loraplex.routing.token_router import TokenRouter


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedMixture:
    """A mixture under one name. Its experts are adapters of the store."""

    name: str
    experts: tuple[str, ...]  # adapter names in the router's order
    config: RouterConfig
    router: TokenRouter
    modules: tuple[int, ...]  # of each LoRA layer, its module index in the base model
    layers: tuple[str, ...]  # of each LoRA layer, its module path
    owned: frozenset[str] = frozenset()  # experts that came with the mixture and leave with it
