"""X-LoRA's two passes around every call of the base model: predict the scalings, then run with them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.errors import RequestError
from loraplex.layers.base.decoder import find_decoder
from loraplex.routing.gate_record import GateLog
from loraplex.routing.layer_gates import LayerGates
from loraplex.routing.rows import Route, RowRouting
from loraplex.routing.weight_provider import WeightProvider
from loraplex.xlora.two_pass.cache import PairedCache
from loraplex.xlora.two_pass.cache_probe import CacheUse
from loraplex.xlora.two_pass.gate_history import GateHistory
from loraplex.xlora.two_pass.mixture_batch import MixtureRows
from loraplex.xlora.two_pass.options import TwoPassOptions
from loraplex.xlora.two_pass.pass_routing import PassRouting
from loraplex.xlora.two_pass.speculation import SpeculationCounts, SpeculativeStep

# Drafts pay if at least so many steps have no wrong one: such a step saves a pass; in any other, the wrong rows are run
# once more, and the step was widened for nothing (benchmarks/xlora.py).
LEAST_RIGHT_STEPS = 0.25

# What the base model's decoder needs of a call's inputs in a scaling pass; all have one row a sequence.
_ROW_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
_OTHER_INPUTS = ("labels", "logits_to_keep", "past_key_values", "cache_position")  # that it doesn't need


class TwoPass:
    """The passes of one request batch that has mixtures.

    `before` and `after` stand around each call of the base model: before it, the scaling pass of the new tokens runs on
    the mixtures' rows alone, with a cache of its own, and the predicted scalings become the main pass's gates.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        mixture_rows: MixtureRows,
        routes: Sequence[Sequence[Route]],  # of the rows, without experts
        bank: WeightProvider,
        options: TwoPassOptions,
        *,
        cache_use: CacheUse,
        fast_decode: bool = False,
        gate_log: GateLog | None = None,
        around_scaling: Callable[[], AbstractContextManager[None]] = nullcontext,  # what else the pass runs outside of
    ) -> None:
        self._base = base
        decoder = find_decoder(base)
        assert decoder is not None, "mixtures are made for models with a decoder only"
        self._decoder = decoder
        self._cache_use = cache_use
        self._history: GateHistory | None = None  # of the call that runs now
        self._around_scaling = around_scaling
        self.mixture_rows = mixture_rows
        self._num_rows = len(routes)
        self.options = options
        main_routes = mixture_rows.main_routes(routes)
        scaling_routes = mixture_rows.scaling_routes()
        self._gates, self._pass_gates = LayerGates(), LayerGates()
        self._main = RowRouting(main_routes, bank, fast_decode=fast_decode, layer_gates=self._gates, gate_log=gate_log)
        self._both = RowRouting(
            main_routes + scaling_routes,
            bank,
            fast_decode=fast_decode,
            layer_gates=self._gates,
            empty_columns=1,
            gate_log=gate_log,
        )
        self._scaling = RowRouting(scaling_routes, bank, fast_decode=fast_decode, layer_gates=self._pass_gates)
        self._bank, self._fast_decode = bank, fast_decode
        self._base_routings: dict[int, RowRouting] = {}  # by number of sequences
        self.routing = PassRouting(self._main)
        self.collected: list[list[Tensor]] = [[] for _ in mixture_rows.groups]
        self.counts = SpeculationCounts()
        self._drafted: SpeculativeStep | None = None
        self.num_new_tokens = 0  # of the call that runs now
        self.captures_hidden = False
        self.captured: Tensor | None = None

    def new_cache(self) -> PairedCache:
        """An empty cache for both passes. Raises RequestError for a model that can't go on from one."""
        cache = PairedCache(self._base.config, self.mixture_rows.scaling_rows)
        if not self._cache_use.works:
            raise RequestError(
                f"mixtures keep keys and values of two passes, but {type(self._base).__name__} doesn't compute "
                "the same when it goes on from them. Pass use_cache=False."
            )
        return cache

    # Around the base model's call

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run what the main pass needs beforehand; returns the inputs to call the base model with."""
        unknown = [k for k, v in inputs.items() if isinstance(v, Tensor) and k not in (*_ROW_INPUTS, *_OTHER_INPUTS)]
        if unknown:
            raise RequestError(
                f"the base model is given {', '.join(unknown)}, but the scaling pass of a mixture sees tokens only. "
                "Use plain adapters for rows with images or other inputs."
            )
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        copies = tokens.shape[0] // self._num_rows
        cache = self._cache(inputs)
        if cache is not None:
            inputs["past_key_values"] = cache
            if cache.num_main == 0:
                cache.begin(tokens.shape[0], copies)
            self._history = self._history_of(cache)
        else:  # each pass runs all tokens again
            self.collected = [[] for _ in self.mixture_rows.groups]
        self.num_new_tokens = tokens.shape[1]
        if cache is not None and self._drafts(inputs, cache, copies):
            self._drafted = SpeculativeStep(self, cache)
            return self._drafted.before(inputs)
        if cache is not None:
            cache.drop_draft()
        hidden = self.scaling_hidden(inputs, cache, copies)
        self.set_gates(hidden, copies)
        if cache is not None:
            cache.show_main()
        return inputs

    def after(self, inputs: dict[str, Any], output: Any) -> Any:
        """Count the tokens that the main pass wrote; returns the main sequences' output."""
        cache = inputs.get("past_key_values")
        if self._drafted is not None:
            output = self._drafted.after(output)
            self._drafted = None
        if cache is not None:
            cache.main_length += self.num_new_tokens
            cache.show_main()
        return output

    # The passes

    def scaling_hidden(self, inputs: dict[str, Any], cache: PairedCache | None, copies: int) -> Tensor:
        """Run the scaling pass of a call's new tokens; returns [scaling sequences, tokens, hidden]."""
        rows = self._sequences(copies)
        part = {name: _rows_of(name, inputs[name], rows) for name in _ROW_INPUTS if inputs.get(name) is not None}
        if cache is None:
            return self.run_scaling(part, None)
        cache.show_scaling()
        hidden = self.run_scaling(part, cache)
        cache.scaling_length += hidden.shape[1]
        return hidden

    def run_scaling(self, part: dict[str, Any], cache: PairedCache | None, *, subset: bool = False) -> Tensor:
        """Run the decoder on scaling sequences; `subset`: on some of them, which are then the base model's."""
        tokens = part["input_ids"] if part.get("input_ids") is not None else part["inputs_embeds"]
        num_sequences, num_tokens = tokens.shape[:2]
        if not subset:
            num_past = 0 if cache is None else cache.get_seq_length()
            self._set_pass_gates(num_sequences // len(self.mixture_rows.scaling_rows), num_past + num_tokens)
        with (
            self._routed(self._base_rows(num_sequences) if subset else self._scaling),
            torch.no_grad(),
            self._around_scaling(),
        ):
            output = self._decoder(**part, past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state

    def set_gates(self, hidden: Tensor, copies: int) -> None:  # [scaling sequences, tokens, hidden]
        """Predict the scalings from the scaling pass's hidden states and make them the main pass's gates."""
        by_row = hidden.unflatten(0, (-1, copies))  # [scaling rows, copies, tokens, hidden]
        gates = []
        for i, group in enumerate(self.mixture_rows.groups):
            scalings = group.mixture.head(by_row[list(group.scaling_rows)])
            if self.options.collect:
                self.collected[i].append(scalings.detach())
            gates.append(group.mixture.gates(scalings, group.weights))
        values = gates[0] if len(gates) == 1 else torch.cat(gates, dim=1)
        self._gates.set(values, None if self._history is None else self._history.append(values))

    def run_both(self) -> None:
        """Let the base model's call that follows run main and scaling sequences as one batch."""
        self._both.begin_pass(*self.routing.last_pass)
        self.routing.now = self._both
        self.captures_hidden = True

    def end_both(self) -> Tensor:  # [main + scaling sequences, tokens, hidden]
        """Return to main passes; returns the last hidden states of the call."""
        self.routing.now = self._main
        self.captures_hidden = False
        assert self.captured is not None, "the base model's decoder was not called"
        hidden, self.captured = self.captured, None
        return hidden

    def guess(self, hidden: Tensor) -> Tensor:  # [sequences, hidden] -> [sequences]
        """The base model's most likely next tokens."""
        with self._routed(self._base_rows(len(hidden))), torch.no_grad():
            return self._base.get_output_embeddings()(hidden.unsqueeze(1))[:, 0].argmax(dim=-1)

    def _base_rows(self, num_sequences: int) -> RowRouting:
        if num_sequences not in self._base_routings:
            rows: list[list[Route]] = [[] for _ in range(num_sequences)]
            self._base_routings[num_sequences] = RowRouting(rows, self._bank, fast_decode=self._fast_decode)
        return self._base_routings[num_sequences]

    @contextmanager
    def _routed(self, routing: RowRouting) -> Iterator[None]:
        """Let the layers follow another routing than the main pass's inside the block."""
        self.routing.now = routing
        try:
            yield
        finally:
            self.routing.now = self._main

    def _set_pass_gates(self, copies: int, num_tokens: int) -> None:
        if self.mixture_rows.pass_is_base:
            return
        gates = [group.mixture.pass_gates(len(group.uses), copies, num_tokens) for group in self.mixture_rows.groups]
        self._pass_gates.set(torch.cat(gates, dim=1))

    # Choices

    def _cache(self, inputs: dict[str, Any]) -> PairedCache | None:
        cache, use_cache = inputs.get("past_key_values"), inputs.get("use_cache")
        if isinstance(cache, PairedCache):
            if cache.scaling_rows != self.mixture_rows.scaling_rows:
                raise RequestError(
                    f"this cache belongs to a batch with mixtures on the rows {list(cache.scaling_rows)}, but now they "
                    f"are on {list(self.mixture_rows.scaling_rows)}. Pass the adapters that it was made with."
                )
            return cache
        if cache is not None:
            raise RequestError(
                f"past_key_values is a {type(cache).__name__}, but a batch with mixtures needs the cache that its "
                "first pass returned. Leave it out at first, and then pass out.past_key_values."
            )
        if use_cache is None:  # what nobody asked for is no reason to refuse a model that can't go on from a cache
            is_default = getattr(self._base.config.get_text_config(decoder=True), "use_cache", False)
            use_cache = is_default and self._cache_use.works
        return self.new_cache() if use_cache and not torch.is_grad_enabled() else None

    def _history_of(self, cache: PairedCache) -> GateHistory | None:
        """The gates of the cache's tokens, where modules with experts see these again."""
        modules = {module for group in self.mixture_rows.groups for module in group.mixture.modules}
        if not modules & self._cache_use.sees_past:
            return None
        known = next((follower for follower in cache.followers if isinstance(follower, GateHistory)), None)
        if known is None:
            known = GateHistory(self.mixture_rows.column_rows)
            cache.followers.append(known)
        return known

    def _drafts(self, inputs: dict[str, Any], cache: PairedCache, copies: int) -> bool:
        can_draft = (
            self.mixture_rows.pass_is_base
            and self.num_new_tokens == 1
            and cache.main_length > 0
            and copies == 1
            and inputs.get("input_ids") is not None
            and inputs.get("position_ids") is not None
            and inputs["position_ids"].ndim == 2
            and (inputs.get("attention_mask") is None or inputs["attention_mask"].ndim == 2)
            and inputs.get("return_dict", True)
            and not inputs.get("output_hidden_states")
            and not inputs.get("output_attentions")
            and not torch.is_grad_enabled()
        )
        if self.options.draft is not None:
            return can_draft and self.options.draft
        return can_draft and self.counts.rate ** len(self.mixture_rows.scaling_rows) >= LEAST_RIGHT_STEPS

    def _sequences(self, copies: int) -> Tensor:  # [scaling sequences]
        rows = torch.tensor(self.mixture_rows.scaling_rows).unsqueeze(1) * copies + torch.arange(copies)
        return rows.flatten()


def _rows_of(name: str, value: Any, rows: Tensor) -> Any:
    if isinstance(value, dict):  # masks by layer type
        return {key: _rows_of(name, part, rows) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    # Positions of images and videos have several numbers a token, [numbers, rows, tokens].
    dim = 1 if name == "position_ids" and value.ndim == 3 else 0
    return value.index_select(dim, rows.to(value.device))
