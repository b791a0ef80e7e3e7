"""From a caller's request to one that the engine can run: everything that can be refused is refused here."""

import itertools
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraplex.adapters.vocabulary import Vocabulary
from loraplex.engine.config import EngineConfig
from loraplex.engine.frontend.image_inputs import ImageInputs
from loraplex.engine.frontend.structured_output import constraint_of
from loraplex.engine.request import Prompt, Request
from loraplex.engine.sampling.detokenizer import Detokenizer
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sampling.restrictions import Restrictions, bad_word_tokens
from loraplex.engine.sampling.sampler import Sampler
from loraplex.engine.sched.capacity import Capacity, check_slots
from loraplex.engine.sched.captures import Captures
from loraplex.engine.sched.images import RequestImages
from loraplex.engine.sched.sequence import RequestState, SequenceState
from loraplex.errors import BaseModelError, RequestError, TooLargeError
from loraplex.models.auto.selection import AutoChoice, Candidates
from loraplex.models.mixtures import AnyMixture
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.chat_template import render_chat
from loraplex.models.text.end_tokens import end_token_ids
from loraplex.residual.capture import CaptureBuffer, CaptureRequest
from loraplex.residual.registry import LinkedAttention
from loraplex.residual.steering import Steering, check_steering
from loraplex.routing.adapter_spec import Link, is_auto, parse_adapter_spec
from loraplex.validation import check_text
from loraplex.xlora.mixture import Mixture


class InputProcessor:
    """Checks and prepares requests; safe to use from many threads."""

    def __init__(self, model: MultiLoraModel, capacity: Capacity, config: EngineConfig) -> None:
        self._model = model
        self._auto_floor = config.auto_floor
        self._capacity = capacity
        self._images = ImageInputs(model, config, capacity.lengths)
        self._arrivals = itertools.count()
        self.vocab_size = model.base.get_input_embeddings().num_embeddings
        output = model.base.get_output_embeddings()
        self._num_logits = int(getattr(output, "out_features", self.vocab_size))
        self._ends: WeakKeyDictionary[Vocabulary, tuple[int, ...]] = WeakKeyDictionary()

    def prepare(self, request: Request, request_id: str) -> RequestState:
        """Raises RequestError, LinkSyntaxError, AdapterNotFoundError or TooLargeError; then nothing has changed."""
        check_kinds(request)
        is_chosen = is_auto(request.adapters)
        link = () if is_chosen else parse_adapter_spec(request.adapters)
        vocabulary = self._model.registry.vocabulary(link)
        self._check_tokens(request.sampling, self._num_logits if vocabulary is None else vocabulary.num_tokens)
        self._capacity.check_answers(request.sampling.n)
        prompt = self._encode(request.prompt, vocabulary)
        prompt, images = self._with_images(request, prompt, vocabulary)
        self._capacity.check_prompt(len(prompt))
        sampling = request.sampling
        state = RequestState(
            request_id=request_id,
            request=request,
            link=link,
            prompt=prompt,
            arrival=next(self._arrivals),
            max_new_tokens=min(sampling.max_tokens, self._capacity.max_length - len(prompt)),
            names=(),
            vocabulary=vocabulary,
            lengths=self._capacity.lengths,
            images=images,
        )
        state.names = self._needed(state, link)
        _, (chain,) = self._model.registry.linked.split([link])
        linked = self._model.registry.linked
        chain = linked.at_layers(chain, request.residual_layers)
        attention_chain, _ = linked.split_chain(chain, captured=request.capture is not None)
        buffer = check_attention(state, bool(attention_chain), linked)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        restrictions = self._restrictions(state)
        state.sequences = [
            self._sequence(state, index, seed + index, buffer, restrictions) for index in range(sampling.n)
        ]
        if is_chosen:
            self._begin_choosing(state)
        return state

    def _needed(self, state: RequestState, link: Link) -> tuple[str, ...]:
        """The adapters that a request needs in memory with this link.

        Raises AdapterNotFoundError, RequestError or TooLargeError for a link that it can't run with.
        """
        (others,), _ = self._model.registry.linked.split([link])
        found, names = self._model.mixtures.expand([others])
        check_slots(self._model.store, names)
        if state.images is not None:
            self._check_image_adapters(others, found)
        num_tokens = len(state.prompt) + state.max_new_tokens
        self._capacity.check_blocks(num_tokens, num_passes=1 + len(_pass_kinds(others, found)))
        mixtures = [found[name] for name, _ in others if name in found]
        self._capacity.check_mixtures([m.name for m in mixtures if isinstance(m, Mixture)], num_tokens)
        check_scalings(state, mixtures)
        return tuple(dict.fromkeys(names))

    # Adapters that are chosen by the prompt

    def _begin_choosing(self, state: RequestState) -> None:
        """Let a pass of the base model come before the answers. Raises RequestError if nothing could be chosen."""
        index, candidates = self._model.registry.auto, state.request.candidates
        index.check(candidates)
        if not index.has_any(candidates):
            state.auto = AutoChoice(name=None, score=None, num_candidates=0)
            return
        sampler, text = Sampler(SamplingParams(), (), (), 0), Detokenizer(None, (), ())
        state.choosing = SequenceState(state, 0, sampler, text)
        state.choosing.prompt_logprobs = None

    def choose(self, state: RequestState, hidden: Tensor) -> None:  # [hidden], of the prompt's last token
        """Let a request run with the adapter that is nearest to its prompt; raises what `prepare` raises."""
        choice = self._model.registry.auto.choose(hidden, state.request.candidates, self._auto_floor)
        link: Link = () if choice.name is None else ((choice.name, 1.0),)
        names = self._needed(state, link)
        state.auto, state.link, state.names = choice, link, names
        state.num_cached_tokens = state.num_cached_tokens if choice.name is None else 0
        ends = self.end_tokens(state)
        for sequence in state.sequences:
            sequence.sampler.end_at(ends)

    def _with_images(
        self, request: Request, prompt: tuple[int, ...], vocabulary: Vocabulary | None
    ) -> tuple[tuple[int, ...], RequestImages | None]:
        if not request.images:
            return prompt, None
        if is_auto(request.adapters):
            raise RequestError(
                "adapters is 'auto', which reads prompts of text: the pictures' features may differ by adapter. Name "
                "the adapter, or leave the images out."
            )
        if request.steering and not isinstance(request.images, Mapping):
            raise RequestError(
                "the spans of steering name tokens of the prompt, which pictures change. Give token ids and the "
                "tensors that transformers' processor made, or leave steering out."
            )
        tokenizer = self._tokenizer(vocabulary, needed=False)
        return self._images.prepare(request.images, prompt, tokenizer, self._capacity.max_length - 1)

    def _check_image_adapters(self, link: Link, found: Mapping[str, AnyMixture]) -> None:
        for name, _ in link:
            mixture = found.get(name)
            for adapter in (name,) if mixture is None else mixture.experts:
                version = self._model.store.version(adapter)
                if found or version.invocation is not None:  # a scaling pass is the base model's
                    self._images.check_adapters(version.modules, repr(name))

    def end_tokens(self, state: RequestState) -> frozenset[int]:
        """The tokens that end an answer: the base model's, its adapters' and the request's."""
        sampling = state.request.sampling
        if sampling.ignore_eos:
            return frozenset(sampling.stop_token_ids)
        (of_adapters,) = self._model.registry.end_tokens([state.link])
        known = (token for token in of_adapters if token < self._num_tokens(state.vocabulary))
        return frozenset((*self._own_ends(state.vocabulary), *known, *sampling.stop_token_ids))

    def _own_ends(self, vocabulary: Vocabulary | None) -> tuple[int, ...]:
        """The tokens that end an answer in a vocabulary."""
        if vocabulary is None or vocabulary.tokenizer is None:
            return self._base_ends
        return self._ends_of(vocabulary)

    @cached_property
    def _base_ends(self) -> tuple[int, ...]:
        return end_token_ids(self._model.base, self._tokenizer(None, needed=False))

    def _ends_of(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        known = self._ends.get(vocabulary)
        if known is None:
            known = self._ends[vocabulary] = end_token_ids(
                self._model.base, vocabulary.tokenizer, num_tokens=vocabulary.num_tokens
            )
        return known

    def _num_tokens(self, vocabulary: Vocabulary | None) -> int:
        return self.vocab_size if vocabulary is None else vocabulary.num_tokens

    def _restrictions(self, state: RequestState) -> Restrictions | None:
        """Shared by all answers of a request: its lists may be long."""
        sampling = state.request.sampling
        if sampling.allowed_token_ids is None and not sampling.bad_words:
            return None
        words: list[list[int]] = []
        if sampling.bad_words:
            words = bad_word_tokens(sampling.bad_words, self._known_tokenizer(state.vocabulary))
        return Restrictions(sampling.allowed_token_ids, words)

    def _sequence(
        self,
        state: RequestState,
        index: int,
        seed: int,
        buffer: CaptureBuffer | None,
        restrictions: Restrictions | None,
    ) -> SequenceState:
        sampling = state.request.sampling
        vocabulary = state.vocabulary
        constraint, ends = None, self.end_tokens(state)
        if sampling.has_structure:
            num_tokens = self._num_tokens(vocabulary)
            constraint = constraint_of(sampling, self._known_tokenizer(vocabulary), num_tokens, end_tokens=ends)
        sampler = Sampler(sampling, state.prompt, ends, seed % 2**63, constraint, restrictions)
        tokenizer = self._tokenizer(vocabulary, needed=bool(sampling.stop_strings))
        text = Detokenizer(
            tokenizer,
            state.prompt,
            sampling.stop_strings,
            include_stop=sampling.include_stop,
            skip_special_tokens=sampling.skip_special_tokens,
        )
        wants_scalings = state.request.return_scalings
        captures = None
        if buffer is not None or wants_scalings:
            captures = Captures(buffer, tokenizer, wants_scalings=wants_scalings)
        return SequenceState(state, index, sampler, text, captures)

    def _known_tokenizer(self, vocabulary: Vocabulary | None) -> PreTrainedTokenizerBase:
        """An adapter's own, or the base model's. Raises BaseModelError if that isn't known."""
        own = None if vocabulary is None else vocabulary.tokenizer
        return self._model.tokenizer if own is None else own

    def _tokenizer(self, vocabulary: Vocabulary | None, *, needed: bool) -> PreTrainedTokenizerBase | None:
        try:
            return self._known_tokenizer(vocabulary)
        except BaseModelError:
            if needed:
                raise
            return None

    def _encode(self, prompt: Prompt, vocabulary: Vocabulary | None) -> tuple[int, ...]:
        tokens: Any = prompt
        most = self._num_tokens(vocabulary)
        if isinstance(prompt, str):
            tokens = self._tokenize(prompt, vocabulary)
        elif isinstance(prompt, Sequence) and prompt and all(isinstance(turn, Mapping) for turn in prompt):
            text = render_chat(self._known_tokenizer(vocabulary), prompt)  # type: ignore[arg-type]
            tokens = self._tokenize(text, vocabulary, add_special_tokens=False)
        is_tokens = isinstance(tokens, Sequence) and all(_is_token(token, most) for token in tokens)
        if not is_tokens or not tokens:
            raise RequestError(
                f"the prompt {repr(prompt)[:100]} can't be read. Give a text, at least one token id from 0 to "
                f"{most - 1}, or the messages of a chat."
            )
        return tuple(tokens)

    def _tokenize(self, text: str, vocabulary: Vocabulary | None, **options: bool) -> Sequence[int]:
        check_text(text)
        ids: Sequence[int] = self._known_tokenizer(vocabulary)(text, **options)["input_ids"]
        return ids

    def _check_tokens(self, sampling: SamplingParams, most: int) -> None:
        for token in (*sampling.stop_token_ids, *sampling.logit_bias, max(sampling.allowed_token_ids or (0,))):
            if token >= most:
                raise RequestError(
                    f"the token id {token} in stop_token_ids, logit_bias or allowed_token_ids is none of this model's "
                    f"0 to {most - 1}."
                )
        for option in ("logprobs", "prompt_logprobs"):
            if (getattr(sampling, option) or 0) > most:
                raise RequestError(
                    f"{option} is {getattr(sampling, option)}, but the model has {most} tokens. Ask for at most {most}."
                )


def _is_token(token: object, vocab_size: int) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size


def _pass_kinds(link: Link, found: Mapping[str, AnyMixture]) -> set[str]:
    """The scaling passes that a link needs: one for all mixtures whose pass is the base model's, one for each other."""
    xlora = {name: mixture for name, _ in link if isinstance(mixture := found.get(name), Mixture)}
    return {"" if mixture.pass_value == 0 else name for name, mixture in xlora.items()}


def check_attention(state: RequestState, has_residuals: bool, linked: LinkedAttention) -> CaptureBuffer | None:
    """Where its capture will go; takes no memory yet. Raises RequestError, TooLargeError or BaseModelError.

    With the first request that captures or steers, the base model's attention is joined.
    """
    request = state.request
    if request.capture is not None and request.sampling.n > 1:
        raise RequestError(
            f"the request captures attention and asks for n={request.sampling.n} answers. Ask for one answer a request."
        )
    if request.capture is None and not request.steering:
        return None
    num_heads = linked.layers.num_heads
    for steering in request.steering:
        check_steering(steering, 0, len(state.prompt), num_heads)
    if request.capture is None:
        return None
    return CaptureBuffer(
        request.capture,
        0,
        num_heads,
        num_padding=0,
        prompt_stop=len(state.prompt),
        fed_before=0,
        max_new_tokens=state.max_new_tokens,
        has_residuals=has_residuals,
    )


def check_scalings(state: RequestState, mixtures: Sequence[AnyMixture]) -> None:
    """Raises TooLargeError if an answer's scalings, [tokens, lora_layers, experts] in float32, could pass a budget."""
    budget = state.request.scalings_budget_bytes
    if not state.request.return_scalings or budget is None:
        return
    num_tokens = len(state.prompt) + max(0, state.max_new_tokens - 1)  # the last new token is never run
    needed = sum(num_tokens * len(mixture.layers) * len(mixture.experts) * 4 for mixture in mixtures)
    if needed > budget:
        raise TooLargeError(
            f"the scalings of {num_tokens} tokens take {needed} bytes ({len(mixtures)} mixtures), and "
            f"scalings_budget_bytes is {budget}. Ask for fewer max_tokens, shorten the prompt, or raise the budget."
        )


def check_kinds(request: Request) -> None:
    """Raises RequestError for a field that is no such thing at all."""
    if not isinstance(request, Request):
        raise RequestError(f"{request!r} is no request. Give a loraplex.Request.")
    if not isinstance(request.sampling, SamplingParams):
        raise RequestError(f"sampling is {request.sampling!r}; give a loraplex.SamplingParams.")
    if not isinstance(request.candidates, Candidates) or isinstance(request.candidates.names, str):
        raise RequestError(f"candidates is {request.candidates!r}; give a loraplex.Candidates, of a list of names.")
    if not isinstance(request.images, Sequence | Mapping):
        raise RequestError(f"images is {request.images!r}; give a list of pictures, or tensors by name.")
    if isinstance(request.priority, bool) or not isinstance(request.priority, int):
        raise RequestError(f"priority is {request.priority!r}; give a whole number, a higher one to go first.")
    if request.capture is not None and not isinstance(request.capture, CaptureRequest):
        raise RequestError(f"capture is {request.capture!r}; give a loraplex.residual.CaptureRequest, or None.")
    is_tuple = isinstance(request.steering, tuple)
    if not is_tuple or not all(isinstance(steering, Steering) for steering in request.steering):
        raise RequestError(f"steering is {request.steering!r}; give a tuple of loraplex.residual.Steering.")
    layers = request.residual_layers
    if not isinstance(layers, Mapping) or not all(isinstance(name, str) for name in layers):
        raise RequestError(f"residual_layers is {layers!r}; give tuples of layers by the names of residuals.")
    if not isinstance(request.return_scalings, bool):
        raise RequestError(f"return_scalings is {request.return_scalings!r}; give True or False.")
    budget = request.scalings_budget_bytes
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise RequestError(f"scalings_budget_bytes is {budget!r}; give a whole number of at least 1, or None.")
    if request.pooling not in (None, "mean", "last"):
        raise RequestError(f'pooling is {request.pooling!r}; give "mean", "last", or None for an answer.')
    others = request.capture or request.return_scalings or request.sampling.prompt_logprobs is not None
    if request.pooling is not None and (request.sampling.n > 1 or others):
        raise RequestError(
            "pooling gives one vector: n must be 1, without capture, return_scalings and prompt_logprobs."
        )
    if not isinstance(request.cache_salt, str):
        raise RequestError(f'cache_salt is {request.cache_salt!r}; give a string, or "" for none.')
