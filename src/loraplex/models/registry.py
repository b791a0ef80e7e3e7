"""Everything that a row can name: adapters, mixtures of them, residuals. One name is one thing."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.fit import check_fits, check_parameters, check_shapes_fit, check_weights
from loraplex.adapters.names import check_name
from loraplex.adapters.peft.hub import resolve_adapter_folder
from loraplex.adapters.peft.reader import content_shapes, read_adapter
from loraplex.adapters.prompt_centroid import PromptCentroid, read_centroid, write_centroid
from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.slots import Slots
from loraplex.adapters.store.store import AdapterStore, StoreConfig
from loraplex.adapters.store.version import folder_fingerprint
from loraplex.adapters.vocabulary import Vocabulary, read_vocabulary
from loraplex.adapters.weights import Adapter, ModuleShape
from loraplex.errors import AdapterExistsError, AdapterFormatError, RequestError, UnsupportedAdapterError
from loraplex.json_files import damaged_as
from loraplex.layers.adapter_start import check_start, without_start
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.own_weights.own_weights import OwnWeights
from loraplex.layers.prepare import prepare_adapter
from loraplex.models.auto.selection import AutoIndex, check_centroid
from loraplex.models.checkpoints.quantized_base import tell_other_precision
from loraplex.models.former_experts import with_stacked_experts, with_stacked_shapes
from loraplex.models.mixture_folders import Experts, expert_at_rest, expert_sources, save_mixture
from loraplex.models.mixtures import Mixtures
from loraplex.models.scope import CachedIds
from loraplex.residual.modules import Residual
from loraplex.residual.positions import Positions
from loraplex.residual.registry import LinkedAttention
from loraplex.residual.rows import ChainLink
from loraplex.residual.sources import is_residual_source
from loraplex.routers.config import ArrowConfig, RouterConfig
from loraplex.routers.folder import RouterFolder, is_router_folder, read_router_folder
from loraplex.routers.general_knowledge import without_general
from loraplex.routing.adapter_spec import Link
from loraplex.routing.weight_provider import SlotWeightProvider
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.formats.mixture_folder import Layout


class Registry:
    """The adapters, mixtures and residuals of one base model. A refused call changes nothing."""

    def __init__(self, base: PreTrainedModel, config: StoreConfig) -> None:
        self._base = base
        self.adaptable = AdaptableModel(base)
        self._own_weights = OwnWeights(base, self.adaptable)
        shapes = self.adaptable.shapes.items()
        stacked = {path: shape.num_experts for path, shape in shapes if shape.kind == "moe experts"}
        slots = Slots(config.num_slots, self.adaptable.paths, base.device, num_experts=stacked)
        self.bank = SlotWeightProvider(slots)
        self.store = AdapterStore(slots, self._read_again, self._prepare, config)
        self.mixtures = Mixtures(base, self.adaptable, self.store)
        self.linked = LinkedAttention(base, self.adaptable)
        self.auto = AutoIndex()
        self.cached_ids = CachedIds()

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted([*self.store.names(), *self.mixtures.names(), *self.linked.names()])

    def load_adapter(
        self,
        name: str,
        source: str | Path | Adapter,
        *,
        replace: bool = False,
        revision: str | None = None,
        ignore_unknown: bool = False,
    ) -> None:
        """Register a LoRA from a folder, a hub id or memory; a folder with a residual adapter as that."""
        check_name(name)
        if name in self.mixtures:
            self.mixtures.check_new(name)
        if isinstance(source, str | Path):
            with damaged_as(AdapterFormatError, source):
                is_residual = is_residual_source(source)
            if is_residual:
                self.load_residual(name, source, replace=replace)
                return
        self.linked.check_free(name)
        if name in self.store and not replace:  # before reading files; the store checks again under its lock
            raise AdapterExistsError(
                f"adapter {name!r} is loaded already. Pass replace=True to load a new version, or choose another name."
            )
        folder, fingerprint, centroid = None, None, None
        if isinstance(source, Adapter):
            adapter = source
            check_weights(adapter)
            check_start(adapter.config, {path: weights.shape for path, weights in adapter.layers.items()})
            self._own_weights.check(adapter.config, content_shapes(adapter))
        else:
            with damaged_as(AdapterFormatError, source):
                folder = resolve_adapter_folder(source, revision=revision).absolute()
                # before reading: a file that changes meanwhile counts as changed
                fingerprint = folder_fingerprint(folder)
            layout = self.adaptable.layout
            adapter = read_adapter(
                folder,
                check_shapes=self._check_shapes,
                check_contents=self._own_weights.check,
                layout=layout,
                ignore_unknown=ignore_unknown,
            )
            centroid = self._centroid(name, folder)
        adapter = with_stacked_experts(self._base, self.adaptable.shapes, adapter)
        self._check_adapter(name, adapter)
        vocabulary = self._vocabulary(adapter, folder)
        kept = without_start(adapter, self.adaptable.modules)
        if kept is not adapter:  # what took so long to compute isn't computed again when it is read back
            adapter, folder = kept, None
        # First the layers, which do nothing without adapters: a request may use the name once the store knows it.
        self.adaptable.attach(adapter.layers)
        self.adaptable.attach_changes(self._own_weights.touched(adapter))
        self.store.add(name, adapter, folder, replace=replace, fingerprint=fingerprint, vocabulary=vocabulary)
        self.auto.set(name, centroid if vocabulary is None else None)  # a prompt is read with the base model's tokens

    def _centroid(self, name: str, folder: Path) -> PromptCentroid | None:
        """What a folder tells about its prompts. Raises AdapterFormatError or BaseModelMismatchError."""
        with damaged_as(AdapterFormatError, folder):
            centroid = read_centroid(folder)
        if centroid is not None:
            check_centroid(centroid, self.mixtures.hidden_size, name)
        return centroid

    def set_centroid(self, name: str, centroid: PromptCentroid | None, *, save: bool = False) -> None:
        """Let `auto` choose an adapter or mixture by this centroid; None: no longer. `save`: in its folder, too.

        Raises what `check_choosable` raises, BaseModelMismatchError, RequestError (no folder) or OutputError.
        """
        self.check_choosable(name)
        if centroid is not None:
            check_centroid(centroid, self.mixtures.hidden_size, name)
        if save and centroid is not None:
            folder = None if name in self.mixtures else self.store.version(name).folder
            if folder is None:
                raise RequestError(
                    f"{name!r} has no folder of its own to save its prompt centroid in: it is a mixture or came from "
                    "memory. Save it, and make the centroid with `loraplex auto fit` for that folder."
                )
            write_centroid(centroid, folder)
        self.auto.set(name, centroid)

    def check_choosable(self, name: str) -> None:
        """Raise AdapterNotFoundError, or UnsupportedAdapterError, for what `auto` can't choose."""
        if name in self.linked:
            raise UnsupportedAdapterError(f"{name!r} is a residual, and `auto` chooses adapters and mixtures. Name it.")
        if name not in self.mixtures:
            version = self.store.version(name)
            if version.vocabulary is not None:
                raise UnsupportedAdapterError(
                    f"{name!r} has tokens of its own, and `auto` reads prompts with the base model's. Name it."
                )

    def _check_adapter(self, name: str, adapter: Adapter) -> None:
        """Raise unless an adapter fits the base model, and the mixtures that have this name as an expert."""
        check_parameters(adapter.config, self._parameter_names(), self.adaptable.shapes)
        check_fits(adapter, self.adaptable.shapes, output_module=self.adaptable.output_module)
        self._check_alora(adapter)
        self.adaptable.check(adapter.layers)
        changed = self._own_weights.changes(adapter, self._base.dtype).keys() if self.mixtures.using(name) else ()
        self.mixtures.check_replaceable(name, adapter.layers.keys(), changed, is_dora=adapter.config.use_dora)
        tell_other_precision(adapter.config.base_model_name_or_path, self._base)

    def load_residual(
        self,
        name: str,
        source: str | Path | Residual,
        *,
        replace: bool = False,
        layers: Iterable[int] | None = None,
        positions: str | Positions | None = None,
    ) -> None:
        """Register a residual from a folder or file or from memory."""
        check_name(name)
        if name in self.mixtures or name in self.store:
            self.mixtures.check_new(name)
        self.linked.add(name, source, replace=replace, layers=layers, positions=positions)

    def create_mixture(
        self, name: str, experts: Sequence[str], config: XLoraConfig | RouterConfig, *, seed: int
    ) -> None:
        """Make a mixture of loaded adapters; a scaling head or a linear router is random."""
        self._check_new_mixture(name)
        if isinstance(config, XLoraConfig):
            self.mixtures.add(name, experts, config, seed=seed)
        elif isinstance(config, ArrowConfig) and config.general_experts:
            self._create_purified(name, experts, config, seed)
        else:
            self.mixtures.add_routed(name, experts, config, seed=seed)

    def _create_purified(self, name: str, experts: Sequence[str], config: ArrowConfig, seed: int) -> None:
        """Make a mixture of the experts less the general ones, which are adapters of their own: "NAME/EXPERT"."""
        made = without_general(
            {expert: self._factors_of(expert) for expert in experts},
            {expert: self._factors_of(expert) for expert in config.general_experts},
        )
        with self._loaded({f"{name}/{expert}": adapter for expert, adapter in made.items()}) as loaded:
            self.mixtures.add_routed(name, loaded, config, seed=seed, owned=loaded)

    def _factors_of(self, name: str) -> Adapter:
        found = expert_at_rest(self.store.version(name))
        return found if isinstance(found, Adapter) else self._read_again(found)

    def load_mixture(self, name: str, folder: Path, experts: Experts) -> None:
        """Read a mixture's folder, load its experts, and register it; what was loaded goes again if that fails."""
        self._check_new_mixture(name)
        centroid = self._centroid(name, folder)
        from_elsewhere = isinstance(experts, Mapping)
        if is_router_folder(folder):
            self._load_routed(name, read_router_folder(folder, find_experts=not from_elsewhere), experts)
            self.auto.set(name, centroid)
            return
        found = read_mixture_folder(
            folder,
            find_experts=not from_elsewhere,
            check=self.mixtures.check_head_size,
            order=None if experts is None else tuple(experts),
        )
        sources = expert_sources(name, found.experts, found.expert_names, experts)
        with self._loaded(sources) as loaded:
            self.mixtures.add(
                name,
                list(sources),
                found.config,
                head=found.head,
                hidden_size=found.hidden_size,
                layers=found.layers,
                owned=() if from_elsewhere else loaded,
            )
        self.auto.set(name, centroid)

    def _load_routed(self, name: str, found: RouterFolder, experts: Experts) -> None:
        sources = expert_sources(name, found.experts, tuple(found.experts), experts)
        with self._loaded(sources) as loaded:
            owned = () if isinstance(experts, Mapping) else loaded
            self.mixtures.add_routed(name, list(sources), found.config, read_router=found.read_router, owned=owned)

    @contextmanager
    def _loaded(self, sources: Mapping[str, str | Path | Adapter | None]) -> Iterator[list[str]]:
        """Load what isn't there yet; if the block fails, it goes again."""
        loaded: list[str] = []
        try:
            for expert, source in sources.items():
                if source is not None:
                    self.load_adapter(expert, source)
                    loaded.append(expert)
            yield loaded
        except BaseException:
            for expert in loaded:
                self.store.remove(expert)
            self.auto.forget(loaded)
            raise

    def save_mixture(self, name: str, folder: Path, *, layout: Layout | None, overwrite: bool) -> None:
        """Write a mixture and its experts."""
        save_mixture(
            self.mixtures.get(name),
            self.store,
            folder,
            layout=layout,
            base_model_name=_shared_name(self._base.config.name_or_path),
            overwrite=overwrite,
        )

    def end_tokens(self, links: Sequence[Link]) -> list[tuple[int, ...]]:
        """By row, the tokens that end the answers of its link's adapters, besides the base model's."""
        others, chains = self.linked.split(links)
        return [self._ends_of(link, chain) for link, chain in zip(others, chains, strict=True)]

    def _ends_of(self, link: Link, chain: Sequence[ChainLink]) -> tuple[int, ...]:
        _, names = self.mixtures.expand([link])
        ends = [token for name in names for token in self.store.version(name).end_tokens]
        ends += [token for member in chain for token in getattr(member.residual, "end_tokens", ())]
        return tuple(dict.fromkeys(ends))

    def vocabulary(self, link: Link) -> Vocabulary | None:
        """The tokens of a row's link; None: the base model's.

        Raises AdapterNotFoundError, and RequestError for adapters whose tokens differ.
        """
        (others,), _ = self.linked.split([link])
        _, names = self.mixtures.expand([others])
        versions = [self.store.version(name) for name in dict.fromkeys(names)]
        found = [(version.name, version.vocabulary) for version in versions if version.vocabulary is not None]
        for name, vocabulary in found[1:]:
            first_name, first = found[0]
            if vocabulary.identity != first.identity:
                raise RequestError(
                    f"the link joins {first_name!r} and {name!r}, whose tokens differ ({first.num_tokens} and "
                    f"{vocabulary.num_tokens} rows of the embedding, or other tokenizers): one text can't be both's. "
                    "Use them in rows of their own."
                )
        return found[0][1] if found else None

    def _vocabulary(self, adapter: Adapter, folder: Path | None) -> Vocabulary | None:
        """Of an adapter that brings rows of the embedding. Raises what `read_vocabulary` raises."""
        if not self._own_weights.brings_tokens(adapter):
            return None
        num_tokens = self._own_weights.vocabulary_size(adapter) or self.num_tokens
        return read_vocabulary(folder, num_tokens, num_base=self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """Of the base model's embedding."""
        return int(next(self._base.get_input_embeddings().parameters()).shape[0])

    def unload(self, name: str) -> None:
        """Forget what has this name. Raises AdapterNotFoundError, or MixtureError for an expert in use."""
        known = set(self.names())
        if name in self.mixtures:
            self.mixtures.remove(name)
        elif name in self.linked:
            self.linked.remove(name)
        else:
            self.mixtures.check_unloadable(name)
            self.store.remove(name)
        self.auto.forget(known - set(self.names()))

    def detach(self) -> None:
        """Give the base model back as it was."""
        self.linked.detach()
        self.adaptable.detach()

    def _check_new_mixture(self, name: str) -> None:
        self.mixtures.check_new(name)
        self.linked.check_free(name)

    def _check_alora(self, adapter: Adapter) -> None:
        if adapter.config.alora_invocation_tokens is not None and getattr(
            self._base.config, "is_encoder_decoder", False
        ):
            raise UnsupportedAdapterError(
                f"alora_invocation_tokens can't be honoured on {type(self._base).__name__}: an aLoRA is active from "
                "its invocation on, which is a place in the one sequence of a decoder. Use a LoRA on this model."
            )

    def _check_shapes(self, config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> None:
        config, shapes = with_stacked_shapes(self._base, self.adaptable.shapes, config, shapes)
        check_parameters(config, self._parameter_names(), self.adaptable.shapes)
        check_shapes_fit(config, shapes, self.adaptable.shapes, output_module=self.adaptable.output_module)
        check_start(config, shapes)

    def _read_again(self, folder: Path) -> Adapter:
        """An adapter that was read before: its unknown settings were accepted then."""
        adapter = read_adapter(
            folder,
            check_finite=False,
            check_contents=self._own_weights.check,
            layout=self.adaptable.layout,
            ignore_unknown=True,
        )
        return with_stacked_experts(self._base, self.adaptable.shapes, adapter)

    def _parameter_names(self) -> list[str]:
        return [name for name, _ in self._base.named_parameters(remove_duplicate=False)]

    def _prepare(self, adapter: Adapter) -> PreparedAdapter:
        prepared = prepare_adapter(adapter, self.adaptable.modules, self.adaptable.module_index, self._base.dtype)
        return dataclasses.replace(prepared, changes=self._own_weights.changes(adapter, self._base.dtype))


def _shared_name(name_or_path: str | None) -> str | None:
    """A hub id as it is; of a local folder the last part: the path means nothing on another machine."""
    if not name_or_path:
        return None
    return Path(name_or_path).name if os.path.isdir(name_or_path) else name_or_path
