"""Keep Python's garbage collector from what lives as long as an engine."""

import gc
import threading
import weakref
from collections.abc import Callable

_lock = threading.RLock()  # a collection while it is held may end another owner
_num_owners = 0


def freeze_gc(owner: object) -> Callable[[], object]:
    """Let collections pass over what exists now until the result is called or `owner` is gone; the last owner counts.

    torch and transformers are half a million objects: a full collection takes a third of a second, in which every
    request waits. A heap that somebody else has frozen (gc.freeze) stays as it is.
    """
    global _num_owners
    with _lock:
        if _num_owners == 0 and gc.get_freeze_count() > 0:
            return lambda: None
        _num_owners += 1
        gc.freeze()
    thaw = weakref.finalize(owner, _leave)
    thaw.atexit = False
    return thaw


def _leave() -> None:
    global _num_owners
    with _lock:
        _num_owners -= 1
        if _num_owners == 0:
            gc.unfreeze()
