"""A mixture with a router, made of experts that are loaded: what can be routed, and the router itself."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from loraplex.adapters.store.version import AdapterVersion
from loraplex.errors import ConfigError, UnsupportedAdapterError
from loraplex.layers.attach import AdaptableModel
from loraplex.routers.config import RouterConfig, StaticRouterConfig
from loraplex.routers.mixture import RoutedMixture
from loraplex.routers.router import make_router
from loraplex.routing.token_router import TokenRouter

RouterReader = Callable[[Mapping[str, int]], Mapping[str, Tensor]]  # from the LoRA layers' inputs to a state


def make_routed_mixture(
    name: str,
    experts: Sequence[AdapterVersion],  # in the router's order
    modules: tuple[int, ...],  # of the LoRA layers
    adaptable: AdaptableModel,
    config: RouterConfig,
    *,
    seed: int,
    read_router: RouterReader | None,  # None: random weights from `seed`
    device: torch.device,
    owned: Collection[str],
) -> RoutedMixture:
    """A mixture whose gates each layer predicts. Raises UnsupportedAdapterError or ConfigError."""
    paths = [adaptable.paths[module] for module in modules]
    _check_routable(name, experts, paths, adaptable)
    check_gates(config, len(experts), len(modules))
    widths = {module: adaptable.shapes[path].in_features for module, path in zip(modules, paths, strict=True)}
    return RoutedMixture(
        name=name,
        experts=tuple(expert.name for expert in experts),
        config=config,
        router=_make_router(config, widths, len(experts), seed, paths, read_router, device),
        modules=modules,
        layers=tuple(paths),
        owned=frozenset(owned),
    )


def _make_router(
    config: RouterConfig,
    widths: Mapping[int, int],  # of the inputs, by module
    num_experts: int,
    seed: int,
    paths: Sequence[str],
    read_router: RouterReader | None,
    device: torch.device,
) -> TokenRouter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = make_router(config, widths, num_experts)
    if isinstance(router, nn.Module):
        if read_router is not None:
            router.load_state_dict(dict(read_router(dict(zip(paths, widths.values(), strict=True)))))
        router.to(device)
    return router


def _check_routable(
    name: str, experts: Sequence[AdapterVersion], paths: Sequence[str], adaptable: AdaptableModel
) -> None:
    """Raise UnsupportedAdapterError for experts that a router can't gate."""
    embeddings = [path for path in paths if adaptable.shapes[path].kind == "embedding"]
    if embeddings:
        raise UnsupportedAdapterError(
            f"mixture {name!r}: its experts adapt the embedding {embeddings[0]!r}, whose input are tokens' "
            "numbers, from which a router can't tell anything. Use experts of linear modules, or XLoraConfig."
        )
    for expert in experts:
        if expert.is_dora:
            raise UnsupportedAdapterError(
                f"mixture {name!r}: the expert {expert.name!r} is a DoRA, whose share of the base output a router "
                "doesn't know. Use LoRA experts, or XLoraConfig."
            )


def check_gates(config: RouterConfig, num_experts: int, num_layers: int) -> None:
    """Raise ConfigError unless the settings are for so many experts and LoRA layers."""
    if not isinstance(config, StaticRouterConfig):
        return
    first = config.gates[0]
    counts = (len(first), len(config.gates)) if isinstance(first, tuple) else (len(config.gates), num_layers)
    if counts != (num_experts, num_layers):
        raise ConfigError(
            f"gates has {counts[0]} experts and {counts[1]} LoRA layers, but the mixture has {num_experts} and "
            f"{num_layers}."
        )
