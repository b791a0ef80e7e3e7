"""Write the table of refused fields into the documentation: python -m scripts.refused_fields."""

import re
from pathlib import Path

from loraplex.server.api.refused_fields import as_markdown

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
_TABLE = re.compile(r"\| field \| of \| why \| passes with \|\n(\|.*\n)*")


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = _TABLE.search(text)
    assert found is not None, f"{PAGE} has no table of refused fields"
    PAGE.write_text(text[: found.start()] + as_markdown() + "\n" + text[found.end() :], encoding="utf-8")


if __name__ == "__main__":
    main()
