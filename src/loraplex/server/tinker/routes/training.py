"""Training runs: losses and gradients, optimizer steps, saving and loading, and the results of all these."""

import asyncio
import secrets
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial

from fastapi import APIRouter, Request, Response

from loraplex.server.api.api_errors import BAD_REQUEST, RATE_LIMITED, ApiError
from loraplex.server.api.json_route import JsonRoute, documented, json_response
from loraplex.server.state import until_client_leaves
from loraplex.server.tinker.bodies import (
    CancelFuture,
    CreateModel,
    GetInfo,
    LoadWeights,
    OptimizerChoice,
    OptimStepBody,
    RetrieveFuture,
    SaveExternal,
    SaveForSampler,
    SaveWeights,
)
from loraplex.server.tinker.codec import PROTOBUF
from loraplex.server.tinker.routes.common import PROMISE, TinkerCall, promise
from loraplex.server.tinker.service import GONE, run_id_of, split_request_id
from loraplex.server.tinker.wire import MEDIA, LossRequest
from loraplex.training.service.checkpoints import CheckpointPath
from loraplex.training.service.journal import JournalRecord
from loraplex.training.service.operations import PublishWeights
from loraplex.training.service.settings import MAX_SEED, RunSettings, check_lora
from loraplex.training.service.targets import target_modules

router = APIRouter(route_class=JsonRoute, prefix="/api/v1")
_POLL_S = 20.0  # how long a question for a result waits; the SDK asks again
_LOOK_S = 0.5  # between two looks at whether the server shuts down


@router.post("/create_model", responses=PROMISE)
async def create_model(body: CreateModel, http: Request) -> Response:
    """Begin a training run: a LoRA on the base model, with first weights from a seed."""
    call = TinkerCall(http)
    raw = await http.body()
    run_id = run_id_of(body.session_id, body.model_seq_id)
    lora, service = body.lora_config, call.service
    _check_optimizer(body.optimizer_config)
    service.check_base(body.base_model)
    if lora is None:
        raise ApiError(BAD_REQUEST, "lora_config is missing: adapters are trained here.", param="lora_config")

    def begin() -> None:
        check_lora(lora.rank, lora.seed, service.loop.limits)
        seed = secrets.randbelow(MAX_SEED) if lora.seed is None else lora.seed
        layout = LoraLayout(
            rank=lora.rank, train_attn=lora.train_attn, train_mlp=lora.train_mlp, train_unembed=lora.train_unembed
        )
        _begin(call, body, layout, seed, JournalRecord(0, "begin", raw))

    await call.in_thread(begin)
    return promise(run_id, 0)


@dataclass(frozen=True, kw_only=True)
class LoraLayout:
    """What a run adapts."""

    rank: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool


def _begin(
    call: TinkerCall, body: CreateModel | LoadWeights, layout: LoraLayout, seed: int, record: JournalRecord
) -> None:
    """A new run in its session. Raises ApiError where the key has as many runs as it may have."""
    service, key = call.service, call.principal.key
    assert body.session_id is not None and body.model_seq_id is not None, "a run is one of a session"  # noqa: PT018
    session = service.open_session(body.session_id, call.principal)
    settings = RunSettings(
        run_id=run_id_of(session.id, body.model_seq_id),
        owner=call.principal.id,
        base_model=service.base_name,
        seed=seed,
        target_modules=target_modules(
            service.model.adaptable,
            attention=layout.train_attn,
            feed_forward=layout.train_mlp,
            output=layout.train_unembed,
        ),
        user_metadata=body.user_metadata or {},
        created=time.time(),
        **asdict(layout),
    )
    loop, most = service.loop, None if key is None else key.max_training_runs
    if most is not None and not loop.folders.has(settings.run_id) and loop.num_runs_of(settings.owner) >= most:
        message = f"this key has {most} training runs at work, its limit. Finish one, or wait until it is idle."
        raise ApiError(RATE_LIMITED, message)
    loop.begin(settings, record, service.codec.parse(record.kind, record.body, settings.run_id))
    service.sessions.add_run(session, settings.run_id)


def _check_optimizer(choice: OptimizerChoice | None) -> None:
    if choice is not None and choice.type != "adamw":
        message = f"optimizer_config is of {choice.type!r}; this server has 'adamw' alone."
        raise ApiError(BAD_REQUEST, message, param="optimizer_config")


@router.post("/forward_backward", responses=PROMISE)
async def forward_backward(http: Request) -> Response:
    """Losses of data, in protobuf; without forward_only their gradients add up until the optimizer step."""
    call = TinkerCall(http)
    body = await http.body()
    service = call.service

    def take() -> tuple[str, int, int]:
        request = LossRequest(body)
        settings = service.run(request.model_id, call.principal)
        service.open_session(settings.run_id.partition(":")[0], call.principal)
        record = JournalRecord(request.seq_id, "loss", body)
        parse = partial(service.codec.parse, "loss", body, settings.run_id)
        num_tokens = service.loop.submit(settings.run_id, record, parse)
        return settings.run_id, request.seq_id, num_tokens

    run_id, seq, num_tokens = await call.in_thread(take)
    call.context.spend_tokens(num_tokens)
    call.context.log |= {"run": run_id, "training_tokens": num_tokens}
    return promise(run_id, seq)


@router.post("/optim_step", responses=PROMISE)
async def optim_step(body: OptimStepBody, http: Request) -> Response:
    """One step of AdamW with the settings of this call."""
    return await TinkerCall(http).submit("optim", body.model_id, body.seq_id)


@router.post("/save_weights", responses=PROMISE)
async def save_weights(body: SaveWeights, http: Request) -> Response:
    """A checkpoint to go on from: a PEFT folder with the optimizer's state beside it."""
    return await TinkerCall(http).submit("save", body.model_id, body.seq_id)


@router.post("/save_weights_external", responses=PROMISE)
async def save_weights_external(body: SaveExternal, http: Request) -> Response:
    """A PEFT folder to download."""
    return await TinkerCall(http).submit("save_external", body.model_id, body.seq_id)


@router.post("/save_weights_for_sampler", responses=PROMISE)
async def save_weights_for_sampler(body: SaveForSampler, http: Request) -> Response:
    """Weights to sample with: a checkpoint by name, or a sampling client's own."""
    call = TinkerCall(http)
    raw, service = await http.body(), call.service
    response = await call.submit("save_sampler", body.model_id, body.seq_id)
    operation = service.codec.parse("save_sampler", raw, body.model_id)
    if isinstance(operation, PublishWeights):
        session = service.session(body.model_id.partition(":")[0], call.principal)
        sampler = operation.sampler_id, str(operation.path)
        await call.in_thread(lambda: service.sessions.add_sampler(session, *sampler))
    return response


@router.post("/load_weights", responses=PROMISE)
async def load_weights(body: LoadWeights, http: Request) -> Response:
    """Go on from a checkpoint, in a run or as a new one."""
    call = TinkerCall(http)
    raw, service = await http.body(), call.service
    _check_optimizer(body.optimizer_config)
    service.check_base(body.base_model)
    path = CheckpointPath.parse(body.path)
    if body.model_id is not None and body.seq_id is not None:
        await call.in_thread(lambda: service.checkpoint(path, call.principal))
        return await call.submit("load", body.model_id, body.seq_id)
    if body.session_id is None or body.model_seq_id is None:
        raise ApiError(BAD_REQUEST, "give model_id and seq_id, or session_id and model_seq_id.", param="model_id")

    def begin() -> None:
        record = service.checkpoint(path, call.principal)
        service.check_base(record.base_model)
        layout = LoraLayout(
            rank=record.rank,
            train_attn=record.train_attn,
            train_mlp=record.train_mlp,
            train_unembed=record.train_unembed,
        )
        _begin(call, body, layout, 0, JournalRecord(0, "load", raw))

    await call.in_thread(begin)
    return promise(run_id_of(body.session_id, body.model_seq_id), 0)


@router.post("/get_info", responses=documented("The run.", 400, 401, 404, required=("model_data", "model_id")))
async def get_info(body: GetInfo, http: Request) -> Response:
    """A run's base model, tokenizer and LoRA."""
    call = TinkerCall(http)
    settings = await call.in_thread(lambda: call.service.run(body.model_id, call.principal))
    base = call.service.model.base
    data = {
        "arch": type(base).__name__,
        "model_name": settings.base_model,
        "tokenizer_id": call.service.tokenizer_id(),
    }
    return json_response(
        {
            "type": "get_info",
            "model_data": data,
            "model_id": settings.run_id,
            "is_lora": True,
            "lora_rank": settings.rank,
            "model_name": settings.base_model,
            "optimizer_config": {"type": "adamw"},
        }
    )


@router.post("/retrieve_future", responses=documented("The result, or an error.", 400, 401, 404))
async def retrieve_future(body: RetrieveFuture, http: Request) -> Response:
    """The result of a request; 408 while it isn't there, 410 for one that is no longer known."""
    call = TinkerCall(http)
    found = split_request_id(body.request_id)
    if found is None:
        return await _sample(call, body.request_id)
    run_id, seq = found

    def look() -> "Future[bytes] | None":
        call.service.run(run_id, call.principal)
        return call.service.loop.result(run_id, seq)

    future = await call.in_thread(look)
    if future is None:
        raise ApiError(GONE, f"the result of {body.request_id[:200]!r} is not known, or no longer kept.")
    content = await _wait(call, asyncio.wrap_future(future))
    if content is None:
        paused = call.service.loop.waits_for_place(run_id)
        return _try_again(body.request_id, "paused_capacity" if paused else "active")
    return _answer(content)


async def _sample(call: TinkerCall, request_id: str) -> Response:
    future = call.service.futures.find(request_id)
    if future is None or not (call.principal.may_manage or future.owner == call.principal.id):
        raise ApiError(
            GONE, f"the request {request_id[:200]!r} is not known, or its result no longer kept. Send it again."
        )
    content = None if future.task is None else await _wait(call, future.task)
    if content is None:
        return _try_again(request_id, "active")
    future.asked = time.monotonic()
    return _answer(content)


async def _wait(call: TinkerCall, result: "asyncio.Future[bytes]") -> bytes | None:
    """The result, or None where it takes longer than a question may. Raises ClientLeft."""

    async def wait() -> None:
        stop = time.monotonic() + _POLL_S
        while not result.done() and time.monotonic() < stop and not call.state.is_draining:
            await asyncio.wait({result}, timeout=_LOOK_S)

    await until_client_leaves(call.http.receive, wait())
    return result.result() if result.done() else None


def _answer(content: bytes) -> Response:
    is_protobuf = content.startswith(PROTOBUF)
    return Response(content[1:], media_type=MEDIA if is_protobuf else "application/json")


def _try_again(request_id: str, queue_state: str) -> Response:
    told = {"type": "try_again", "request_id": request_id, "queue_state": queue_state}
    if queue_state != "active":
        told["queue_state_reason"] = "all places for training runs are taken (training_runs)"
    return json_response(told, 408)


@router.post("/cancel_future", responses=documented("Cancelled.", 400, 401))
async def cancel_future(body: CancelFuture, http: Request) -> Response:
    """Stop a sampling request; requests of training runs are carried out in any case."""
    call = TinkerCall(http)
    future = call.service.futures.find(body.request_id)
    if future is not None and (call.principal.may_manage or future.owner == call.principal.id):
        call.service.futures.drop(body.request_id)
    return json_response({})
