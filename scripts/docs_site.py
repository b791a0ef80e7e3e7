"""A hook of mkdocs (mkdocs.yml): what GitHub shows of the pages, and the site can't.

- Links out of docs/, to code and tests, become the paths as code, or links to the repository where mkdocs.yml has a
  `repo_url`.
- A list or a table directly below a line of text gets the empty line that Python-Markdown wants.
- Comments for tests are taken out, and two brackets in a row are no reference.
"""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!\!)\[([^\]]*)\]\(([^)\s]+)\)")
_LIST = re.compile(r"^(?!\s*([-*|]|\d+\.|#|>|```|<!--))(\s*\S.*)\n(?=\s{0,3}(?:[-*] |\d+\. ))", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    folder = posixpath.dirname(page.file.src_uri)

    def link(found: "re.Match[str]") -> str:
        text, target = found.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target.partition("#")[0]))
        if "://" in target or target.startswith(("#", "mailto:")) or path.startswith("docs/"):
            return found[0]
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return f"{text} (`{path}`)" if not path.endswith(text.strip("`")) else f"`{path}`"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    for at in range(0, len(parts), 2):  # not in blocks of code
        text = re.sub(r"^<!-- not run: .*-->\n", "", parts[at], flags=re.MULTILINE)
        text = re.sub(r"\](\s?)\[", r"]\1\\[", text)  # shapes such as [rows][tokens] are no references
        parts[at] = _LIST.sub(r"\2\n\n", _LINK.sub(link, text))
    return "".join(parts)
