"""A model in this process, driven by the engine."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loraplex.cli.chatting.turns import BASE, AnswerPiece, Turn
from loraplex.cli.options import load_folder
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.sampling_defaults import sampling_defaults


class LocalChat:
    """Answers of a model that is loaded here; earlier turns are in the engine's prefix cache."""

    def __init__(self, model: MultiLoraModel, title: str) -> None:
        self.title = title
        self._model = model
        self._engine = Engine(model)
        self._defaults: Mapping[str, Any] = sampling_defaults(model.base)

    def answer(self, turn: Turn) -> Iterator[AnswerPiece]:
        adapters = None if turn.adapters == BASE else turn.adapters
        sampling = SamplingParams(**{**self._defaults, **turn.options})
        request_id: str | None = None
        num_tokens, chosen = 0, None
        try:
            with deferred_interrupt():
                request_id = self._engine.add_request(Request(turn.messages, adapters=adapters, sampling=sampling))
            while True:
                with deferred_interrupt():
                    deltas = self._engine.step()
                for delta in deltas:
                    if delta.error is not None:
                        raise delta.error
                    num_tokens += len(delta.token_ids)
                    if delta.auto is not None:
                        chosen = delta.auto.name or BASE
                    yield AnswerPiece(
                        text=delta.text,
                        chosen=chosen,
                        num_tokens=None if delta.finish_reason is None else num_tokens,
                        finish_reason=delta.finish_reason,
                    )
                    if delta.finish_reason is not None:
                        return
        finally:
            if request_id is not None:
                self._engine.cancel(request_id)
                while self._engine.has_work:
                    self._engine.step()
                self._engine.pop_result(request_id)

    def names(self) -> list[str]:
        return self._model.names()

    def load(self, name: str, folder: str) -> None:
        load_folder(self._model, name, folder)

    def close(self) -> None:
        self._engine.close()


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold an interrupt back until the block ends; a second one comes through at once."""
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
