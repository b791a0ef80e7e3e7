"""What the fields of a request are, and what it asks of attention, checked before anything runs."""

from collections.abc import Sequence

from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sched.sequence import RequestState
from loraplex.errors import RequestError, TooLargeError
from loraplex.residual.capture import CaptureBuffer, CaptureRequest
from loraplex.residual.registry import LinkedAttention
from loraplex.residual.steering import Steering, check_steering
from loraplex.xlora.mixture import Mixture


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


def check_scalings(state: RequestState, mixtures: Sequence[Mixture]) -> None:
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
    if isinstance(request.priority, bool) or not isinstance(request.priority, int):
        raise RequestError(f"priority is {request.priority!r}; give a whole number, a higher one to go first.")
    if request.capture is not None and not isinstance(request.capture, CaptureRequest):
        raise RequestError(f"capture is {request.capture!r}; give a loraplex.residual.CaptureRequest, or None.")
    is_tuple = isinstance(request.steering, tuple)
    if not is_tuple or not all(isinstance(steering, Steering) for steering in request.steering):
        raise RequestError(f"steering is {request.steering!r}; give a tuple of loraplex.residual.Steering.")
    if not isinstance(request.return_scalings, bool):
        raise RequestError(f"return_scalings is {request.return_scalings!r}; give True or False.")
    budget = request.scalings_budget_bytes
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise RequestError(f"scalings_budget_bytes is {budget!r}; give a whole number of at least 1, or None.")
    if not isinstance(request.cache_salt, str):
        raise RequestError(f'cache_salt is {request.cache_salt!r}; give a string, or "" for none.')
