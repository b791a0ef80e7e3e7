"""Raise an error at the call of any function that the engine's thread calls in its steps."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import pytest

import loraplex
from loraplex.engine.async_engine import AsyncEngine

PACKAGE = str(Path(loraplex.__file__).parent)


class InjectedError(Exception):
    """An error that nothing in the engine expects."""


@dataclass
class Injector:
    """Sees each call of loraplex's Python functions in the engine's thread; raises at one of them, once.

    An error of a profile function comes up as if the called function had raised it first thing; then the profile
    function is gone, so every turn of the engine sets it again.
    """

    seen: dict[CodeType, None] = field(default_factory=dict)  # in the order of their first calls
    target: CodeType | None = None
    has_raised: bool = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        turn = AsyncEngine._turn

        def seen_turn(engine: AsyncEngine) -> None:
            sys.setprofile(self)
            turn(engine)

        monkeypatch.setattr(AsyncEngine, "_turn", seen_turn)

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        self.seen.setdefault(code)
        if code == self.target:
            self.target, self.has_raised = None, True
            raise InjectedError(f"injected into {name(code)}")

    def arm(self, target: CodeType) -> None:
        self.target, self.has_raised = target, False

    def disarm(self) -> None:
        self.target = None


def name(code: CodeType) -> str:
    """Where a function is: engine/scheduler.py:Scheduler.plan."""
    return f"{code.co_filename.removeprefix(PACKAGE + '/')}:{code.co_qualname}"
