"""One call of /generate: as a call of OpenAI's API underneath, whose answer is told in TGI's and LoRAX's shapes."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from loraplex.engine.request import Completion, RequestResult
from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.bodies import ChatBody, CompletionBody
from loraplex.server.api.engine_requests import allowed_tokens
from loraplex.server.api.messages import Message
from loraplex.server.api.response_parts import News
from loraplex.server.api.routes.chat import ChatCall
from loraplex.server.api.routes.completions import CompletionCall, best
from loraplex.server.api.streaming import BodyChannel, sse
from loraplex.server.api.tgi.bodies import GenerateBody, GenerateParameters
from loraplex.server.handlers import Run
from loraplex.server.state import RequestContext, ServerState


class GenerateCall:
    """One call, as a call of OpenAI's API underneath; made in a thread."""

    def __init__(
        self,
        body: GenerateBody,
        parameters: GenerateParameters,
        state: ServerState,
        context: RequestContext,
        choice: Any,
        *,
        stream: bool,
    ) -> None:
        self._inputs, self._parameters = body.inputs, parameters
        options = _options(parameters, allowed_tokens(context.principal, state.config.limits))
        options |= {
            "model": "-",
            "stream": stream,
            "prompt_logprobs": 0 if parameters.decoder_input_details and not stream else None,
        }
        num_top = max(parameters.return_k_alternatives or 0, parameters.top_n_tokens or 0)
        self.call: ChatCall | CompletionCall
        if parameters.apply_chat_template:
            options |= {
                "messages": [Message.model_validate({"role": "user", "content": body.inputs})],
                "top_logprobs": num_top,
            }
            self.call = ChatCall(ChatBody.model_construct(logprobs=True, **options), state, context, choice)
        else:
            options |= {"prompt": body.inputs, "logprobs": num_top, "best_of": parameters.best_of}
            self.call = CompletionCall(CompletionBody.model_construct(**options), state, context, choice)
        self.requests = self.call.requests
        self._seed = self.requests[0].sampling.seed
        self._tokenizer = self.call.row_tokenizer
        self._special = frozenset(self._tokenizer.tokenizer.all_special_ids)
        self._ends = self.requests[0].sampling.stop_strings
        self._text_so_far, self._num_told = "", 0  # of a stream

    def answer(self, result: RequestResult) -> dict[str, Any]:
        """The whole answer, its details where they are wanted."""
        (chosen,) = best(result.completions, 1)
        others = [completion for completion in result.completions if completion is not chosen]
        told: dict[str, Any] = {"generated_text": self._text(chosen.text)}
        if self._parameters.details or self._parameters.decoder_input_details:
            told["details"] = self._details(chosen, result) | {"prompt_tokens": len(result.prompt_token_ids)}
            if others:
                told["details"]["best_of_sequences"] = [
                    {"generated_text": self._text(other.text)} | self._details(other, result) for other in others
                ]
        return told

    async def events(self, run: Run, channel: BodyChannel | None) -> AsyncGenerator[bytes, None]:
        """One for each token; the last has the whole text and the details."""
        async for events in run.batches(run.writer(channel, self._told)):
            found, failure = run.gather(events, holds_end=False)
            for news in found:
                yield self._told(news)
            if failure is not None:
                raise failure

    def _told(self, news: News) -> bytes:
        """The events of news."""
        self._text_so_far += news.text
        events = []
        for entry in news.logprobs:
            self._num_told += 1
            events.append(self._event(entry, self._num_told))
        if news.finish_reason is not None and events:
            events[-1] |= self._end(news, self._text_so_far, self._num_told)
        return b"".join(map(sse, events))

    def _event(self, entry: TokenLogprobs, number: int) -> dict[str, Any]:
        return {"index": number, "token": self._token(entry), "generated_text": None, "details": None} | self._tops(
            [entry], "top_tokens"
        )

    def _end(self, news: News, text: str, number: int) -> dict[str, Any]:
        details = {
            "finish_reason": self._reason(news.finish_reason, news.token_ids, text),
            "generated_tokens": number,
            "skipped_tokens": 0,
            "prompt_tokens": len(news.prompt),
            "input_length": len(news.prompt),
            "seed": self._seed,
        }
        return {"generated_text": self._text(text), "details": details}

    def _details(self, completion: Completion, result: RequestResult) -> dict[str, Any]:
        entries = completion.logprobs or ()
        return {
            "finish_reason": self._reason(completion.finish_reason, completion.token_ids, completion.text),
            "generated_tokens": len(completion.token_ids),
            "skipped_tokens": 0,
            "seed": self._seed,
            "prefill": self._prefill(result),
            "tokens": [self._token(entry) for entry in entries],
        } | self._tops(entries, "top_tokens", nested=True)

    def _prefill(self, result: RequestResult) -> list[dict[str, Any]]:
        """The prompt's tokens; the first has no probability."""
        if not self._parameters.decoder_input_details or result.prompt_logprobs is None:
            return []
        pairs = zip(result.prompt_token_ids, result.prompt_logprobs, strict=True)
        return [
            {"id": token, "text": self._of(token), "logprob": None if entry is None else entry.logprob}
            for token, entry in pairs
        ]

    def _token(self, entry: TokenLogprobs) -> dict[str, Any]:
        told = {
            "id": entry.token_id,
            "text": self._of(entry.token_id),
            "logprob": entry.logprob,
            "special": entry.token_id in self._special,
            "skipped": False,  # LoRAX's, of its speculation
        }
        number = self._parameters.return_k_alternatives
        if number:
            told["alternative_tokens"] = [
                {"id": token, "text": self._of(token), "logprob": logprob} for token, logprob in entry.top[:number]
            ]
        return told

    def _tops(self, entries: Sequence[TokenLogprobs], name: str, *, nested: bool = False) -> dict[str, Any]:
        number = self._parameters.top_n_tokens
        if not number:
            return {}
        tops = [
            [
                {"id": token, "text": self._of(token), "logprob": logprob, "special": token in self._special}
                for token, logprob in entry.top[:number]
            ]
            for entry in entries
        ]
        return {name: tops if nested else tops[0]}

    def _of(self, token: int) -> str:
        return self._tokenizer.texts.of(token)

    def _text(self, text: str) -> str:
        return self._inputs + text if self._parameters.return_full_text else text

    def _reason(self, reason: str | None, token_ids: Sequence[int], text: str) -> str:
        """An end is a stop sequence's where the text has one at its end."""
        if reason != "stop":
            return "length"
        return "stop_sequence" if any(text.endswith(stop) for stop in self._ends) else "eos_token"


def _options(parameters: GenerateParameters, most: int) -> dict[str, Any]:
    """As fields of OpenAI's body. Without any sign of sampling it is greedy, as in both servers."""
    sampled = (parameters.temperature, parameters.top_k, parameters.top_p)
    is_sampled = bool(parameters.do_sample) or any(value is not None for value in sampled)
    temperature = parameters.temperature if parameters.temperature is not None else 1.0 if is_sampled else 0.0
    stops = [*(parameters.stop or ()), *(parameters.stop_sequences or ())]
    seed = parameters.seed
    if seed is None and temperature > 0:
        seed = time.time_ns() % 2**31  # told in the details
    options: dict[str, Any] = {
        "max_tokens": most if parameters.max_new_tokens is None else parameters.max_new_tokens,
        "temperature": temperature,
        "top_k": parameters.top_k or 0,
        "top_p": parameters.top_p if parameters.top_p is not None else 1.0,
        "repetition_penalty": parameters.repetition_penalty,
        "frequency_penalty": parameters.frequency_penalty,
        "ignore_eos": parameters.ignore_eos_token,
        "seed": seed,
        "stop": stops,
        "include_stop_str_in_output": True,  # TGI's texts end with the stop sequence
        "truncate_prompt_tokens": parameters.truncate,
        "truncation_side": "left",
    }
    return options | _structure(parameters)


def _structure(parameters: GenerateParameters) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if parameters.response_format is not None:
        schema = parameters.response_format.schema_
        found["guided_json"] = {"type": "object"} if schema is None else schema
    grammar = parameters.grammar
    if grammar is not None and grammar.type == "regex":
        if not isinstance(grammar.value, str):
            raise ApiError(BAD_REQUEST, "a grammar of type regex is a text.", param="grammar.value")
        found["guided_regex"] = grammar.value
    elif grammar is not None:
        found["guided_json"] = grammar.value
    return found
