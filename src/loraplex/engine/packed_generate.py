"""`MultiLoraModel.generate` on the engine's packed passes: transformers' options and choice of tokens, our forward.

transformers prepares a call as ever (lengths, processors of logits, stopping criteria, copies of rows) and hands its
decoding loop over (`custom_generate`). What is computed for each row is what the engine computes: its own keys and
values without padding, decoder layers in one compiled call.
"""

import copy
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from loraplex.engine.config import EngineConfig
from loraplex.engine.request import Request
from loraplex.engine.sampling.detokenizer import Detokenizer
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sampling.sampler import Sampler
from loraplex.engine.sched.request_adapters import RequestAdapters
from loraplex.engine.sched.scheduler import TokenBudget, decode_chunks, is_decoding, prefill_chunks
from loraplex.engine.sched.sequence import RequestState, SequenceState
from loraplex.engine.startup.start import start_model_runner
from loraplex.engine.worker.model_runner import ModelRunner, ModelRunnerOutput
from loraplex.errors import BaseModelError, ConfigError
from loraplex.models.call import Call
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.routing.adapter_spec import Link
from loraplex.xlora.two_pass.speculation import SpeculationCounts

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# What `generate` takes besides the options of a GenerationConfig; anything else is for the base model's forward.
_ARGUMENTS = ("generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer")
_DEFAULT_NEW_TOKENS = 20  # transformers', where nothing tells a length


def pass_tokens(runner: ModelRunner) -> int:
    """Of prompts in one pass: as many as bring nearly all of this machine's speed (startup/step_tokens.py)."""
    assert runner.config.max_step_tokens is not None, "a runner starts without a size of passes"
    return runner.config.max_step_tokens


class PackedGenerator:
    """Runs one model's `generate` calls; its model runner is made at the first one. Safe to use from many threads."""

    def __init__(self, model: MultiLoraModel) -> None:
        self.model = model
        self._lock = threading.RLock()  # held for a step: the sequences of several calls take turns
        self._runner: ModelRunner | None = None
        self._made_for: tuple[object, ...] = ()  # the attention function, and where the weights lie
        self._refusal = ""  # why there is no runner
        self._num_promised = 0  # blocks of the calls that run

    def close(self) -> None:
        """Give the base model back as it was."""
        with self._lock:
            if self._runner is not None:
                self._runner.close()
            self._runner, self._made_for = None, ()

    def prepare(self, call: Call) -> "PackedCall | str":
        """The call, ready to run; or why it has to run in transformers' own loop.

        Raises what is wrong with the rows' adapters; then nothing has changed.
        """
        config = _merged(call)
        why = _unknown_option(call, config) or _unknown_row(call, self.model)
        if why is not None:
            return why
        with self._lock:
            runner = self._started()
            if runner is None:
                return self._refusal
            max_length = _max_length(config, call.input_ids.shape[1])  # type: ignore[union-attr]
            if max_length > runner.max_length:
                return f"rows of up to {max_length} tokens are longer than the {runner.max_length} of a packed pass"
            prepared = PackedCall(self, runner, call, config, max_length)
            if self._num_promised + prepared.num_blocks > runner.pool.num_blocks:
                prepared.close()
                return f"keys and values of {prepared.num_blocks} blocks are more than there is room for"
            self._num_promised += prepared.num_blocks
            return prepared

    def release(self, num_blocks: int) -> None:
        with self._lock:
            self._num_promised -= num_blocks

    def run(self, runner: ModelRunner, sequences: Sequence[SequenceState], *, draft: bool) -> list[ModelRunnerOutput]:
        """One pass over what these sequences have to run next."""
        with self._lock:
            chunks, budget = [], TokenBudget(pass_tokens(runner))
            for sequence in sequences:
                if is_decoding(sequence):
                    chunks += decode_chunks(sequence, draft)
                elif budget.left:
                    chunks += prefill_chunks(sequence, budget, draft)
                    budget.take(sum(chunk.count for chunk in chunks if chunk.owner is sequence))
            for chunk in chunks:
                chunk.kv.grow(chunk.stop)
            return runner.run(chunks)

    def _started(self) -> ModelRunner | None:
        """The runner, made anew where the base model was changed since."""
        if self._places() != self._made_for:
            self.close()
            self._refusal, self._runner = self._start([p.device.type for p in self.model.base.parameters()])
            self._made_for = self._places()  # now: a runner moves and packs weights
        return self._runner

    def _places(self) -> tuple[object, ...]:
        """The attention function, and where the weights lie."""
        base = self.model.base
        return (base.config._attn_implementation, *(parameter.data_ptr() for parameter in base.parameters()))

    def _start(self, devices: Sequence[str]) -> tuple[str, ModelRunner | None]:
        if set(devices) != {"cpu"}:
            return "the base model isn't in a CPU's memory", None
        try:
            runner = start_model_runner(self.model, EngineConfig(prefix_cache=False))
        except (BaseModelError, ConfigError) as error:  # ConfigError: no room for a block of a large model's keys
            return str(error), None
        if runner.max_passes is None and runner.lengths.threshold is None:
            return "", runner
        runner.close()
        return "the base model keeps states, or has positions that change with a row's length", None


class PackedCall:
    """One `generate`: its rows' adapters in slots, its blocks promised. `close` ends both."""

    def __init__(
        self, generator: PackedGenerator, runner: ModelRunner, call: Call, config: GenerationConfig, max_length: int
    ) -> None:
        self._generator, self._runner, self._call = generator, runner, call
        self._copies = config.num_return_sequences or 1
        self._max_length = max_length
        self._draft = call.options.draft is not False
        self.counts = SpeculationCounts()
        self.num_blocks = 0
        model = generator.model
        with ExitStack() as leases:
            others, _ = model.registry.linked.split(call.links)
            _, names = model.mixtures.expand(others)
            leases.enter_context(model.store.lease(names))  # all at once: an error names all of them
            self._bindings = [self._bind(link, leases) for link in call.links]
            self._leases = leases.pop_all()
        blocks = -(-max_length // runner.pool.block_tokens)
        self.num_blocks = blocks * self._copies * sum(1 + len(b.scaling_routes) for b in self._bindings)

    def _bind(self, link: Link, leases: ExitStack) -> RequestAdapters:
        model = self._generator.model
        binding = RequestAdapters(model.store, model.mixtures, model.registry.linked, link)
        leases.callback(binding.close)
        return binding

    def close(self) -> None:
        self._leases.close()

    def run(self) -> Any:
        """What `base.generate` returns."""
        call = self._call
        try:
            base: Any = call.base
            return base.generate(
                input_ids=call.input_ids,
                attention_mask=call.attention_mask,
                custom_generate=self._decode,
                **call.inputs,
            )
        finally:
            self._generator.release(self.num_blocks)
            self.close()

    @torch.no_grad()
    def _decode(
        self,
        model: Any,
        input_ids: Tensor,  # [rows * copies, tokens]
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Tensor:  # [rows * copies, tokens]
        """The loop of GenerationMixin._sample: the same choices from the same random numbers."""
        streamer = self._call.inputs.get("streamer")  # transformers gives it to its own loops alone
        padding: Any = generation_config._pad_token_tensor
        fills_up = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        rows = self._begin(input_ids, inputs.get("attention_mask"), generation_config.max_length)
        is_open = torch.ones(len(rows), dtype=torch.bool)
        try:
            while is_open.any():
                logits = self._logits(rows, is_open)
                scores = logits_processor(input_ids, logits)
                if generation_config.do_sample:
                    tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
                else:
                    tokens = scores.argmax(dim=-1)
                if fills_up:
                    tokens = torch.where(is_open, tokens, padding)
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                if streamer is not None:
                    streamer.put(tokens.cpu())
                is_open &= ~stopping_criteria(input_ids, None)
                for sequence, token, goes_on in zip(rows, tokens.tolist(), is_open.tolist(), strict=True):
                    self._take(sequence, token, goes_on)
        finally:
            with self._generator._lock:
                for sequence in rows:
                    sequence.drop_passes()
        if streamer is not None:
            streamer.end()
        return input_ids

    def _begin(self, input_ids: Tensor, mask: Tensor | None, max_length: int) -> list[SequenceState]:
        assert max_length <= self._max_length, f"{max_length} tokens a row, where {self._max_length} were planned"
        num_padding = [0] * len(input_ids) if mask is None else (mask == 0).sum(dim=1).tolist()
        rows = []
        with self._generator._lock:
            for i, (tokens, start) in enumerate(zip(input_ids.tolist(), num_padding, strict=True)):
                sequence = _sequence(tokens[start:], max_length - len(tokens), self._bindings[i // self._copies])
                assert sequence.state.binding is not None, "a row begins without its adapters"
                passes = sequence.passes(sequence.state.binding)
                sequence.begin(passes, self._runner.pool, self._runner.table, reuse=False)
                rows.append(sequence)
        return rows

    def _logits(self, rows: Sequence[SequenceState], is_open: Tensor) -> Tensor:  # [rows, vocab]  float32
        """Of each open row's next token; of the others zeros, which nobody reads."""
        found: dict[SequenceState, Tensor] = {}
        wanted = [sequence for sequence, goes_on in zip(rows, is_open.tolist(), strict=True) if goes_on]
        while len(found) < len(wanted):
            left = [sequence for sequence in wanted if sequence not in found]
            for result in sorted(self._generator.run(self._runner, left, draft=self._draft), key=_main_last):
                chunk, sequence = result.chunk, result.chunk.sequence
                if chunk.scaling is not None:
                    assert result.hidden is not None, "a scaling pass returned no hidden states"
                    chunk.scaling.took(chunk.start, result.hidden, result.best)
                    continue
                for scaling in sequence.scalings:
                    scaling.forget(chunk.stop)
                if chunk.wants_logits:
                    assert result.logits is not None, "a pass that ends a row's tokens returned no logits"
                    found[sequence] = result.logits.float()
        widest = max(found.values(), key=len)  # adapters may have tokens of their own
        padded = {
            sequence: pad(own, (0, len(widest) - len(own)), value=-math.inf) if len(own) < len(widest) else own
            for sequence, own in found.items()
        }
        return torch.stack([padded.get(sequence, torch.zeros_like(widest)) for sequence in rows])

    def _take(self, sequence: SequenceState, token: int, goes_on: bool) -> None:
        if not goes_on:
            with self._generator._lock:
                sequence.drop_passes()
            return
        sequence.tokens.append(token)
        for scaling in sequence.scalings:
            was_right = scaling.settle()
            self.counts.add(SpeculationCounts(int(was_right is not None), int(bool(was_right))))


def _main_last(result: ModelRunnerOutput) -> bool:
    return result.chunk.scaling is None


def _sequence(prompt: list[int], max_new_tokens: int, binding: RequestAdapters) -> SequenceState:
    state = RequestState(
        request_id="",
        request=Request(prompt),
        link=(),
        prompt=tuple(prompt),
        arrival=0,
        max_new_tokens=max_new_tokens,
        names=(),
        binding=binding,
    )
    return SequenceState(state, 0, Sampler(SamplingParams(), (), (), 0), Detokenizer(None, (), ()))


# What is left to transformers' own loop


def _merged(call: Call) -> GenerationConfig:
    """The options as `generate` will read them: the call's, its generation_config's, or the model's."""
    config = copy.deepcopy(call.inputs.get("generation_config") or call.base.generation_config or GenerationConfig())
    config.update(**{name: value for name, value in call.inputs.items() if name not in _ARGUMENTS})
    return config


def _unknown_option(call: Call, config: GenerationConfig) -> str | None:
    known = {*GenerationConfig().to_dict(), *_ARGUMENTS}
    others = [name for name, value in call.inputs.items() if name not in known and value is not None]
    if others:
        return f"the base model is given {', '.join(others)}"
    mode = config.get_generation_mode()
    if mode not in _MODES:
        return f"{mode.value} needs transformers' own loop"
    if config.use_cache is False or config.cache_implementation not in (None, "dynamic"):
        return "use_cache or cache_implementation ask for transformers' own passes"
    if config.return_dict_in_generate:
        return "return_dict_in_generate asks for what transformers' own loop keeps"
    for name, neutral in (
        ("guidance_scale", (None, 1, 1.0)),
        ("token_healing", (None, False)),
        ("stop_strings", (None,)),
    ):
        if getattr(config, name, None) not in neutral:
            return f"{name} needs transformers' own loop"
    return None


def _unknown_row(call: Call, model: MultiLoraModel) -> str | None:
    if call.attention is not None or call.options.collect:
        return "captured attention, steering or scalings are asked for"
    linked = model.registry.linked
    if any(linked.split_chain(chain)[0] for chain in linked.split(call.links)[1]):
        return "a row has a residual on attention"
    if call.input_ids is None or call.input_ids.ndim != 2 or call.input_ids.numel() == 0:
        return "there are no input_ids [rows, tokens]"
    if call.input_ids.device.type != "cpu":
        return "input_ids aren't in a CPU's memory"
    if call.attention_mask is not None and not _is_left_padded(call.attention_mask, call.input_ids):
        return "attention_mask isn't that of rows which are padded on the left"
    return None


def _is_left_padded(mask: Tensor, input_ids: Tensor) -> bool:
    """Whether zeros stand before ones in each row, which ends with a one."""
    if mask.shape != input_ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return False
    return bool((mask[:, -1] == 1).all()) and bool((mask[:, 1:] >= mask[:, :-1]).all())


def _max_length(config: GenerationConfig, num_prompt: int) -> int:
    """How long rows get at most."""
    if config.max_new_tokens is not None:
        return int(num_prompt + config.max_new_tokens)
    return max(int(config.max_length or 0), num_prompt + _DEFAULT_NEW_TOKENS)
