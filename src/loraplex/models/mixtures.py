"""The mixtures of a model: their names, and the rules that keep them and the store's adapters consistent."""

import copy
import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.adapters.names import check_name
from loraplex.adapters.store.store import AdapterStore
from loraplex.adapters.store.version import AdapterVersion
from loraplex.errors import (
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    BaseModelMismatchError,
    ConfigError,
    MixtureError,
    UnsupportedAdapterError,
)
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.base.decoder import find_decoder
from loraplex.layers.quantized.kinds import num_weights
from loraplex.models.routed_mixtures import RouterReader, make_routed_mixture
from loraplex.routers.config import RouterConfig
from loraplex.routers.mixture import RoutedMixture
from loraplex.routing.adapter_spec import Link
from loraplex.validation import listed
from loraplex.xlora.config import HEAD_SETTINGS, XLoraConfig
from loraplex.xlora.formats.head_tensors import check_head, head_shapes
from loraplex.xlora.head import ScalingHead
from loraplex.xlora.mixture import Mixture, lora_layers
from loraplex.xlora.two_pass.cache_probe import CacheUse, probe_cache
from loraplex.xlora.two_pass.hooks import attach_two_pass

AnyMixture = Mixture | RoutedMixture

SMALL_HEAD = 1 << 26  # parameters that a scaling head may have on any base model


class Mixtures:
    """The loaded mixtures. A mixture refers to its experts by name: their weights are the store's, never copied."""

    def __init__(self, base: PreTrainedModel, adaptable: AdaptableModel, store: AdapterStore) -> None:
        self._base = base
        self._adaptable = adaptable
        self._store = store
        self._mixtures: dict[str, AnyMixture] = {}
        self._cache_use: CacheUse | None = None
        self._lock = threading.RLock()

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states that scaling heads read."""
        return self._base.config.get_text_config(decoder=True).hidden_size

    @property
    def cache_use(self) -> CacheUse:
        """How the base model goes on from a cache; tried out when the first mixture is made."""
        with self._lock:
            if self._cache_use is None:
                self._cache_use = probe_cache(self._base, self._adaptable)
            return self._cache_use

    def __contains__(self, name: str) -> bool:
        return name in self._mixtures

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._mixtures)

    def xlora(self, name: str) -> Mixture:
        """The X-LoRA mixture of that name. Raises AdapterNotFoundError, or MixtureError for one of another kind."""
        mixture = self.get(name)
        if not isinstance(mixture, Mixture):
            raise MixtureError(
                f"mixture {name!r} has no scaling head, but a router in each layer ({type(mixture.config).__name__}). "
                "This is for X-LoRA mixtures."
            )
        return mixture

    def get(self, name: str) -> AnyMixture:
        """The mixture of that name, or AdapterNotFoundError."""
        with self._lock:
            if name not in self._mixtures:
                raise AdapterNotFoundError(
                    f"mixture {name!r} is not loaded. Loaded: {listed(self._mixtures) or 'none'}. Make it with "
                    "model.create_mixture, or load it with model.load_mixture."
                )
            return self._mixtures[name]

    def check_head_size(self, config: XLoraConfig, hidden_size: int, num_experts: int, num_layers: int) -> None:
        """Raise, before a scaling head is read or made, where it is for another base model or larger than the model.

        BaseModelMismatchError or ConfigError.
        """
        if hidden_size != self.hidden_size:
            raise BaseModelMismatchError(
                f"the mixture was made for hidden states of size {hidden_size}, but this base model's have "
                f"{self.hidden_size}. Load it on the base model that it was trained with."
            )
        if num_layers > len(self._adaptable.paths):
            raise BaseModelMismatchError(
                f"the scaling head has scalings for {num_layers} LoRA layers, but this base model has at most "
                f"{len(self._adaptable.paths)}. Load it on the base model that it was trained with."
            )
        shapes = head_shapes(config, hidden_size=hidden_size, num_experts=num_experts, num_layers=num_layers)
        size = sum(math.prod(shape) for shape in shapes.values())
        most = max(SMALL_HEAD, num_weights(self._base))
        if size > most:
            raise ConfigError(
                f"with xlora_depth={config.xlora_depth} and xlora_size={config.xlora_size} the scaling head has {size} "
                f"parameters, more than the {most} that it may have on this base model. Lower them."
            )

    def check_new(self, name: str) -> None:
        """Raise NameFormatError, or AdapterExistsError if an adapter or mixture has this name."""
        check_name(name)
        kind = "a mixture" if name in self else "an adapter" if name in self._store else None
        if kind is not None:
            raise AdapterExistsError(
                f"{kind} {name!r} is loaded already. Choose another name, or unload it first: model.unload({name!r})."
            )

    def add(
        self,
        name: str,
        experts: Sequence[str],  # loaded adapters, in the head's order
        config: XLoraConfig,
        *,
        head: Mapping[str, Tensor] | None = None,  # None: random weights from `seed`
        hidden_size: int | None = None,  # that `head` was made for
        layers: Sequence[str] | None = None,  # the LoRA layers that `head` was made for, in its order
        seed: int = 0,
        owned: Collection[str] = (),
    ) -> Mixture:
        """Register a mixture after everything about it was checked."""
        self.check_new(name)
        self._check_base()
        config.check_num_experts(len(experts))
        self._check_experts(name, experts)
        modules = self._lora_layers(name, experts)
        if layers is not None:
            self._check_layers(name, layers, modules)
        self.check_head_size(config, hidden_size or self.hidden_size, len(experts), len(modules))
        mixture = Mixture(
            name=name,
            experts=tuple(experts),
            config=config,
            head=self._head(config, head, len(experts), len(modules), seed),
            modules=modules,
            layers=tuple(self._adaptable.paths[module] for module in modules),
            num_modules=len(self._adaptable.paths),
            owned=frozenset(owned),
        )
        _ = self.cache_use
        with self._lock:
            self.check_new(name)
            self._adaptable.attach_once("two passes", lambda: attach_two_pass(self._base))
            self._mixtures[name] = mixture
        return mixture

    def add_routed(
        self,
        name: str,
        experts: Sequence[str],  # loaded adapters, in the router's order
        config: RouterConfig,
        *,
        seed: int = 0,
        read_router: RouterReader | None = None,  # None: random, from `seed`
        owned: Collection[str] = (),
    ) -> RoutedMixture:
        """Register a mixture whose gates each layer predicts, after everything about it was checked."""
        self.check_new(name)
        self._check_experts(name, experts)
        mixture = make_routed_mixture(
            name,
            [self._store.version(expert) for expert in experts],
            self._lora_layers(name, experts),
            self._adaptable,
            config,
            seed=seed,
            read_router=read_router,
            device=self._base.device,
            owned=owned,
        )
        with self._lock:
            self.check_new(name)
            self._mixtures[name] = mixture
        return mixture

    def configure(self, name: str, changes: Mapping[str, Any]) -> None:
        """Let a mixture have other settings with the same head and experts; whoever uses it now goes on with the old.

        Raises ConfigError for a setting that the head's weights were made for.
        """
        with self._lock:
            mixture = self.xlora(name)
            free = mixture.config.__dataclass_fields__.keys() - HEAD_SETTINGS
            fixed = sorted(changes.keys() - free)
            if fixed:
                raise ConfigError(
                    f"{fixed[0]!r} can't be changed in mixture {name!r}: it is no setting, or the scaling head's "
                    f"weights were made for it. What can be changed: {', '.join(sorted(free))}. For another head, "
                    "create and train a new mixture."
                )
            config = replace(mixture.config, **changes)
            config.check_num_experts(len(mixture.experts))
            head = copy.deepcopy(mixture.head)
            head.config = config
            self._mixtures[name] = replace(mixture, config=config, head=head)

    def remove(self, name: str) -> None:
        """Forget a mixture, and the experts that came with it and that no other mixture uses."""
        with self._lock:
            mixture = self.get(name)
            del self._mixtures[name]
            for expert in mixture.owned:
                if not self.using(expert) and expert in self._store:
                    self._store.remove(expert)

    def using(self, adapter: str) -> list[str]:
        """The mixtures that have this adapter as an expert."""
        with self._lock:
            return sorted(name for name, mixture in self._mixtures.items() if adapter in mixture.experts)

    def check_unloadable(self, adapter: str) -> None:
        """Raise MixtureError if a mixture needs this adapter."""
        users = self.using(adapter)
        if users:
            raise MixtureError(
                f"adapter {adapter!r} is an expert of {listed(users)}. Unload the mixture first: "
                f"model.unload({users[0]!r})."
            )

    def check_replaceable(
        self, adapter: str, paths: Collection[str], changed: Collection[str] = (), *, is_dora: bool
    ) -> None:
        """Raise MixtureError if a new version of an expert can't be one of the mixtures that have it.

        It would change the LoRA layers that heads were made for, or modules' own weights, whose paths are `changed`, or
        is a DoRA beside a router.
        """
        with self._lock:
            for name in self.using(adapter):
                if changed:
                    raise MixtureError(
                        f"adapter {adapter!r} is an expert of mixture {name!r}, and the new version brings its own "
                        f"weights of {listed(changed)}, which have no place in a mixture. Unload the mixture first."
                    )
                mixture = self._mixtures[name]
                if is_dora and isinstance(mixture, RoutedMixture):
                    raise MixtureError(
                        f"adapter {adapter!r} is an expert of mixture {name!r}, whose router can't gate a DoRA. "
                        "Replace it by a LoRA, or unload the mixture first."
                    )
                others = [self._store.version(expert).modules for expert in mixture.experts if expert != adapter]
                new = {self._adaptable.module_index[path] for path in paths}
                if lora_layers([new, *others]) != mixture.modules:
                    what = "scaling head" if isinstance(mixture, Mixture) else "router"
                    raise MixtureError(
                        f"adapter {adapter!r} is an expert of mixture {name!r}, whose {what} was made for "
                        f"{len(mixture.modules)} LoRA layers; the new version would change them. Replace it by one "
                        "that adapts the same modules, or unload the mixture first."
                    )

    def check_attached(self, version: AdapterVersion) -> None:
        """Raise RequestError if the modules that an adapter adapts or changes have lost their layers."""
        self._adaptable.check_attached(version.modules, version.changed)

    def expand(self, links: Sequence[Link]) -> tuple[dict[str, AnyMixture], list[str]]:
        """The mixtures that links name, and all adapters that they need: named ones and experts."""
        with self._lock:
            found = {name: self._mixtures[name] for link in links for name, _ in link if name in self._mixtures}
        names = [
            expert
            for link in links
            for name, _ in link
            for expert in (found[name].experts if name in found else (name,))
        ]
        return found, names

    def _head(
        self, config: XLoraConfig, state: Mapping[str, Tensor] | None, num_experts: int, num_layers: int, seed: int
    ) -> ScalingHead:
        """A head with the weights of `state`, or random ones. Raises AdapterFormatError for weights of other sizes."""
        sizes: dict[str, Any] = {"hidden_size": self.hidden_size, "num_experts": num_experts, "num_layers": num_layers}
        if state is not None:
            check_head(state, config, **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = ScalingHead(config, **sizes, device=self._base.device)
        if state is not None:
            head.load_state_dict({key: tensor.float() for key, tensor in state.items()})
        return head.eval().requires_grad_(False)

    def _check_base(self) -> None:
        if getattr(self._base.config, "is_encoder_decoder", False) or self._base.get_output_embeddings() is None:
            raise UnsupportedAdapterError(
                f"mixtures need a causal language model, but {type(self._base).__name__} is none: X-LoRA's scalings "
                "are predicted from the hidden states of a decoder. Use plain adapters on this model."
            )
        if find_decoder(self._base) is None:
            raise UnsupportedAdapterError(
                f"mixtures read the hidden states of a model's decoder, but {type(self._base).__name__} has no module "
                "that is one. Use plain adapters on this model."
            )

    def _check_experts(self, name: str, experts: Sequence[str]) -> None:
        if not experts:
            raise ConfigError(f"mixture {name!r} has no experts; give at least 1.")
        for expert in experts:
            if list(experts).count(expert) > 1:
                raise MixtureError(f"mixture {name!r} names the expert {expert!r} twice. Name each expert once.")
            if expert in self:
                raise MixtureError(
                    f"mixture {name!r} names {expert!r} as an expert, which is a mixture itself. Experts are adapters."
                )
            self._store.version(expert)  # raises AdapterNotFoundError

    def _check_layers(self, name: str, layers: Sequence[str], modules: Sequence[int]) -> None:
        """Raise AdapterFormatError unless the head's LoRA layers are the experts', in the order of the base model."""
        ours = [self._adaptable.paths[module] for module in modules]
        if list(layers) != ours:
            differing = next((i for i, pair in enumerate(zip(layers, ours, strict=False)) if pair[0] != pair[1]), None)
            where = "" if differing is None else f"; layer {differing} is {layers[differing]!r} and {ours[differing]!r}"
            raise AdapterFormatError(
                f"the ordering file of mixture {name!r} has {len(layers)} LoRA layers, its experts adapt {len(ours)}"
                f"{where}. Use the file that belongs to this mixture."
            )

    def _lora_layers(self, name: str, experts: Sequence[str]) -> tuple[int, ...]:
        versions = [self._store.version(expert) for expert in experts]
        for version in versions:
            if version.invocation is not None:
                raise UnsupportedAdapterError(
                    f"mixture {name!r}: the expert {version.name!r} is an aLoRA, which is off before its invocation, "
                    "while an expert's gates are the mixture's. Use LoRA or DoRA experts."
                )
            parameters = [path for path in map(self._path, sorted(version.modules)) if self._is_parameter(path)]
            if parameters:
                raise UnsupportedAdapterError(
                    f"mixture {name!r}: the expert {version.name!r} adapts the parameters {listed(parameters)} "
                    "(target_parameters), for which X-LoRA defines no scalings: they belong to no LoRA layer with one "
                    "input for each token. Use experts that adapt modules only."
                )
            if version.changed:
                raise UnsupportedAdapterError(
                    f"mixture {name!r}: the expert {version.name!r} brings its own weights of "
                    f"{listed(version.changed)}, which have no place in a mixture: its gates are for the factors of "
                    "LoRA layers. Use experts of factors alone."
                )
        return lora_layers(version.modules for version in versions)

    def _path(self, module: int) -> str:
        return self._adaptable.paths[module]

    def _is_parameter(self, path: str) -> bool:
        return self._adaptable.shapes[path].is_parameter
