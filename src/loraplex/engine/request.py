"""What a caller asks of the engine and what it gets back."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from torch import Tensor

from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import LoraplexError
from loraplex.models.auto.selection import AutoChoice, Candidates
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.residual.steering import Steering
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.xlora.scalings.row_scalings import RowScalings

FinishReason = Literal["stop", "length", "cancelled", "error"]
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
# Pictures (Pillow's, or encoded bytes), each of which the prompt has one image token for; or by name the tensors that
# transformers' processor made together with the prompt's token ids.
Images = Sequence[Any] | Mapping[str, Tensor]
Pooling = Literal["mean", "last"]
TokenScalings = tuple[tuple[float, ...], ...]  # [mixtures][experts]  means over LoRA layers


@dataclass(frozen=True)
class Request:
    """A prompt (a text, token ids, or the messages of a chat), its adapters, and how to sample."""

    prompt: Prompt
    _: KW_ONLY
    adapters: AdapterSpec = None  # "auto": the one that the prompt is for
    candidates: Candidates = field(default_factory=Candidates)  # of "auto"
    images: Images = ()  # of a vision-language model
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0  # higher goes first
    capture: CaptureRequest | None = None  # which attention weights to keep; n must be 1
    steering: tuple[Steering, ...] = ()  # spans of the prompt's tokens, for all answers
    # Of vectors and ReFT interventions of the link, by name: the layers at which they act; others act at all they have.
    residual_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    return_scalings: bool = False  # of the link's mixtures, for every token that is run
    scalings_budget_bytes: int | None = None  # what an answer's scalings may take; None: no limit
    cache_salt: str = ""  # requests share keys and values only with those of the same salt
    # The prompt's last hidden states, through the row's adapters, as one vector; no token is chosen, and n must be 1.
    pooling: Pooling | None = None


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
    # With return_scalings one entry a token: the scalings of the token before it, which was run to give it. An answer's
    # first are those of the prompt's last token; its own last token is never run.
    scalings: tuple[TokenScalings, ...] = ()
    auto: AutoChoice | None = None  # what "auto" chose


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: LoraplexError | None = None
    capture: AttentionCapture | None = None  # None too for an answer that ended before it ran
    scalings: tuple[RowScalings, ...] | None = None  # of each mixture of the link, for the tokens that were run
    embedding: Tensor | None = None  # [hidden], float32, with `pooling`


@dataclass(frozen=True, kw_only=True)
class RequestResult:
    """A finished request; the fields of its first answer are also its own."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]  # n of them
    num_cached_tokens: int  # of the prompt, whose keys and values were there already
    queue_s: float | None = None  # from the request's arrival until it ran; None: it never did
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # None for a token that has none: the first
    auto: AutoChoice | None = None  # what "auto" chose; None too where the request ended before

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

    @property
    def capture(self) -> AttentionCapture | None:
        return self.completions[0].capture

    @property
    def scalings(self) -> tuple[RowScalings, ...] | None:
        return self.completions[0].scalings

    @property
    def embedding(self) -> Tensor | None:
        return self.completions[0].embedding
