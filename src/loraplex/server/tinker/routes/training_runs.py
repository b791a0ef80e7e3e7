"""What was trained: runs and their checkpoints, which are listed, kept for a time, shared, downloaded and deleted."""

import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from loraplex.server.api.json_route import JsonRoute, documented, json_response
from loraplex.server.tinker.bodies import ChangeTtl, WeightsInfo
from loraplex.server.tinker.routes.common import TinkerCall
from loraplex.server.tinker.service import TinkerService, checkpoint_json, iso_time
from loraplex.training.service.checkpoints import SCHEME, CheckpointPath, check_ttl
from loraplex.training.service.settings import RunSettings

router = APIRouter(route_class=JsonRoute, prefix="/api/v1")
_MAX_LISTED = 200
_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{folder}/{name}"
_CHANGED = documented("Done.", 400, 401, 404)


@router.get("/training_runs", responses=documented("The key's runs.", 401, required=("training_runs", "cursor")))
async def list_runs(http: Request, limit: int = 20, offset: int = 0) -> Response:
    """Training runs, newest first."""
    call = TinkerCall(http)

    def look() -> tuple[list[Mapping[str, Any]], int]:
        owned = [own for own in call.service.loop.folders.all_settings() if _sees(call, own)]
        shown = _page(owned, limit, offset)
        return [_run_json(call.service, own) for own in shown], len(owned)

    runs, total = await call.in_thread(look)
    return json_response({"training_runs": runs, "cursor": {"offset": offset, "limit": limit, "total_count": total}})


@router.get("/training_runs/{run_id}", responses=documented("The run.", 401, 404, required=("training_run_id",)))
async def get_run(run_id: str, http: Request) -> Response:
    """One training run."""
    call = TinkerCall(http)
    return json_response(
        await call.in_thread(lambda: _run_json(call.service, call.service.run(run_id, call.principal)))
    )


@router.get("/training_runs/{run_id}/checkpoints", responses=documented("Its checkpoints.", 401, 404))
async def run_checkpoints(run_id: str, http: Request) -> Response:
    """A run's checkpoints, newest first."""
    call = TinkerCall(http)

    def look() -> list[Mapping[str, Any]]:
        call.service.run(run_id, call.principal)
        return [checkpoint_json(call.service, record) for record in call.service.checkpoints.of_run(run_id)]

    return json_response({"checkpoints": await call.in_thread(look)})


@router.get("/checkpoints", responses=documented("The key's checkpoints.", 401, required=("checkpoints",)))
async def list_checkpoints(http: Request, limit: int = 100, offset: int = 0) -> Response:
    """Checkpoints of all runs, newest first."""
    call = TinkerCall(http)

    def look() -> tuple[list[Mapping[str, Any]], int]:
        runs = [own.run_id for own in call.service.loop.folders.all_settings() if _sees(call, own)]
        records = [record for run_id in runs for record in call.service.checkpoints.of_run(run_id)]
        records.sort(key=lambda record: -record.created)
        return [checkpoint_json(call.service, record) for record in _page(records, limit, offset)], len(records)

    found, total = await call.in_thread(look)
    return json_response({"checkpoints": found, "cursor": {"offset": offset, "limit": limit, "total_count": total}})


@router.post("/weights_info", responses=documented("The LoRA.", 400, 401, 404, required=("base_model", "is_lora")))
async def weights_info(body: WeightsInfo, http: Request) -> Response:
    """What is needed to load a checkpoint."""
    call = TinkerCall(http)
    path = CheckpointPath.parse(body.tinker_path)
    record = await call.in_thread(lambda: call.service.checkpoint(path, call.principal))
    return json_response(
        {
            "base_model": record.base_model,
            "is_lora": True,
            "lora_rank": record.rank,
            "train_unembed": record.train_unembed,
            "train_mlp": record.train_mlp,
            "train_attn": record.train_attn,
            "optimizer_config": {"type": "adamw"},
        }
    )


@router.delete(_CHECKPOINT, responses=_CHANGED)
async def delete_checkpoint(run_id: str, folder: str, name: str, http: Request) -> Response:
    """Delete a checkpoint; samples that run with it finish."""

    def delete(service: TinkerService, call: TinkerCall, path: CheckpointPath) -> None:
        service.checkpoint(path, call.principal, to_change=True)
        service.checkpoints.delete(path)
        service.samplers.forget(path)

    return await _change(http, run_id, folder, name, delete)


@router.put(f"{_CHECKPOINT}/ttl", responses=_CHANGED)
async def set_ttl(run_id: str, folder: str, name: str, body: ChangeTtl, http: Request) -> Response:
    """Keep a checkpoint for so long from now on; null keeps it for good."""
    check_ttl(body.ttl_seconds)
    expires = None if body.ttl_seconds is None else time.time() + body.ttl_seconds
    return await _change(
        http, run_id, folder, name, lambda service, call, path: service.change(path, call.principal, expires=expires)
    )


@router.post(f"{_CHECKPOINT}/publish", responses=_CHANGED)
async def publish(run_id: str, folder: str, name: str, http: Request) -> Response:
    """Let all keys of this server use a checkpoint."""
    return await _change(
        http, run_id, folder, name, lambda service, call, path: service.change(path, call.principal, public=True)
    )


@router.delete(f"{_CHECKPOINT}/publish", responses=_CHANGED)
async def unpublish(run_id: str, folder: str, name: str, http: Request) -> Response:
    """Keep it to its owner again."""
    return await _change(
        http, run_id, folder, name, lambda service, call, path: service.change(path, call.principal, public=False)
    )


@router.get(f"{_CHECKPOINT}/archive", responses=documented("A tar file.", 401, 404, media="application/x-tar"))
async def archive(run_id: str, folder: str, name: str, http: Request) -> Response:
    """A checkpoint's folder, as a tar file: an adapter in PEFT's format."""
    call = TinkerCall(http)
    path = _path(run_id, folder, name)

    def pack() -> str:
        call.service.checkpoint(path, call.principal)
        with tempfile.NamedTemporaryFile(suffix=".tar", delete=False) as packed, tarfile.open(packed.name, "w") as tar:
            tar.add(call.service.checkpoints.folder(path), arcname=name)
        return packed.name

    packed = await call.in_thread(pack)
    forget = BackgroundTask(os.unlink, packed)
    return FileResponse(packed, media_type="application/x-tar", filename=f"{name}.tar", background=forget)


async def _change(
    http: Request,
    run_id: str,
    folder: str,
    name: str,
    change: Callable[[TinkerService, TinkerCall, CheckpointPath], None],
) -> Response:
    call = TinkerCall(http)
    path = _path(run_id, folder, name)
    await call.in_thread(lambda: change(call.service, call, path))
    return json_response({})


def _path(run_id: str, folder: str, name: str) -> CheckpointPath:
    return CheckpointPath.parse(f"{SCHEME}{run_id}/{folder}/{name}")


def _sees(call: TinkerCall, settings: RunSettings) -> bool:
    return call.principal.may_manage or settings.owner == call.principal.id


def _page(entries: Sequence[Any], limit: int, offset: int) -> Sequence[Any]:
    return entries[max(0, offset) :][: min(max(0, limit), _MAX_LISTED)]


def _run_json(service: TinkerService, settings: RunSettings) -> Mapping[str, Any]:
    records = service.checkpoints.of_run(settings.run_id)
    newest = {
        kind: next((checkpoint_json(service, r) for r in records if CheckpointPath.parse(r.path).kind == kind), None)
        for kind in ("training", "sampler")
    }
    return {
        "training_run_id": settings.run_id,
        "base_model": settings.base_model,
        "model_owner": settings.owner,
        "is_lora": True,
        "lora_rank": settings.rank,
        "last_request_time": iso_time(service.loop.folders.last_heard(settings.run_id)),
        "last_checkpoint": newest["training"],
        "last_sampler_checkpoint": newest["sampler"],
        "user_metadata": {name: str(value) for name, value in settings.user_metadata.items()} or None,
    }
