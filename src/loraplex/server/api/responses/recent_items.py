"""Output items of the last answers, for clients that name an item instead of sending it again."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import orjson

MAX_BYTES = 2**23  # of all items; the oldest go first


class RecentItems:
    """Items by their owner (a key, or without keys an address) and id. In memory alone; safe to use from many threads.

    OpenAI's own servers keep responses unless a request says `store: false`, so some clients (the AI SDK) refer to the
    messages of earlier turns. This is just enough for their conversations to go on.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._items: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, owner: str, items: Sequence[dict[str, Any]]) -> None:
        """Remember finished items."""
        with self._lock:
            for item in items:
                content = orjson.dumps(item)
                self._items[owner, item["id"]] = content
                self._num_bytes += len(content)
            while self._num_bytes > self._max_bytes:
                _, forgotten = self._items.popitem(last=False)
                self._num_bytes -= len(forgotten)

    def find(self, owner: str, item_id: str) -> dict[str, Any] | None:
        """One of the owner's items, if it is still known."""
        with self._lock:
            content = self._items.get((owner, item_id))
        if content is None:
            return None
        item: dict[str, Any] = orjson.loads(content)
        return item
