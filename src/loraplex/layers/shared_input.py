"""Modules that read one tensor one after the other (q, k and v; gate and up): known from how the model runs.

Not by name: whoever was seen to read the same tensor in one pass runs together in the next. A result is handed out
only for the tensor that it was computed from; if a module turns out to read another one, all go back to running alone.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

Module = TypeVar("Module", bound=Hashable)


class SharedInputs(Generic[Module]):
    """The modules of one model, and in each thread what was seen and computed last."""

    def __init__(self) -> None:
        self._together: dict[Module, tuple[Module, ...]] = {}  # by the first of them
        self._now = threading.local()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the model has its own, which has seen nothing yet."""
        return SharedInputs, ()

    def run(
        self,
        module: Module,
        x: Tensor,
        plan: Any,
        run_together: Callable[[Sequence[Module], Tensor, Any], list[Tensor]],
    ) -> Tensor:
        """The module's output for x: computed already, or computed now with those of the modules that follow it."""
        ready = self._ready()
        known = ready.pop(module, None)
        if known is not None:
            source, version, source_plan, first, y = known
            if source is x and version == _version(x) and source_plan is plan:
                return y
            self._together.pop(first, None)
            ready.clear()
        modules = self._together.get(module, (module,))
        if len(modules) == 1:
            self._observe(module, x)
        outputs = run_together(modules, x, plan)
        if len(modules) > 1:
            for _, _, _, first, _ in ready.values():  # a group some of whose modules didn't run
                self._together.pop(first, None)
            ready.clear()
            version = _version(x)
            ready.update({one: (x, version, plan, module, y) for one, y in zip(modules[1:], outputs[1:], strict=True)})
            self._now.seen = None
        return outputs[0]

    def _observe(self, module: Module, x: Tensor) -> None:
        """Note who reads x; who read it before is the first of those that can run together."""
        seen = getattr(self._now, "seen", None)
        if seen is not None and seen[0] is x and seen[1] == _version(x) and module not in seen[2]:
            seen[2].append(module)
            self._together[seen[2][0]] = tuple(seen[2])
        else:
            self._now.seen = (x, _version(x), [module])

    def _ready(self) -> dict[Module, tuple[Tensor, int, Any, Module, Tensor]]:
        ready: dict[Module, tuple[Tensor, int, Any, Module, Tensor]] | None = getattr(self._now, "ready", None)
        if ready is None:
            ready = self._now.ready = {}
        return ready


def _version(x: Tensor) -> int:
    """Counts changes in place; tensors of inference mode don't."""
    return 0 if x.is_inference() else x._version
