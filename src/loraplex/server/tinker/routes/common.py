"""What the calls of the Tinker API share."""

from collections.abc import Callable
from typing import TypeVar

from fastapi import Request, Response

from loraplex.server.api.json_route import documented, json_response
from loraplex.server.auth.access import Principal
from loraplex.server.state import RequestContext, ServerState, context_of, in_thread, state_of
from loraplex.server.tinker.service import TinkerService
from loraplex.training.service.journal import JournalRecord

T = TypeVar("T")
PROMISE = documented("The id to ask for the result with.", 400, 401, 404, 429, required=("request_id",))


class TinkerCall:
    """One request of the API."""

    def __init__(self, http: Request) -> None:
        self.http = http
        self.state: ServerState = state_of(http)
        self.context: RequestContext = context_of(http)
        assert self.state.training is not None, "these routes are there only where training is"
        self.service: TinkerService = self.state.training

    @property
    def principal(self) -> Principal:
        return self.context.principal

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Work that reads files or parses much."""
        return await in_thread(self.http, work)

    async def submit(self, kind: str, run_id: str, seq: int) -> Response:
        """Take a request of a run as it was sent, in its place among the run's requests."""
        body, service = await self.http.body(), self.service

        def take() -> None:
            settings = service.run(run_id, self.principal)
            service.open_session(settings.run_id.partition(":")[0], self.principal)
            record = JournalRecord(seq, kind, body)
            service.loop.submit(run_id, record, lambda: service.codec.parse(kind, body, run_id))

        await self.in_thread(take)
        return promise(run_id, seq)


def promise(run_id: str, seq: int) -> Response:
    return json_response({"request_id": f"{run_id}:{seq}", "model_id": run_id})
