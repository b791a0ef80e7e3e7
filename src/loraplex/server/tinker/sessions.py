"""Clients' sessions and their sampling clients, as lines of a file each: they outlive the server's process."""

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraplex.errors import CheckpointError, RequestError
from loraplex.json_files import parse_json, read_lines
from loraplex.output_files import writing

logger = logging.getLogger(__name__)

_ID = re.compile(r"s-[0-9a-f]{16}")
MAX_SAMPLERS = 100_000  # of a session


@dataclass
class ClientSession:
    """One client at work."""

    id: str
    owner: str  # the key's id
    created: float  # seconds since 1970
    display_name: str | None = None
    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    runs: list[str] = field(default_factory=list)
    samplers: dict[str, str | None] = field(default_factory=dict)  # by id: a checkpoint's path; None is the base model
    finished: str | None = None  # how its client said that it ended
    num_joined: int = 0  # copies of its sampling clients in other processes
    last_heard: float = field(default_factory=time.monotonic)


class SessionStore:
    """Safe to use from many threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.RLock()
        self._sessions: dict[str, ClientSession] = {}

    def create(
        self, owner: str, *, display_name: str | None, user_metadata: Mapping[str, Any], tags: tuple[str, ...]
    ) -> ClientSession:
        """Raises OutputError."""
        session = ClientSession(
            id=f"s-{secrets.token_hex(8)}",
            owner=owner,
            created=time.time(),
            display_name=display_name,
            user_metadata=user_metadata,
            tags=tags,
        )
        told = {"owner": owner, "created": session.created, "display_name": display_name, "tags": list(tags)}
        with self._lock:
            self._append(session.id, {"event": "created", **told, "user_metadata": dict(user_metadata)})
            self._sessions[session.id] = session
        return session

    def find(self, session_id: str) -> ClientSession | None:
        """From disk, where the server began anew. Raises CheckpointError for a damaged file."""
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None and _ID.fullmatch(session_id) and self._file(session_id).is_file():
                session = self._sessions[session_id] = self._read(session_id)
            return session

    def all_of(self, owner: str | None) -> Iterator[ClientSession]:
        """An owner's sessions, or everybody's, newest first."""
        with self._lock:
            found = [self.find(file.stem) for file in self._root.glob("s-*.jsonl")]
        known = [session for session in found if session is not None and owner in (None, session.owner)]
        yield from sorted(known, key=lambda session: -session.created)

    def add_run(self, session: ClientSession, run_id: str) -> None:
        with self._lock:
            if run_id not in session.runs:
                self._append(session.id, {"event": "run", "id": run_id})
                session.runs.append(run_id)

    def add_sampler(self, session: ClientSession, sampler_id: str, path: str | None) -> None:
        with self._lock:
            if sampler_id not in session.samplers:
                if len(session.samplers) >= MAX_SAMPLERS:
                    raise RequestError(f"the session has {MAX_SAMPLERS} sampling clients. Begin a new session.")
                self._append(session.id, {"event": "sampler", "id": sampler_id, "path": path})
                session.samplers[sampler_id] = path

    def finish(self, session: ClientSession, how: str) -> None:
        """The first word about its end counts."""
        with self._lock:
            if session.finished is None:
                self._append(session.id, {"event": "finished", "how": how})
                session.finished = how

    def _file(self, session_id: str) -> Path:
        return self._root / f"{session_id}.jsonl"

    def _append(self, session_id: str, event: Mapping[str, Any]) -> None:
        file = self._file(session_id)
        with writing(file):
            self._root.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as opened:
                opened.write("\n" + json.dumps(event) + "\n")  # behind whatever a killed process has left there

    def _read(self, session_id: str) -> ClientSession:
        file = self._file(session_id)
        session: ClientSession | None = None
        try:
            for number, line in read_lines(file):
                try:
                    event = parse_json(line)
                except ValueError:  # of a process that was killed, which had told nobody
                    logger.warning("%s: line %d is cut short and passed over", file, number)
                    continue
                session = _after(session, session_id, event)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{str(file)!r} is no file of a session: {error}.") from error
        if session is None:
            raise CheckpointError(f"{str(file)!r} has no session.")
        return session


def _after(session: ClientSession | None, session_id: str, event: Mapping[str, Any]) -> ClientSession:
    """The session once one more event has happened. Raises KeyError or ValueError for what was never written."""
    kind = event["event"]
    if session is None:
        if kind != "created":
            raise ValueError(f"it begins with {kind!r}")
        return ClientSession(
            id=session_id,
            owner=event["owner"],
            created=event["created"],
            display_name=event["display_name"],
            user_metadata=event["user_metadata"],
            tags=tuple(event["tags"]),
        )
    match kind:
        case "run":
            session.runs.append(event["id"])
        case "sampler":
            session.samplers[event["id"]] = event["path"]
        case "finished":
            session.finished = event["how"]
        case _:
            raise ValueError(f"it has an event {kind!r}")
    return session
