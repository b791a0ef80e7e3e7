"""MultiLoraModel: a frozen transformers model whose batch rows each go through their own adapters."""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.adapters.fit import check_base_copies, check_fits, check_weights
from loraplex.adapters.hub import resolve_adapter_folder
from loraplex.adapters.names import check_name
from loraplex.adapters.peft_folder import read_adapter, read_base_copies
from loraplex.adapters.slots import Slots
from loraplex.adapters.store import AdapterStore, StoreConfig
from loraplex.adapters.version import AdapterState, folder_fingerprint
from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterExistsError, BaseModelError, RequestError
from loraplex.kernels.dispatch import native_runs
from loraplex.layers.injection import AdaptableModel
from loraplex.layers.prepare import prepare_adapter
from loraplex.models.loading import load_base_model, load_tokenizer
from loraplex.models.mixture_folders import load_mixture, save_mixture
from loraplex.models.mixtures import Mixtures
from loraplex.models.scope import adapter_scope
from loraplex.routing.bank import SlotBank
from loraplex.routing.choice import RowChoice, parse_choices
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.drafts import DraftCounts
from loraplex.xlora.generation import end_tokens, prepare_generation
from loraplex.xlora.scalings.log import ScalingsLog
from loraplex.xlora.scalings.report import collected_scalings
from loraplex.xlora.scalings.row_scalings import RowScalings
from loraplex.xlora.two_pass import TwoPass, TwoPassOptions

logger = logging.getLogger(__name__)


class MultiLoraModel:
    """One frozen base model and any number of adapters, in one forward pass.

    `adapters=` has one entry for each row: None for the base model, "name", a link "a:0.7+b:0.3", or a list of
    (name, weight) pairs. The base model's parameters are frozen and never changed.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        source: str | Path | None = None,
        store: StoreConfig | None = None,
        fast_decode: bool = True,
    ) -> None:
        self.base = base.eval().requires_grad_(False)
        self._source = source
        self.adaptable = AdaptableModel(base)
        self.dtype = base.dtype
        slots = Slots((store or StoreConfig()).num_slots, self.adaptable.paths, base.device)
        self.store = AdapterStore(slots, self._read_again, self._prepare, store or StoreConfig())
        self.mixtures = Mixtures(base, self.adaptable, self.store)
        self.scalings_log = ScalingsLog()
        self.draft_counts = DraftCounts()  # of all calls so far
        self._bank = SlotBank(slots)
        self._fast_decode = fast_decode and native_runs(base.device, self.dtype)
        if self._fast_decode:
            self.adaptable.attach_all_plain_linears()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        store: StoreConfig | None = None,
        fast_decode: bool = True,
    ) -> "MultiLoraModel":
        """Load a base model: "smollm2-135m", a local folder, or a hub id. Raises BaseModelError.

        `fast_decode` lets `generate` compute single-token steps of plain linear modules in the compiled CPU kernel:
        equal to torch's product up to rounding, and independent of a row's neighbours to the bit. `forward` always
        computes the base product with torch.
        """
        base, source = load_base_model(path_or_id, dtype=dtype, device=device)
        return cls(base, source=source, store=store, fast_decode=fast_decode)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        if self._source is None:
            raise BaseModelError(
                "this model was made from a transformers model in memory, so no tokenizer is known. Use "
                "MultiLoraModel.from_pretrained(path), or MultiLoraModel(base, source=path)."
            )
        return load_tokenizer(self._source)

    # Adapters

    def load_adapter(
        self, name: str, source: str | Path | Adapter, *, replace: bool = False, revision: str | None = None
    ) -> None:
        """Load a LoRA in PEFT format from a folder or hub id, or one from memory, under `name`.

        Everything is checked before anything changes: raises AdapterExistsError (unless `replace`),
        NameFormatError, AdapterFormatError, UnsupportedAdapterError, BaseModelMismatchError or CapacityError, and
        then what is loaded stays as it was. Running requests finish with the version they started with.
        """
        check_name(name)
        if name in self.mixtures:
            self.mixtures.check_new(name)
        if name in self.store and not replace:  # before reading files; the store checks again under its lock
            raise AdapterExistsError(
                f"adapter {name!r} is loaded already. Pass replace=True to load a new version, or choose another name."
            )
        folder, fingerprint = None, None
        if isinstance(source, Adapter):
            adapter = source
            check_weights(adapter)
        else:
            folder = resolve_adapter_folder(source, revision=revision).absolute()
            fingerprint = folder_fingerprint(folder)  # before reading: a file that changes meanwhile counts as changed
            adapter = read_adapter(folder)
            check_base_copies(read_base_copies(folder), dict(self.base.named_parameters(remove_duplicate=False)))
        check_fits(adapter, self.adaptable.shapes, output_module=self.adaptable.output_module)
        self.mixtures.check_replaceable(name, adapter.layers.keys())
        # First the layers, which do nothing without adapters: a request may use the name once the store knows it.
        self.adaptable.attach(adapter.layers)
        self.store.add(name, adapter, folder, replace=replace, fingerprint=fingerprint)

    def unload(self, name: str) -> None:
        """Forget an adapter, or a mixture and the experts that came with it; running requests finish with it.

        Raises AdapterNotFoundError, or MixtureError for an adapter that a mixture needs.
        """
        if name in self.mixtures:
            self.mixtures.remove(name)
            return
        self.mixtures.check_unloadable(name)
        self.store.remove(name)

    def names(self) -> list[str]:
        """The loaded adapters and mixtures, sorted."""
        return sorted([*self.store.names(), *self.mixtures.names()])

    def adapters(self) -> list[AdapterState]:
        """Every adapter with its version, tier, size, and how many requests use it."""
        return self.store.states()

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter in its slot whatever else is used, or stop doing so."""
        self.store.pin(name, pinned)

    def prefetch(self, names: Sequence[str]) -> None:
        """Start reading adapters that were evicted to disk, in the background, for batches to come."""
        self.store.prefetch(names)

    # Mixtures

    def create_mixture(
        self, name: str, experts: Sequence[str], config: XLoraConfig | None = None, *, seed: int = 0
    ) -> None:
        """Make a mixture of loaded adapters, whose scaling head has random weights; train it before use.

        Raises AdapterNotFoundError, AdapterExistsError, MixtureError, ConfigError or UnsupportedAdapterError.
        """
        self.mixtures.add(name, experts, config or XLoraConfig(), seed=seed)

    def load_mixture(
        self, name: str, folder: str | Path, *, experts: Mapping[str, str | Path | None] | None = None
    ) -> None:
        """Load an X-LoRA folder, PEFT's or the original package's, under `name`.

        Its experts come from the folder, as the adapters "NAME/EXPERT"; or `experts` gives them in head order: a folder
        or hub id to load each from, or None for an adapter that is loaded already. Raises what `load_adapter` and
        `create_mixture` raise, and then what is loaded stays as it was.
        """
        load_mixture(self, name, folder, experts)

    def save_mixture(
        self, name: str, folder: str | Path, *, layout: Literal["peft", "xlora"] = "peft", overwrite: bool = False
    ) -> None:
        """Write a mixture, experts included, as a folder that PEFT or the original package reads."""
        save_mixture(self, name, folder, layout=layout, overwrite=overwrite)

    # Running

    def forward(
        self,
        input_ids: Tensor | None = None,  # [rows, tokens]
        attention_mask: Tensor | None = None,
        *,
        adapters: Sequence[RowChoice] | None = None,
        return_scalings: bool = False,
        **model_inputs: Any,  # whatever else the base model's forward takes
    ) -> Any:
        """The base model's forward, every row through its own adapters; returns the base model's output.

        With `return_scalings`, (output, scalings): for each row a tuple with the RowScalings of each of its mixtures.
        Raises BatchError, LinkSyntaxError, AdapterNotFoundError or CapacityError before anything runs.
        """
        options = TwoPassOptions(collect=return_scalings or self.scalings_log.is_enabled)
        with self._scope(input_ids, adapters, model_inputs, options) as two_pass:
            output = self.base(input_ids=input_ids, attention_mask=attention_mask, **model_inputs)
        if not options.collect:
            return output
        scalings = self._report(two_pass, input_ids, attention_mask, ends=(), wanted=return_scalings)
        return (output, scalings) if return_scalings else output

    __call__ = forward

    def generate(
        self,
        input_ids: Tensor | None = None,  # [rows, tokens]
        attention_mask: Tensor | None = None,
        *,
        adapters: Sequence[RowChoice] | None = None,
        draft: bool | None = None,
        refresh: int = 1,
        return_scalings: bool = False,
        **generation: Any,  # whatever else transformers' generate takes
    ) -> Any:
        """transformers' generate, every row through its own adapters: greedy, sampling or beam search.

        For rows with mixtures: `draft` runs the scaling pass of the token that the base model expects next beside the
        main pass, which gives the same tokens in less time (None: where that pays). `refresh` keeps scalings for so
        many new tokens; above 1 is approximate. `return_scalings` as in `forward`.
        """
        options = TwoPassOptions(draft=draft, refresh=refresh, collect=return_scalings or self.scalings_log.is_enabled)
        with self._scope(input_ids, adapters, generation, options, fast_decode=self._fast_decode) as two_pass:
            if two_pass is not None:
                prepare_generation(two_pass, self.base, generation)
            output = self.base.generate(input_ids, attention_mask=attention_mask, **generation)
        if two_pass is not None:
            self.draft_counts.add(two_pass.counts)
        if not options.collect:
            return output
        sequences = output if isinstance(output, Tensor) else output.sequences
        mask = torch.ones_like(input_ids) if attention_mask is None and input_ids is not None else attention_mask
        ends = end_tokens(self.base, generation)
        scalings = self._report(two_pass, sequences, mask, ends=ends, wanted=return_scalings)
        return (output, scalings) if return_scalings else output

    def _report(
        self,
        two_pass: TwoPass | None,
        tokens: Tensor | None,
        mask: Tensor | None,
        *,
        ends: Collection[int],
        wanted: bool,
    ) -> list[tuple[RowScalings, ...]]:
        """The rows' scalings, which the log gets too; what only the log wants is left out where there are none."""
        try:
            scalings = collected_scalings(two_pass, tokens, mask, ends)
        except RequestError:
            if wanted:
                raise
            return []
        self.scalings_log.record([entry for row in scalings for entry in row])
        return scalings

    def _scope(
        self,
        input_ids: Tensor | None,
        adapters: Sequence[RowChoice] | None,
        inputs: dict[str, Any],
        options: TwoPassOptions,
        *,
        fast_decode: bool = False,
    ) -> AbstractContextManager[TwoPass | None]:
        rows = input_ids if input_ids is not None else inputs.get("inputs_embeds")
        links = parse_choices(adapters, 0 if rows is None else rows.shape[0])
        if not any(links) and not fast_decode:
            return nullcontext()
        return adapter_scope(
            self.base,
            self.store,
            self.mixtures,
            self._bank,
            links,
            input_ids,
            fast_decode=fast_decode,
            options=options,
        )

    def _prepare(self, adapter: Adapter) -> Any:
        return prepare_adapter(adapter, self.adaptable.modules, self.adaptable.module_index, self.dtype)

    @staticmethod
    def _read_again(folder: Path) -> Adapter:
        return read_adapter(folder, check_finite=False)
