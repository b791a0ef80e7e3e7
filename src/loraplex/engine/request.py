"""What a caller asks of the engine and what it gets back."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from loraplex.engine.sampling import SamplingParams
from loraplex.errors import LoraplexError
from loraplex.routing.choice import RowChoice

FinishReason = Literal["stop", "length", "cancelled", "error"]
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Request:
    """A prompt (a text, token ids, or the messages of a chat), its adapters, and how to sample."""

    prompt: Prompt
    _: KW_ONLY
    adapters: RowChoice = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0  # higher goes first


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of probabilities, of the model's own logits: before penalties, temperature and filters."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, in order


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step added to one of a request's answers."""

    request_id: str
    index: int  # of the answer, below n
    token_ids: tuple[int, ...]
    text: str  # complete characters that can't be part of a stop string
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: LoraplexError | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: LoraplexError | None = None


@dataclass(frozen=True, kw_only=True)
class RequestResult:
    """A finished request; the fields of its first answer are also its own."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]  # n of them
    num_cached_tokens: int  # of the prompt, whose keys and values were there already

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.completions[0].logprobs

    @property
    def error(self) -> LoraplexError | None:
        return self.completions[0].error
