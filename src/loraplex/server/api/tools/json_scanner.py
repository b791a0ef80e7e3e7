"""Where a JSON value ends in a text that comes in pieces: brackets and strings are counted, nothing else is checked."""

import re

_MARKS = re.compile(r'[{}\[\]"\\]')


class JsonScanner:
    """Follows one object or list from its first bracket on."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> int | None:
        """Go on with more of the text; returns where in it the value has ended, behind its last bracket, or None."""
        place = 0
        if self._escaped and text:
            self._escaped, place = False, 1
        while (found := _MARKS.search(text, place)) is not None:
            mark, place = found[0], found.end()
            if mark == "\\":
                if not self._in_string:
                    continue
                if place == len(text):
                    self._escaped = True
                place += 1
            elif mark == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if mark in "{[" else -1
                if self._depth == 0:
                    return place
        return None
