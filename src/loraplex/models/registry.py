"""Everything that a row can name: adapters, mixtures of them, residuals. One name is one thing."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.fit import check_fits, check_shapes_fit, check_weights
from loraplex.adapters.names import check_name
from loraplex.adapters.peft.hub import resolve_adapter_folder
from loraplex.adapters.peft.reader import content_shapes, read_adapter
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
from loraplex.layers.own_weights import OwnWeights
from loraplex.layers.prepare import prepare_adapter
from loraplex.models.mixture_folders import expert_sources, save_mixture
from loraplex.models.mixtures import Mixtures
from loraplex.models.scope import CachedIds
from loraplex.residual.format import is_residual_folder
from loraplex.residual.modules import Residual
from loraplex.residual.registry import LinkedAttention
from loraplex.residual.rows import ChainLink
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
        slots = Slots(config.num_slots, self.adaptable.paths, base.device)
        self.bank = SlotWeightProvider(slots)
        self.store = AdapterStore(slots, self._read_again, self._prepare, config)
        self.mixtures = Mixtures(base, self.adaptable, self.store)
        self.linked = LinkedAttention(base)
        self.cached_ids = CachedIds()

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted([*self.store.names(), *self.mixtures.names(), *self.linked.names()])

    def load_adapter(
        self, name: str, source: str | Path | Adapter, *, replace: bool = False, revision: str | None = None
    ) -> None:
        """Register a LoRA from a folder, a hub id or memory; a folder with a residual adapter as that."""
        check_name(name)
        if name in self.mixtures:
            self.mixtures.check_new(name)
        if isinstance(source, str | Path):
            with damaged_as(AdapterFormatError, source):
                is_residual = is_residual_folder(source)
            if is_residual:
                self.load_residual(name, source, replace=replace)
                return
        self.linked.check_free(name)
        if name in self.store and not replace:  # before reading files; the store checks again under its lock
            raise AdapterExistsError(
                f"adapter {name!r} is loaded already. Pass replace=True to load a new version, or choose another name."
            )
        folder, fingerprint = None, None
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
            adapter = read_adapter(folder, check_shapes=self._check_shapes, check_contents=self._own_weights.check)
        self._check_adapter(name, adapter)
        vocabulary = self._vocabulary(adapter, folder)
        kept = without_start(adapter, self.adaptable.modules)
        if kept is not adapter:  # what took so long to compute isn't computed again when it is read back
            adapter, folder = kept, None
        # First the layers, which do nothing without adapters: a request may use the name once the store knows it.
        self.adaptable.attach(adapter.layers)
        self.adaptable.attach_changes(self._own_weights.touched(adapter))
        self.store.add(name, adapter, folder, replace=replace, fingerprint=fingerprint, vocabulary=vocabulary)

    def _check_adapter(self, name: str, adapter: Adapter) -> None:
        """Raise unless an adapter fits the base model, and the mixtures that have this name as an expert."""
        check_fits(adapter, self.adaptable.shapes, output_module=self.adaptable.output_module)
        self._check_alora(adapter)
        self.adaptable.check(adapter.layers)
        changed = self._own_weights.changes(adapter, self._base.dtype).keys() if self.mixtures.using(name) else ()
        self.mixtures.check_replaceable(name, adapter.layers.keys(), changed)

    def load_residual(self, name: str, source: str | Path | Residual, *, replace: bool = False) -> None:
        """Register a residual from a folder or from memory."""
        check_name(name)
        if name in self.mixtures or name in self.store:
            self.mixtures.check_new(name)
        self.linked.add(name, source, replace=replace)

    def create_mixture(self, name: str, experts: Sequence[str], config: XLoraConfig, *, seed: int) -> None:
        """Make a mixture of loaded adapters with a random head."""
        self._check_new_mixture(name)
        self.mixtures.add(name, experts, config, seed=seed)

    def load_mixture(self, name: str, folder: Path, experts: Mapping[str, str | Path | None] | None) -> None:
        """Read a mixture's folder, load its experts, and register it; what was loaded goes again if that fails."""
        self._check_new_mixture(name)
        found = read_mixture_folder(folder, find_experts=experts is None, check=self.mixtures.check_head_size)
        sources = expert_sources(name, found, experts)
        loaded: list[str] = []
        try:
            for expert, path in sources.items():
                if path is not None:
                    self.load_adapter(expert, path)
                    loaded.append(expert)
            owned = loaded if experts is None else ()
            self.mixtures.add(
                name, list(sources), found.config, head=found.head, hidden_size=found.hidden_size, owned=owned
            )
        except BaseException:
            for expert in loaded:
                self.store.remove(expert)
            raise

    def save_mixture(self, name: str, folder: Path, *, layout: Layout, overwrite: bool) -> None:
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
        if name in self.mixtures:
            self.mixtures.remove(name)
        elif name in self.linked:
            self.linked.remove(name)
        else:
            self.mixtures.check_unloadable(name)
            self.store.remove(name)

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
        check_shapes_fit(config, shapes, self.adaptable.shapes, output_module=self.adaptable.output_module)
        check_start(config, shapes)

    def _prepare(self, adapter: Adapter) -> PreparedAdapter:
        prepared = prepare_adapter(adapter, self.adaptable.modules, self.adaptable.module_index, self._base.dtype)
        return dataclasses.replace(prepared, changes=self._own_weights.changes(adapter, self._base.dtype))

    def _read_again(self, folder: Path) -> Adapter:
        return read_adapter(folder, check_finite=False, check_contents=self._own_weights.check)


def _shared_name(name_or_path: str | None) -> str | None:
    """A hub id as it is; of a local folder the last part: the path means nothing on another machine."""
    if not name_or_path:
        return None
    return Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path
