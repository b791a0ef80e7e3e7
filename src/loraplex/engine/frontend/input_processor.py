"""From a caller's request to one that the engine can run: everything that can be refused is refused here."""

import itertools
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from loraplex.engine.frontend.detokenizer import Detokenizer
from loraplex.engine.frontend.request_checks import check_attention, check_kinds, check_scalings
from loraplex.engine.frontend.structured_output import make_constraint
from loraplex.engine.request import Prompt, Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sampling.sampler import Sampler
from loraplex.engine.sched.capacity import Capacity, check_slots
from loraplex.engine.sched.sequence import RequestState, SequenceState
from loraplex.engine.worker.captures import Captures
from loraplex.errors import BaseModelError, RequestError
from loraplex.models.end_tokens import end_token_ids
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.residual.capture import CaptureBuffer
from loraplex.routing.adapter_spec import Link, parse_adapter_spec
from loraplex.xlora.mixture import Mixture


class InputProcessor:
    """Checks and prepares requests; safe to use from many threads."""

    def __init__(self, model: MultiLoraModel, room: Capacity) -> None:
        self._model = model
        self._room = room
        self._arrivals = itertools.count()
        self.vocab_size = model.base.get_input_embeddings().num_embeddings
        output = model.base.get_output_embeddings()
        self._num_logits = int(getattr(output, "out_features", self.vocab_size))

    def prepare(self, request: Request, request_id: str) -> RequestState:
        """Raises RequestError, LinkSyntaxError, AdapterNotFoundError or TooLargeError; then nothing has changed."""
        check_kinds(request)
        link = parse_adapter_spec(request.adapters)
        self._check_tokens(request.sampling)
        self._room.check_answers(request.sampling.n)
        prompt = self._encode(request.prompt)
        self._room.check_prompt(len(prompt))
        (others,), (chain,) = self._model.registry.linked.split([link])
        found, names = self._model.mixtures.expand([others])
        check_slots(self._model.store, names)
        sampling = request.sampling
        state = RequestState(
            request_id=request_id,
            request=request,
            link=link,
            prompt=prompt,
            arrival=next(self._arrivals),
            max_new_tokens=min(sampling.max_tokens, self._room.max_length - len(prompt)),
            names=tuple(dict.fromkeys(names)),
            lengths=self._room.lengths,
        )
        self._room.check_blocks(len(prompt) + state.max_new_tokens, num_passes=1 + len(_pass_kinds(others, found)))
        mixtures = [found[name] for name, _ in others if name in found]
        self._room.check_mixtures([mixture.name for mixture in mixtures], len(prompt) + state.max_new_tokens)
        buffer = check_attention(state, bool(chain), self._model.registry.linked)
        check_scalings(state, mixtures)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        state.sequences = [self._sequence(state, index, seed + index, buffer) for index in range(sampling.n)]
        return state

    def end_tokens(self, state: RequestState) -> frozenset[int]:
        """The tokens that end an answer: the base model's, its adapters' and the request's."""
        sampling = state.request.sampling
        if sampling.ignore_eos:
            return frozenset(sampling.stop_token_ids)
        (of_adapters,) = self._model.registry.end_tokens([state.link])
        known = (token for token in of_adapters if token < self.vocab_size)
        return frozenset((*self._base_ends, *known, *sampling.stop_token_ids))

    @cached_property
    def _base_ends(self) -> tuple[int, ...]:
        return end_token_ids(self._model.base, self._tokenizer(needed=False))

    def _sequence(self, state: RequestState, index: int, seed: int, buffer: CaptureBuffer | None) -> SequenceState:
        sampling = state.request.sampling
        schema = sampling.json_schema
        constraint = None if schema is None else make_constraint(schema, self._model.tokenizer, self.vocab_size)
        ends = self.end_tokens(state)
        chooser = Sampler(sampling, state.prompt, ends, seed % 2**63, constraint)
        tokenizer = self._tokenizer(needed=bool(sampling.stop_strings))
        text = Detokenizer(tokenizer, state.prompt, sampling.stop_strings)
        wants_scalings = state.request.return_scalings
        observations = None
        if buffer is not None or wants_scalings:
            observations = Captures(buffer, tokenizer, wants_scalings=wants_scalings)
        return SequenceState(state, index, chooser, text, observations)

    def _tokenizer(self, *, needed: bool) -> PreTrainedTokenizerBase | None:
        try:
            return self._model.tokenizer
        except BaseModelError:
            if needed:
                raise
            return None

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        tokens: Any = prompt
        if isinstance(prompt, str):
            tokens = self._tokenize(prompt)
        elif isinstance(prompt, Sequence) and prompt and all(isinstance(turn, Mapping) for turn in prompt):
            tokens = self._encode_chat(prompt)  # type: ignore[arg-type]
        is_tokens = isinstance(tokens, Sequence) and all(_is_token(token, self.vocab_size) for token in tokens)
        if not is_tokens or not tokens:
            raise RequestError(
                f"the prompt {repr(prompt)[:100]} can't be read. Give a text, at least one token id from 0 to "
                f"{self.vocab_size - 1}, or the messages of a chat."
            )
        return tuple(tokens)

    def _encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Sequence[int]:
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template is None:
            raise RequestError("the model's tokenizer has no chat template. Give the prompt as a text.")
        turns = [dict(turn) for turn in messages]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}.") from error
        return self._tokenize(text, add_special_tokens=False)

    def _tokenize(self, text: str, **options: bool) -> Sequence[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt can't be read: its character {error.start}, {text[error.start]!r}, is half of a surrogate "
                "pair, which no text has alone. Leave it out, or give the whole character."
            ) from None
        ids: Sequence[int] = self._model.tokenizer(text, **options)["input_ids"]
        return ids

    def _check_tokens(self, sampling: SamplingParams) -> None:
        most = self._num_logits
        for token in (*sampling.stop_token_ids, *sampling.logit_bias):
            if token >= most:
                raise RequestError(
                    f"the token id {token} in stop_token_ids or logit_bias is none of this model's 0 to {most - 1}."
                )
        for option in ("logprobs", "prompt_logprobs"):
            if (getattr(sampling, option) or 0) > most:
                raise RequestError(
                    f"{option} is {getattr(sampling, option)}, but the model has {most} tokens. Ask for at most {most}."
                )


def _is_token(token: object, vocab_size: int) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size


def _pass_kinds(link: Link, found: Mapping[str, Mixture]) -> set[str]:
    """The scaling passes that a link needs: one for all mixtures whose pass is the base model's, one for each other."""
    return {"" if found[name].pass_value == 0 else name for name, _ in link if name in found}
