"""What a request asks of attention inside vLLM, in its extra arguments: steering, and captured weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.errors import RequestError
from loraplex.residual.capture import CaptureBuffer, CaptureRequest
from loraplex.residual.steering import Steering, check_steering
from loraplex.validation import is_whole, quoted

STEER, CAPTURE = "loraplex_steer", "loraplex_capture"  # extra arguments (`vllm_xargs` in the OpenAI API)
MAX_SPANS = 256  # of all steerings of a request
MAX_CAPTURE_BYTES = 2**24  # of a request's captured weights
_MAX_TEXT = 1 << 16  # characters of a JSON text
_STEER_KEYS = {"start", "end", "strength", "share", "layers", "heads"}
_CAPTURE_KEYS = {"layers", "heads", "queries", "reduce", "dtype"}


@dataclass(frozen=True)
class AttentionArgs:
    """Of one request; at least one of both."""

    steering: tuple[Steering, ...]
    capture: CaptureRequest | None

    def check(self, num_prompt: int, num_heads: Mapping[int, int], known: Sequence[int], max_new_tokens: int) -> None:
        """Raise RequestError or TooLargeError for what can't be done; `known` are the layers that can be read."""
        for steering in self.steering:
            check_steering(steering, 0, num_prompt, dict(num_heads))
        if self.capture is not None:
            self.buffer(num_prompt, num_heads, max_new_tokens)
        unknown = sorted(set(self.layers(num_heads)) - set(known))
        if unknown:
            raise RequestError(
                f"attention of the layers {unknown} can't be read here: attention_layers of the engine are "
                f"{sorted(known)}. Name some of those."
            )

    def layers(self, num_heads: Mapping[int, int]) -> tuple[int, ...]:
        """The attention layers that it asks about."""
        asked = [steering.layers for steering in self.steering]
        asked += [] if self.capture is None else [self.capture.layers]
        return tuple(sorted({layer for layers in asked for layer in (num_heads if layers is None else layers)}))

    def buffer(self, num_prompt: int, num_heads: Mapping[int, int], max_new_tokens: int) -> CaptureBuffer:
        """Where captured weights go; takes no memory before the first come."""
        assert self.capture is not None, "the request captures nothing"
        return CaptureBuffer(
            self.capture,
            0,
            dict(num_heads),
            num_padding=0,
            prompt_stop=num_prompt,
            fed_before=0,
            max_new_tokens=max_new_tokens,
        )


def parse_attention_args(extra_args: Mapping[str, Any] | None) -> AttentionArgs | None:
    """What a request's extra arguments ask for; None: nothing. Raises RequestError for what isn't understood."""
    given = extra_args or {}
    steering, capture = given.get(STEER), given.get(CAPTURE)
    steerings = () if steering is None else _steerings(_read(STEER, steering))
    captured = None if capture is None else _capture(_read(CAPTURE, capture))
    return AttentionArgs(steerings, captured) if steerings or captured is not None else None


def _read(name: str, value: Any) -> Any:
    """JSON, which vllm_xargs has no other place for than a text."""
    if not isinstance(value, str):
        return value
    if len(value) > _MAX_TEXT:
        raise RequestError(f"{name} has {len(value)} characters; {_MAX_TEXT} are possible.")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is {quoted(value)}, which isn't JSON: {error}.") from None


def _steerings(value: Any) -> tuple[Steering, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_SPANS:
        raise RequestError(f"{STEER} is {quoted(value)}; it must be a list of 1 to {MAX_SPANS} objects.")
    made = []
    for one in value:
        _check_keys(STEER, one, _STEER_KEYS, {"start", "end"})
        if (one.get("strength") is None) == (one.get("share") is None):
            raise RequestError(f"{STEER} has {quoted(one)}; give either strength or share.")
        span = (one["start"], one["end"])
        if not all(map(is_whole, span)):
            raise RequestError(f"{STEER} has the span {quoted(span)}; give start and end as tokens of the prompt.")
        layers, heads = _numbers(STEER, one, "layers"), _numbers(STEER, one, "heads")
        strength = 1.0 if one.get("strength") is None else one["strength"]
        made.append(Steering(spans=(span,), strength=strength, share=one.get("share"), layers=layers, heads=heads))
    return tuple(made)


def _capture(value: Any) -> CaptureRequest:
    _check_keys(CAPTURE, value, _CAPTURE_KEYS, {"layers", "queries"})
    return CaptureRequest(
        layers=_numbers(CAPTURE, value, "layers"),
        heads=_numbers(CAPTURE, value, "heads"),
        queries=value["queries"],
        reduce=value.get("reduce"),
        dtype=value.get("dtype", "float32"),
        budget_bytes=MAX_CAPTURE_BYTES,
    )


def _check_keys(name: str, value: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(value, dict) or not needed <= value.keys() <= known:
        raise RequestError(
            f"{name} has {quoted(value)}; it must be an object with {sorted(needed)}, of {sorted(known)}."
        )


def _numbers(name: str, value: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    numbers = value.get(key)
    if numbers is None:
        return None
    if not isinstance(numbers, list) or not all(is_whole(number) for number in numbers):
        raise RequestError(f"{name}.{key} is {quoted(numbers)}; it must be a list of whole numbers.")
    return tuple(dict.fromkeys(numbers))
