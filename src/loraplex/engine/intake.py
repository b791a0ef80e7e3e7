"""From a caller's request to one that the engine can run: everything that can be refused is refused here."""

import itertools
import secrets
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from loraplex.engine.asked import check_attention, check_scalings
from loraplex.engine.constraints import make_constraint
from loraplex.engine.generation import Generation, RequestState
from loraplex.engine.observations import Observations
from loraplex.engine.request import Prompt, Request
from loraplex.engine.runner import ModelRunner
from loraplex.engine.text import AnswerText
from loraplex.engine.token_choice import TokenChooser
from loraplex.errors import BaseModelError, CapacityError, RequestError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.residual.capture import CaptureBuffer
from loraplex.routing.choice import Link, parse_choice
from loraplex.xlora.mixture import Mixture


class Intake:
    """Checks and prepares requests; safe to use from many threads."""

    def __init__(self, model: MultiLoraModel, runner: ModelRunner) -> None:
        self._model = model
        self._runner = runner
        self._arrivals = itertools.count()
        self._vocab_size = model.base.get_input_embeddings().num_embeddings
        config = model.base.generation_config
        ends = None if config is None else config.eos_token_id
        self._end_tokens = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    def prepare(self, request: Request, request_id: str) -> RequestState:
        """Raises RequestError, LinkSyntaxError, AdapterNotFoundError or CapacityError; then nothing has changed."""
        link = parse_choice(request.adapters)
        prompt = self._encode(request.prompt)
        (others,), (chain,) = self._model.registry.linked.split([link])
        found, names = self._model.mixtures.expand([others])
        for name in names:
            self._model.store.version(name)
        sampling = request.sampling
        state = RequestState(
            request_id=request_id,
            request=request,
            link=link,
            prompt=prompt,
            arrival=next(self._arrivals),
            max_new_tokens=min(sampling.max_tokens, self._runner.max_length - len(prompt)),
            names=tuple(dict.fromkeys(names)),
        )
        self._check_fits(state, num_passes=1 + len(_pass_kinds(others, found)))
        self._check_tokens(request)
        buffer = check_attention(state, bool(chain), self._model.registry.linked)
        check_scalings(state, [found[name] for name, _ in others if name in found])
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        state.generations = [self._generation(state, index, seed + index, buffer) for index in range(sampling.n)]
        return state

    def end_tokens(self, request: Request) -> frozenset[int]:
        """The tokens that end an answer."""
        ends = () if request.sampling.ignore_eos else self._end_tokens
        return frozenset((*ends, *request.sampling.stop_token_ids))

    def _generation(self, state: RequestState, index: int, seed: int, buffer: CaptureBuffer | None) -> Generation:
        sampling = state.request.sampling
        schema = sampling.json_schema
        constraint = None if schema is None else make_constraint(schema, self._model.tokenizer, self._vocab_size)
        ends = self.end_tokens(state.request)
        chooser = TokenChooser(sampling, state.prompt, ends, seed % 2**63, constraint)
        tokenizer = self._tokenizer(needed=bool(sampling.stop_strings))
        text = AnswerText(tokenizer, state.prompt, sampling.stop_strings)
        wants_scalings = state.request.return_scalings
        observations = None
        if buffer is not None or wants_scalings:
            observations = Observations(buffer, tokenizer, wants_scalings=wants_scalings)
        return Generation(state, index, chooser, text, observations)

    def _tokenizer(self, *, needed: bool) -> PreTrainedTokenizerBase | None:
        try:
            return self._model.tokenizer
        except BaseModelError:
            if needed:
                raise
            return None

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            tokens = self._model.tokenizer(prompt)["input_ids"]
        elif isinstance(prompt, Sequence) and prompt and all(isinstance(turn, Mapping) for turn in prompt):
            tokens = self._encode_chat(prompt)  # type: ignore[arg-type]
        else:
            tokens = prompt
        is_tokens = isinstance(tokens, Sequence) and all(_is_token(token, self._vocab_size) for token in tokens)
        if not is_tokens or not tokens:
            raise RequestError(
                f"the prompt {str(prompt)[:100]!r} can't be read. Give a text, at least one token id from 0 to "
                f"{self._vocab_size - 1}, or the messages of a chat."
            )
        return tuple(tokens)

    def _encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Sequence[int]:
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template is None:
            raise RequestError("the model's tokenizer has no chat template. Give the prompt as a text.")
        turns = [dict(turn) for turn in messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _check_fits(self, state: RequestState, num_passes: int) -> None:
        runner = self._runner
        length = len(state.prompt)
        if length >= runner.max_length:
            raise RequestError(
                f"the prompt has {length} tokens, but prompt and answer together can have {runner.max_length}. Shorten "
                "it, or raise EngineConfig.max_length or cache_bytes."
            )
        if runner.max_tracks is not None and num_passes > runner.max_tracks:
            raise CapacityError(
                f"the request needs the states of {num_passes} passes, but there is room for {runner.max_tracks}. Link "
                "fewer mixtures, or raise EngineConfig.max_running and cache_bytes."
            )
        size = runner.pool.block_tokens
        needed = -(-(length + state.max_new_tokens) // size) * num_passes
        if needed > runner.pool.num_blocks:
            raise CapacityError(
                f"the request needs {needed} blocks of keys and values ({num_passes} passes of "
                f"{length + state.max_new_tokens} tokens), but there are {runner.pool.num_blocks}. Ask for fewer "
                "max_tokens, or raise EngineConfig.cache_bytes."
            )

    def _check_tokens(self, request: Request) -> None:
        for token in (*request.sampling.stop_token_ids, *request.sampling.logit_bias):
            if token >= self._vocab_size:
                raise RequestError(
                    f"the token id {token} in stop_token_ids or logit_bias is none of this model's 0 to "
                    f"{self._vocab_size - 1}."
                )


def _is_token(token: object, vocab_size: int) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size


def _pass_kinds(link: Link, found: Mapping[str, Mixture]) -> set[str]:
    """The scaling passes that a link needs: one for all mixtures whose pass is the base model's, one for each other."""
    return {"" if found[name].pass_value == 0 else name for name, _ in link if name in found}
