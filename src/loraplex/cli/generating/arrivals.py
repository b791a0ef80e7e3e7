"""What an iterator gives, asked without waiting: for input that comes when it comes."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_AHEAD = 256  # items that are read before they are wanted


def as_they_come(items: Iterable[T]) -> Iterator[T | None]:
    """The items, read by a thread; None wherever there is none yet. Raises what the iterator raises."""
    arrived: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(_AHEAD)

    def read() -> None:
        try:
            for item in items:
                arrived.put((item,))
        except BaseException as error:
            arrived.put(error)
        else:
            arrived.put(None)

    threading.Thread(target=read, name="loraplex-input", daemon=True).start()
    while True:
        try:
            found = arrived.get_nowait()
        except queue.Empty:
            yield None
            continue
        if found is None:
            return
        if isinstance(found, BaseException):
            raise found
        yield found[0]
