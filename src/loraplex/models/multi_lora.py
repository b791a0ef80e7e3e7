"""MultiLoraModel: a frozen transformers model whose batch rows each go through their own adapters."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from loraplex.adapters.peft.hub import resolve_mixture_folder
from loraplex.adapters.store.store import AdapterStore, StoreConfig
from loraplex.adapters.store.version import AdapterState
from loraplex.adapters.weights import Adapter
from loraplex.errors import BaseModelError
from loraplex.kernels.dispatch import native_runs
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.attention.fast_decode import FAST_DECODE
from loraplex.layers.attention.interface import AttentionHandle
from loraplex.layers.rows.images import join_image_rows
from loraplex.layers.rows.positions import join_positions
from loraplex.models.auto.rows import choose_rows, chosen_specs, learn_prompts
from loraplex.models.auto.selection import DEFAULT_FLOOR, AutoChoice, Candidates
from loraplex.models.call import Call
from loraplex.models.checkpoints.loading import load_base_model, load_tokenizer, refuse_injected_adapters
from loraplex.models.checkpoints.quantized_base import check_quantized_base
from loraplex.models.generate_checks import check_generates
from loraplex.models.mixture_folders import Experts
from loraplex.models.mixtures import Mixtures
from loraplex.models.registry import Registry
from loraplex.models.running import CallRunner
from loraplex.residual.modules import Residual
from loraplex.residual.positions import Positions
from loraplex.residual.registry import AttentionRequest
from loraplex.routers.config import RouterConfig
from loraplex.routing.adapter_spec import AdapterSpec, is_auto, parse_adapter_spec
from loraplex.threads import workers_given_back
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.mixture_folder import Layout
from loraplex.xlora.scalings.log import ScalingsLog
from loraplex.xlora.two_pass.options import TwoPassOptions
from loraplex.xlora.two_pass.speculation import SpeculationCounts


class MultiLoraModel:
    """One frozen base model and any number of adapters, in one forward pass.

    `adapters=` has one entry for each row: None for the base model, "name", a link "a:0.7+b:0.3", a list of
    (name, weight) pairs, or "auto" for what the row's prompt is nearest to (`fit_auto`). The base model's parameters
    are frozen and never changed.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        source: str | Path | None = None,
        store: StoreConfig | None = None,
        fast_decode: bool = True,
    ) -> None:
        refuse_injected_adapters(base)
        check_quantized_base(base)
        self.base = base.eval().requires_grad_(False)
        self._source = source
        self.dtype = base.dtype
        self.registry = Registry(base, store or StoreConfig())
        self.scalings_log = ScalingsLog()
        self.draft_counts = SpeculationCounts()  # of all calls so far
        self.adaptable.attach_output()
        self.adaptable.attach_once("row positions", lambda: join_positions(base))
        self.adaptable.attach_once("images", lambda: join_image_rows(base, self.adaptable.unseen))
        self._fast_decode = fast_decode and native_runs(base.device, self.dtype)
        self._runner = CallRunner()
        self._front: AttentionHandle | None = None
        if self._fast_decode:
            self.adaptable.attach_all_plain_linears()
            self._front = AttentionHandle(base, FAST_DECODE)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        store: StoreConfig | None = None,
        fast_decode: bool = True,
        weights: str = "auto",
        quantization_config: Any = None,
        gguf_file: str | None = None,
    ) -> "MultiLoraModel":
        """Load a base model: "smollm2-135m", a local folder, a GGUF file, or a hub id. Raises BaseModelError.

        `fast_decode` lets `generate` run in packed passes (see there) and compute single-token steps of plain linear
        modules in the compiled CPU kernel: equal to torch's product up to rounding, and independent of a row's
        neighbours to the bit. `forward` always computes the base product with torch.

        `weights="int8"` holds the linear weights as 8-bit integers, which takes half the memory and changes what the
        model computes. For bfloat16 on a CPU. All products, those of `forward` and of training too, then run in the
        compiled kernel.

        `quantization_config` is transformers' BitsAndBytesConfig or TorchAoConfig: the weights are quantized when they
        are loaded. A checkpoint that is quantized already needs none. `gguf_file` names a GGUF file in the folder or of
        the hub id; its weights are dequantized to `dtype` (float32 for "auto"), or with `weights="int8"` held as they
        are.
        """
        base, source = load_base_model(
            path_or_id,
            dtype=dtype,
            device=device,
            weights=weights,
            quantization_config=quantization_config,
            gguf_file=gguf_file,
        )
        return cls(base, source=source, store=store, fast_decode=fast_decode)

    @property
    def source(self) -> str | Path | None:
        """The folder or hub id of the base model; None for one that was given as a transformers model alone."""
        return self._source

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        if self._source is None:
            raise BaseModelError(
                "this model was made from a transformers model in memory, so no tokenizer is known. Use "
                "MultiLoraModel.from_pretrained(path), or MultiLoraModel(base, source=path)."
            )
        return load_tokenizer(self._source)

    def tokenizer_of(self, adapters: AdapterSpec) -> PreTrainedTokenizerBase:
        """The tokenizer of a row's text: that of an adapter which brings tokens of its own, else the base model's.

        Raises LinkSyntaxError, AdapterNotFoundError, or RequestError for a link of adapters with different tokens.
        """
        vocabulary = None if is_auto(adapters) else self.registry.vocabulary(parse_adapter_spec(adapters))
        own = None if vocabulary is None else vocabulary.tokenizer
        return self.tokenizer if own is None else own

    def encode_chat(self, prompts: Sequence[str | Sequence[Mapping[str, str]]]) -> BatchEncoding:
        """Each prompt, a user's turn or the messages of a chat, in the model's chat template, on its device.

        `input_ids` and `attention_mask` [rows, tokens], padded on the left, up to where the answers start: what
        `generate` and a call of the model take. Raises BatchError for no prompts, and RequestError if the tokenizer has
        no chat template.
        """
        from loraplex.models.text.prompts import encode_prompts  # which imports this module

        return encode_prompts(self.tokenizer, prompts).to(self.base.device)

    @property
    def decodes_fast(self) -> bool:
        """Whether single-token steps run base products and adapters in the compiled kernel."""
        return self._fast_decode

    @property
    def adaptable(self) -> AdaptableModel:
        """The base model's modules that adapters can reach."""
        return self.registry.adaptable

    @property
    def store(self) -> AdapterStore:
        """The adapters' tiers."""
        return self.registry.store

    @property
    def mixtures(self) -> Mixtures:
        """The loaded mixtures."""
        return self.registry.mixtures

    # Adapters, mixtures, residuals

    @workers_given_back()
    def load_adapter(
        self,
        name: str,
        source: str | Path | Adapter,
        *,
        replace: bool = False,
        revision: str | None = None,
        ignore_unknown: bool = False,
    ) -> None:
        """Load a LoRA in PEFT format from a folder or hub id, or one from memory, under `name`.

        Everything is checked before anything changes: raises AdapterExistsError (unless `replace`),
        NameFormatError, AdapterFormatError, UnsupportedAdapterError, BaseModelMismatchError, MixtureError or
        CapacityError, and then what is loaded stays as it was. Running requests finish with the version they started
        with. A folder that holds a residual adapter is loaded as by `load_residual`.

        `ignore_unknown` leaves out settings of adapter_config.json that aren't known, with a warning: they may change
        what the adapter computes, so that by default they are refused.
        """
        self.registry.load_adapter(name, source, replace=replace, revision=revision, ignore_unknown=ignore_unknown)

    @workers_given_back()
    def load_residual(
        self,
        name: str,
        source: str | Path | Residual,
        *,
        replace: bool = False,
        layers: Iterable[int] | None = None,
        positions: str | Positions | None = None,
    ) -> None:
        """Load a residual under `name`: a folder, a control vector (.gguf), or one from memory.

        A folder is one of loraplex's own, of PEFT's IA3, or of pyreft's interventions. `layers` keeps those of a vector
        or of interventions alone (`range(10, 20)`); `positions` puts them on other tokens: "all", "prompt",
        "generated", or the first and last of the prompt, such as "f7+l7".
        """
        self.registry.load_residual(name, source, replace=replace, layers=layers, positions=positions)

    @workers_given_back()
    def create_mixture(
        self, name: str, experts: Sequence[str], config: XLoraConfig | RouterConfig | None = None, *, seed: int = 0
    ) -> None:
        """Make a mixture of loaded adapters. XLoraConfig (None): its scaling head has random weights; train it first.

        ArrowConfig, SpectrConfig, LinearRouterConfig and StaticRouterConfig make mixtures that need no second pass:
        each LoRA layer gates the experts by its own input. The weights of a linear router are random, from `seed`.

        Raises AdapterNotFoundError, AdapterExistsError, MixtureError, ConfigError or UnsupportedAdapterError.
        """
        self.registry.create_mixture(name, experts, config or XLoraConfig(), seed=seed)

    @workers_given_back()
    def load_mixture(self, name: str, folder: str | Path, *, experts: Experts = None) -> None:
        """Load an X-LoRA folder, PEFT's or the original package's, or one with a router, ours or PEFT's Arrow.

        Its experts come from the folder, as the adapters "NAME/EXPERT"; or `experts` gives them in head order: a folder
        or hub id to load each from, or None for an adapter that is loaded already. A list of names is for early folders
        of the original package, which hold the experts but don't say their order. Raises what `load_adapter` and
        `create_mixture` raise, and then what is loaded stays as it was.
        """
        self.registry.load_mixture(name, resolve_mixture_folder(folder).absolute(), experts)

    def configure_mixture(self, name: str, **settings: Any) -> None:
        """Change settings of XLoraConfig that leave the head's weights as they are, `top_k_lora=2` for example.

        Running requests go on with the settings that they began with. Raises AdapterNotFoundError or ConfigError.
        """
        self.mixtures.configure(name, settings)

    def save_mixture(
        self, name: str, folder: str | Path, *, layout: Layout | None = None, overwrite: bool = False
    ) -> None:
        """Write a mixture, experts included.

        An X-LoRA is written as a folder that PEFT ("peft", the default) or the original package ("xlora") reads, one
        with a router in loraplex's own format.
        """
        self.registry.save_mixture(name, Path(folder), layout=layout, overwrite=overwrite)

    # Adapters that are chosen by the prompt

    def fit_auto(
        self,
        prompts: Mapping[str, Sequence[str | Sequence[Mapping[str, str]]]],
        *,
        chat: bool = True,
        save: bool = False,
    ) -> None:
        """Let `adapters="auto"` choose each adapter or mixture named here, for prompts like these of it.

        Some ten examples are enough, 64 are the most that count: users' turns or messages of chats, or with
        `chat=False` texts as they are. `save` writes what is learnt into an adapter's folder, where `load_adapter`
        finds it again. Raises AdapterNotFoundError, RequestError or UnsupportedAdapterError before anything changes,
        and OutputError.
        """
        learn_prompts(self.base, self.registry, self.tokenizer, prompts, chat=chat, save=save)

    def choose_adapters(
        self,
        input_ids: Tensor,  # [rows, tokens]
        attention_mask: Tensor | None = None,
        *,
        candidates: Candidates = Candidates(),  # noqa: B008 (it is frozen)
        floor: float = DEFAULT_FLOOR,
    ) -> list[AutoChoice]:
        """For each prompt, what `adapters="auto"` stands for: the nearest adapter or mixture, or the base model.

        Raises RequestError where there is none and `candidates` leave the base model out, and ConfigError.
        """
        return choose_rows(self.base, self.registry, input_ids, attention_mask, candidates=candidates, floor=floor)

    def unload(self, name: str) -> None:
        """Forget an adapter, a residual, or a mixture with the experts that came with it.

        Running requests finish with it. Raises AdapterNotFoundError, or MixtureError for an adapter that a mixture
        needs.
        """
        self.registry.unload(name)

    def names(self) -> list[str]:
        """All loaded adapters, mixtures and residuals, sorted."""
        return self.registry.names()

    def adapters(self) -> list[AdapterState]:
        """Every adapter with its version, tier, size, and how many requests use it."""
        return self.store.states()

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter in its slot whatever else is used, or stop doing so."""
        self.store.pin(name, pinned)

    def prefetch(self, names: Sequence[str]) -> None:
        """Start reading adapters that were evicted to disk, in the background, for batches to come."""
        self.store.prefetch(names)

    def close(self) -> None:
        """Unload everything and give the base model back as it was: its modules, its attention, its hooks.

        Call it when nothing runs. Whoever uses the model again loads adapters again.
        """
        for name in [*self.mixtures.names(), *self.names()]:
            if name in self.names():  # a mixture takes its own experts along
                self.unload(name)
        self._fast_decode = False
        self._runner.close()
        if self._front is not None:
            self._front.remove()
        self.registry.detach()

    def __enter__(self) -> "MultiLoraModel":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Running

    def forward(
        self,
        input_ids: Tensor | None = None,  # [rows, tokens]
        attention_mask: Tensor | None = None,
        *,
        adapters: Sequence[AdapterSpec] | None = None,
        attention: AttentionRequest | None = None,
        return_scalings: bool = False,
        **model_inputs: Any,  # whatever else the base model's forward takes
    ) -> Any:
        """The base model's forward, every row through its own adapters; returns the base model's output.

        `attention` captures or steers attention by row and takes what was captured. With `return_scalings`, (output,
        scalings): for each row a tuple with the RowScalings of each of its mixtures. Raises BatchError,
        LinkSyntaxError, AdapterNotFoundError or CapacityError before anything runs.
        """
        call = Call(
            base=self.base,
            registry=self.registry,
            input_ids=input_ids,
            attention_mask=attention_mask,
            adapters=chosen_specs(self.base, self.registry, adapters, input_ids, attention_mask, model_inputs),
            inputs=model_inputs,
            options=TwoPassOptions(collect=return_scalings or self.scalings_log.is_enabled),
            attention=attention,
            generates=False,
        )
        return self._runner.run(self, call, self.base, return_scalings=return_scalings)

    __call__ = forward

    def generate(
        self,
        input_ids: Tensor | None = None,  # [rows, tokens]
        attention_mask: Tensor | None = None,
        *,
        adapters: Sequence[AdapterSpec] | None = None,
        attention: AttentionRequest | None = None,
        draft: bool | None = None,
        packed: bool | None = None,
        return_scalings: bool = False,
        **generation: Any,  # whatever else transformers' generate takes
    ) -> Any:
        """transformers' generate, every row through its own adapters: greedy, sampling or beam search.

        For rows with mixtures: `draft` runs the scaling pass of the token that the base model expects next beside the
        main pass, which gives the same tokens in less time (None: where that pays). `attention` and `return_scalings`
        as in `forward`.

        Greedy search and sampling choose their tokens as transformers does, from logits that the engine's packed passes
        compute: equal up to rounding, and in less time. The first such call compares these passes with the model's own,
        as an engine does when it starts. `packed=False` lets transformers' own loop run the model's own passes, as it
        does for whatever packed passes can't (None), or then raises RequestError, which says why (True).
        """
        num_rows = 1 if input_ids is None else len(input_ids)
        check_generates(self.base, num_rows, use_cache=generation.get("use_cache") is not False)
        collect = return_scalings or self.scalings_log.is_enabled
        call = Call(
            base=self.base,
            registry=self.registry,
            input_ids=input_ids,
            attention_mask=attention_mask,
            adapters=chosen_specs(self.base, self.registry, adapters, input_ids, attention_mask, generation),
            inputs=generation,
            options=TwoPassOptions(draft=draft, collect=collect),
            attention=attention,
            generates=True,
            fast_decode=self._fast_decode,
        )
        return self._runner.generate(self, call, packed=packed, return_scalings=return_scalings)
