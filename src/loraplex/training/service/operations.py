"""What a client can ask of its run, in the order of its requests, and what it gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loraplex.errors import LoraplexError
from loraplex.training.service.checkpoints import CheckpointPath
from loraplex.training.service.datums import Datum
from loraplex.training.service.losses import ChosenLoss
from loraplex.training.service.settings import AdamParams


@dataclass(frozen=True, eq=False, kw_only=True)
class ForwardBackward:
    """Losses of some data; with `backward` their gradients are added to what the next optimizer step takes."""

    datums: Sequence[Datum]
    loss: ChosenLoss
    backward: bool


@dataclass(frozen=True)
class OptimStep:
    """One step of the optimizer."""

    params: AdamParams


@dataclass(frozen=True, kw_only=True)
class SaveCheckpoint:
    """Write a checkpoint that clients can name."""

    path: CheckpointPath
    overwrite: bool = False
    ttl_s: int | None = None
    user_metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class PublishWeights:
    """Let a sampling client use the weights as they are now, or as they are at any time (`inflight`)."""

    sampler_id: str
    path: CheckpointPath
    inflight: bool = False


@dataclass(frozen=True)
class LoadCheckpoint:
    """Go on from a checkpoint."""

    path: CheckpointPath
    optimizer: bool


@dataclass(frozen=True)
class BeginRun:
    """A run's first request, where it begins with fresh weights."""


@dataclass(frozen=True)
class RefusedCall:
    """A request that can't be carried out; those behind it go on."""

    error: LoraplexError


Operation = ForwardBackward | OptimStep | SaveCheckpoint | PublishWeights | LoadCheckpoint | BeginRun | RefusedCall


@dataclass(frozen=True, eq=False, kw_only=True)
class LossResult:
    """What ForwardBackward gives."""

    logprobs: Sequence[Tensor]  # of each datum, as its targets
    loss: float  # the sum
    num_tokens: int


@dataclass(frozen=True)
class Done:
    """What the other requests give: fields of a JSON object."""

    fields: Mapping[str, object]


@dataclass(frozen=True)
class FailedCall:
    """Why a request failed; `by_user` where its content was at fault."""

    message: str
    by_user: bool


Result = LossResult | Done | FailedCall


class OperationCodec(Protocol):
    """Between requests as they were sent and operations, and between results and answers."""

    def parse(self, kind: str, body: bytes, run_id: str) -> Operation:
        """Of a request that is read again; whatever is wrong with it is a RefusedCall."""
        ...

    def encode(self, result: Result) -> bytes:
        """As the client gets it."""
        ...
