"""Rows through the engine as they come, and what they gave in the rows' order, as soon as it is known."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from loraplex.engine.engine import Engine
from loraplex.engine.request import Delta, Request, RequestResult
from loraplex.errors import LoraplexError

WAITING = 4  # times the sequences that run: so many rows may be read ahead, or wait for those before them
_PAUSE_S = 0.001  # while all requests wait for their adapters
_WAIT_S = 0.01  # while nothing runs and more rows may come


class _End:
    """There are no more requests."""


_END = _End()


@dataclass(kw_only=True)
class RunningRow:
    """A row that was read, and what has come of it that nobody was told yet."""

    index: int
    deltas: list[Delta] = field(default_factory=list)
    result: RequestResult | LoraplexError | None = None  # an error: it was refused


def run_in_order(
    engine: Engine, requests: Iterable[Request | LoraplexError | None], max_running: int
) -> Iterator[tuple[int, Delta | RequestResult | LoraplexError]]:
    """For each row by its number its deltas, and its result behind them; the rows in their order.

    Requests are taken while there is room for them, so any number of rows needs the memory of a few; None is no row
    yet. What the engine refuses, or was an error before, is an error in its place.
    """
    source, number = iter(requests), 0
    rows: deque[RunningRow] = deque()  # those that nobody was told the end of
    running: dict[str, RunningRow] = {}
    has_more = True
    while has_more or rows:
        while has_more and len(running) < max_running and len(rows) < WAITING * max_running:
            request = next(source, _END)
            has_more = request is not _END
            if request is None or isinstance(request, _End):
                break
            rows.append(RunningRow(index=number))
            _start(engine, request, rows[-1], running)
            number += 1
        if running:
            _step(engine, running)
        elif has_more and not rows:
            time.sleep(_WAIT_S)
        while rows:
            first = rows[0]
            yield from ((first.index, delta) for delta in first.deltas)
            first.deltas.clear()
            if first.result is None:
                break
            yield first.index, first.result
            rows.popleft()


def _start(engine: Engine, request: Request | LoraplexError, row: RunningRow, running: dict[str, RunningRow]) -> None:
    try:
        if isinstance(request, LoraplexError):
            raise request
        running[engine.add_request(request)] = row
    except LoraplexError as error:
        row.result = error


def _step(engine: Engine, running: dict[str, RunningRow]) -> None:
    deltas = engine.step()
    for delta in deltas:
        running[delta.request_id].deltas.append(delta)
    for request_id in {delta.request_id for delta in deltas if delta.finish_reason is not None}:
        result = engine.pop_result(request_id)
        if result is not None:
            running.pop(request_id).result = result
    if not deltas and engine.stats().num_running == 0:
        time.sleep(_PAUSE_S)
