"""Requests of training runs as operations, also when they are read again from a journal, and results as bytes."""

from collections.abc import Callable

import orjson
from pydantic import ValidationError

from loraplex.errors import LoraplexError, RequestError
from loraplex.server.tinker.bodies import (
    LoadWeights,
    OptimStepBody,
    SaveExternal,
    SaveForSampler,
    SaveWeights,
    adam_params,
)
from loraplex.server.tinker.wire import LossRequest, loss_output
from loraplex.training.service.checkpoints import CheckpointPath, check_name, check_ttl
from loraplex.training.service.datums import DatumLimits, check_datums, check_num_tokens
from loraplex.training.service.losses import choose_loss
from loraplex.training.service.operations import (
    BeginRun,
    Done,
    FailedCall,
    ForwardBackward,
    LoadCheckpoint,
    LossResult,
    Operation,
    OptimStep,
    PublishWeights,
    RefusedCall,
    Result,
    SaveCheckpoint,
)

JSON, PROTOBUF = b"J", b"P"  # what an encoded result begins with
INFLIGHT = "inflight"


class TinkerCodec:
    """Of one base model."""

    def __init__(self, limits: DatumLimits) -> None:
        self._limits = limits
        self._parsers: dict[str, Callable[[bytes, str], Operation]] = {
            "begin": lambda body, run_id: BeginRun(),
            "loss": self._losses,
            "optim": _optimizer_step,
            "save": _save,
            "save_sampler": _save_for_sampler,
            "save_external": _save_external,
            "load": _load,
        }

    def parse(self, kind: str, body: bytes, run_id: str) -> Operation:
        """A request that is wrong keeps its place in the order: the SDK doesn't send it again under the same number."""
        try:
            return self._parsers[kind](body, run_id)
        except LoraplexError as error:
            return RefusedCall(error)
        except ValidationError as error:
            return RefusedCall(RequestError(f"the request can't be read: {error.errors()[0]['msg']}."))

    def _losses(self, body: bytes, run_id: str) -> Operation:
        request = LossRequest(body)
        loss = choose_loss(request.loss_fn, request.config())
        check_num_tokens(request.num_tokens(), self._limits)
        datums = request.datums()
        check_datums(datums, loss, self._limits)
        return ForwardBackward(datums=datums, loss=loss, backward=request.backward)

    def encode(self, result: Result) -> bytes:
        match result:
            case LossResult():
                return PROTOBUF + loss_output(result.logprobs, {"loss:sum": result.loss})
            case Done(fields):
                return JSON + orjson.dumps(fields)
            case FailedCall(message, by_user):
                return JSON + failure(message, by_user=by_user)


def failure(message: str, *, by_user: bool) -> bytes:
    """A failed future's answer."""
    return orjson.dumps({"error": message, "category": "user" if by_user else "server"})


def _optimizer_step(body: bytes, run_id: str) -> Operation:
    return OptimStep(adam_params(OptimStepBody.model_validate_json(body)))


def _save(body: bytes, run_id: str) -> Operation:
    wanted = SaveWeights.model_validate_json(body)
    check_ttl(wanted.ttl_seconds)
    name = check_name(wanted.path) if wanted.path else f"step-{wanted.seq_id}"
    return SaveCheckpoint(
        path=CheckpointPath(run_id, "weights", name),
        overwrite=wanted.overwrite,
        ttl_s=wanted.ttl_seconds,
        user_metadata=wanted.user_metadata,
    )


def _save_external(body: bytes, run_id: str) -> Operation:
    wanted = SaveExternal.model_validate_json(body)
    check_ttl(wanted.ttl_seconds)
    if wanted.age_encryption_recipients:
        raise RequestError("age_encryption_recipients is set, and files aren't encrypted here. Leave it out.")
    path = CheckpointPath(run_id, "external_weights", check_name(wanted.path))
    return SaveCheckpoint(path=path, ttl_s=wanted.ttl_seconds)


def _save_for_sampler(body: bytes, run_id: str) -> Operation:
    wanted = SaveForSampler.model_validate_json(body)
    check_ttl(wanted.ttl_seconds)
    if wanted.path is not None:
        return SaveCheckpoint(
            path=CheckpointPath(run_id, "sampler_weights", check_name(wanted.path)),
            ttl_s=wanted.ttl_seconds,
            user_metadata=wanted.user_metadata,
        )
    if wanted.sampling_session_seq_id is None:
        raise RequestError("path and sampling_session_seq_id are both missing. Give one of them.")
    is_inflight = wanted.kind == INFLIGHT
    return PublishWeights(
        sampler_id=sampler_id(run_id.partition(":")[0], wanted.sampling_session_seq_id),
        path=CheckpointPath(run_id, "sampler_weights", f"_{INFLIGHT}" if is_inflight else f"_at-{wanted.seq_id}"),
        inflight=is_inflight,
    )


def _load(body: bytes, run_id: str) -> Operation:
    wanted = LoadWeights.model_validate_json(body)
    if wanted.weights_access_token is not None:
        raise RequestError("weights_access_token isn't taken here. Publish the checkpoint, and load it without.")
    return LoadCheckpoint(CheckpointPath.parse(wanted.path), wanted.optimizer)


def sampler_id(session_id: str, seq: int) -> str:
    return f"{session_id}:sample:{seq}"
