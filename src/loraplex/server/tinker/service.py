"""What the calls of the Tinker API share: sessions, runs, checkpoints, sampling clients, and who may see which."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraplex.engine.async_engine import AsyncEngine
from loraplex.errors import LoraplexError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.server.api.api_errors import BAD_REQUEST, NOT_FOUND, RATE_LIMITED, ApiError, Status
from loraplex.server.auth.access import Principal
from loraplex.server.settings import TrainingSettings
from loraplex.server.tinker.codec import TinkerCodec
from loraplex.server.tinker.futures import SampleFutures
from loraplex.server.tinker.samplers import SamplerAdapters, path_of
from loraplex.server.tinker.sessions import ClientSession, SessionStore
from loraplex.training.service.checkpoints import CheckpointPath, CheckpointRecord, Checkpoints
from loraplex.training.service.datums import DatumLimits
from loraplex.training.service.loop import TrainingLoop
from loraplex.training.service.settings import RunSettings

GONE = Status(410, "invalid_request_error", "gone")


class TinkerService:
    """One for each server; `close` ends its thread."""

    def __init__(self, engine: AsyncEngine, settings: TrainingSettings, base_name: str) -> None:
        """Raises BaseModelError for a base model that can't be trained on."""
        self.model: MultiLoraModel = engine.model
        self.base_name = base_name
        root = Path(settings.training_folder)
        self.checkpoints = Checkpoints(root / "runs")
        self.sessions = SessionStore(root / "sessions")
        self.samplers = SamplerAdapters(self.model, self.checkpoints)
        self.futures = SampleFutures()
        limits = settings.limits()
        self.max_length = min(engine.max_length, limits.max_datum_tokens)
        output = self.model.base.get_output_embeddings()
        self.codec = TinkerCodec(
            DatumLimits(
                max_length=self.max_length,
                max_tokens=limits.max_request_tokens,
                num_embeddings=engine.vocab_size,
                num_logits=int(getattr(output, "out_features", engine.vocab_size)),
            )
        )
        self.loop = TrainingLoop(
            self.model.base,
            self.model.adaptable,
            root=root / "runs",
            checkpoints=self.checkpoints,
            codec=self.codec,
            publish=self.samplers.publish,
            limits=limits,
        )

    def close(self) -> None:
        self.loop.close()

    # Who may see what: what is another's is told as if it were not there

    def session(self, session_id: str, principal: Principal) -> ClientSession:
        """A session that goes on. Raises ApiError."""
        session = self.sessions.find(session_id)
        if session is None or not _owns(session.owner, principal):
            raise ApiError(NOT_FOUND, f"there is no session {session_id[:100]!r}.", param="session_id")
        return session

    def open_session(self, session_id: str, principal: Principal) -> ClientSession:
        """One that takes new requests. Raises ApiError: 410 for one that its client has finished."""
        session = self.session(session_id, principal)
        if session.finished is not None:
            raise ApiError(GONE, f"the session has finished ({session.finished}). Begin a new one.")
        return session

    def run(self, run_id: str, principal: Principal) -> RunSettings:
        """A run's settings. Raises ApiError."""
        settings = self.loop.folders.settings(run_id) if self.loop.folders.has(run_id) else None
        if settings is None or not _owns(settings.owner, principal):
            raise ApiError(NOT_FOUND, f"there is no training run {run_id[:100]!r}.", param="model_id")
        return settings

    def checkpoint(self, path: CheckpointPath, principal: Principal, *, to_change: bool = False) -> CheckpointRecord:
        """A checkpoint that the principal may use. Raises ApiError."""
        record = self.checkpoints.find(path)
        may_use = record is not None and (_owns(record.owner, principal) or (record.public and not to_change))
        if record is None or not may_use:
            raise ApiError(NOT_FOUND, f"there is no checkpoint {str(path)!r}, or this key may not use it.")
        return record

    def may_use(self, name: str, principal: Principal) -> bool:
        """Whether a principal may use the adapter of a checkpoint, by its name in the model."""
        path = path_of(name)
        return path is None or self.may_use_path(path, principal)

    def adapter_for(self, text: str, principal: Principal) -> str:
        """The adapter that `model="tinker://..."` stands for, loaded. Raises ApiError."""
        try:
            path = CheckpointPath.parse(text)
            if not self.may_use_path(path, principal):
                raise ApiError(NOT_FOUND, f"there is no checkpoint {text[:300]!r}, or this key may not use it.")
            return self.adapter_of(path)
        except LoraplexError as error:
            raise ApiError(BAD_REQUEST, str(error), param="model") from error

    def adapter_of(self, path: CheckpointPath) -> str:
        """The adapter of a checkpoint, loaded. Raises ApiError, and what loading raises.

        A server that was killed may have told a client of weights that it had in memory alone: the run has them again
        once its requests since the last snapshot are carried out.
        """
        if not self.samplers.has(path) and self.loop.is_behind(path.run_id):
            raise ApiError(RATE_LIMITED, f"{path} is being brought back after a restart. Send it again.")
        return self.samplers.name_of(path)

    def may_use_path(self, path: CheckpointPath, principal: Principal) -> bool:
        if self.loop.folders.has(path.run_id) and _owns(self.loop.folders.settings(path.run_id).owner, principal):
            return True
        record = self.checkpoints.find(path)
        return record is not None and (record.public or _owns(record.owner, principal))

    def change(self, path: CheckpointPath, principal: Principal, **fields: Any) -> None:
        """Change a checkpoint's record."""
        record = self.checkpoint(path, principal, to_change=True)
        self.checkpoints.change(path, replace(record, **fields))

    def check_base(self, name: str | None) -> None:
        """Raise ApiError for another base model than the server's."""
        if name is not None and name != self.base_name:
            message = f"base_model is {name[:200]!r}; this server has {self.base_name!r} alone."
            raise ApiError(BAD_REQUEST, message, param="base_model")

    def tokenizer_id(self) -> str:
        """Where the SDK finds the tokenizer: the base model's folder or hub id."""
        return str(self.model.source or self.base_name)


def _owns(owner: str, principal: Principal) -> bool:
    return principal.may_manage or owner == principal.id


def run_id_of(session_id: str, seq: int) -> str:
    """As the SDK makes it, too."""
    return f"{session_id}:train:{seq}"


def split_request_id(request_id: str) -> tuple[str, int] | None:
    """The run and the number of a request's id; None for one that isn't a run's."""
    run_id, _, number = request_id.rpartition(":")
    if ":train:" not in run_id or not number.isdigit() or len(number) > 10:
        return None
    return run_id, int(number)


def checkpoint_json(service: TinkerService, record: CheckpointRecord) -> Mapping[str, Any]:
    """A checkpoint, as lists of them have it."""
    path = CheckpointPath.parse(record.path)
    return {
        "checkpoint_id": path.checkpoint_id,
        "checkpoint_type": path.kind,
        "time": iso_time(record.created),
        "tinker_path": record.path,
        "size_bytes": service.checkpoints.num_bytes(path),
        "public": record.public,
        "user_metadata": record.user_metadata,
        "expires_at": None if record.expires is None else iso_time(record.expires),
    }


def iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
