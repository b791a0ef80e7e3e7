"""The requests that need no pass: optimizer steps, checkpoints, weights for sampling."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from loraplex.adapters.weights import Adapter
from loraplex.errors import RequestError
from loraplex.training.service.checkpoints import CheckpointPath, CheckpointRecord, Checkpoints
from loraplex.training.service.operations import (
    BeginRun,
    Done,
    FailedCall,
    ForwardBackward,
    LoadCheckpoint,
    Operation,
    OptimStep,
    PublishWeights,
    RefusedCall,
    Result,
    SaveCheckpoint,
)
from loraplex.training.service.run import TrainingRun

Publish = Callable[[PublishWeights, Adapter], None]  # let requests sample with the adapter from now on


@dataclass(frozen=True)
class CarriedOut:
    """A request's result, and what is left to write; without a result, that of the writing is the request's."""

    result: Result | None
    write: Callable[[], Result] | None = None


def carry_out(
    run: TrainingRun, seq: int, operation: Operation, checkpoints: Checkpoints, publish: Publish
) -> CarriedOut:
    """Do it; raises what the request is to be told."""
    match operation:
        case RefusedCall(error):
            return CarriedOut(FailedCall(str(error), by_user=True))
        case BeginRun():
            return CarriedOut(Done({"model_id": run.settings.run_id, "type": "create_model"}))
        case OptimStep(params):
            return CarriedOut(Done({"metrics": run.step(params)}))
        case SaveCheckpoint():
            return _save(run, seq, operation, checkpoints)
        case PublishWeights():
            return _published(run, seq, operation, checkpoints, publish)
        case LoadCheckpoint():
            return CarriedOut(_loaded(run, operation, checkpoints))
        case ForwardBackward():
            raise AssertionError("losses are computed in passes")


def _save(run: TrainingRun, seq: int, operation: SaveCheckpoint, checkpoints: Checkpoints) -> CarriedOut:
    adapter = run.adapter()
    optimizer = {name: tensor.cpu().clone() for name, tensor in run.optimizer.tensors().items()}
    record = _record(
        run,
        seq,
        operation.path,
        user_metadata=operation.user_metadata,
        expires=None if operation.ttl_s is None else time.time() + operation.ttl_s,
    )

    def write() -> Result:
        kept = optimizer if operation.path.kind == "training" else None
        checkpoints.write(adapter, record, kept, overwrite=operation.overwrite)
        return Done({"path": str(operation.path)})

    return CarriedOut(None, write)


def _published(
    run: TrainingRun, seq: int, operation: PublishWeights, checkpoints: Checkpoints, publish: Publish
) -> CarriedOut:
    """Requests may sample at once; the folder follows, for a server that begins anew."""
    adapter = run.adapter()
    record = _record(run, seq, operation.path, listed=False)
    publish(operation, adapter)

    def write() -> Result:
        checkpoints.write(adapter, record, overwrite=True)
        checkpoints.drop_unlisted(run.settings.run_id)
        return Done({})

    return CarriedOut(Done({"sampling_session_id": operation.sampler_id}), write)


def _loaded(run: TrainingRun, operation: LoadCheckpoint, checkpoints: Checkpoints) -> Result:
    if checkpoints.find(operation.path) is None:
        raise RequestError(f"there is no checkpoint {operation.path}. It was never saved, was deleted, or has expired.")
    adapter = checkpoints.read(operation.path)
    optimizer = checkpoints.read_optimizer(operation.path) if operation.optimizer else None
    run.load(adapter.layers, optimizer)
    return Done({"path": str(operation.path), "model_id": run.settings.run_id, "type": "load_weights"})


def _record(run: TrainingRun, seq: int, path: CheckpointPath, **fields: object) -> CheckpointRecord:
    settings = run.settings
    return CheckpointRecord(
        path=str(path),
        owner=settings.owner,
        created=time.time(),
        seq=seq,
        rank=settings.rank,
        base_model=settings.base_model,
        train_attn=settings.train_attn,
        train_mlp=settings.train_mlp,
        train_unembed=settings.train_unembed,
        num_steps=run.num_steps,
        **fields,  # type: ignore[arg-type]
    )
