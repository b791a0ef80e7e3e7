"""The documentation's site: what its hook makes of a page, and that the whole of it builds."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.docs_site import on_page_markdown

ROOT = Path(__file__).parent.parent


def shown(markdown: str, *, page: str = "guides/train.md", repo_url: str | None = None) -> str:
    file = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return on_page_markdown(markdown, page=file, config=SimpleNamespace(repo_url=repo_url), files=None)


def test_links_between_pages_stay_and_links_to_code_become_paths() -> None:
    inside = "[serve](serve.md), [above](../serving.md#security), [web](https://example.org), [here](#data)"
    assert shown(inside) == inside
    assert shown("[test](../../tests/test_docs.py)") == "test (`tests/test_docs.py`)"
    assert shown("[rows.py](../src/loraplex/routing/rows.py)", page="xlora.md") == "`src/loraplex/routing/rows.py`"


def test_links_to_code_lead_to_the_repository_where_there_is_one() -> None:
    text = shown("[test](../../tests/test_docs.py)", repo_url="https://example.org/loraplex/")
    assert text == "[test](https://example.org/loraplex/blob/main/tests/test_docs.py)"


def test_pictures_and_blocks_of_code_stay_and_comments_for_tests_go() -> None:
    page = "![p](../images/page.png)\n\n<!-- not run: no time -->\n\n```sh\n# [a](../../b.py)\n- x[1][2]\n```\n"
    assert shown(page) == page.replace("<!-- not run: no time -->\n", "")


def test_lists_get_their_empty_line_and_shapes_are_no_references() -> None:
    assert shown("Such as\n- this\n- that\n") == "Such as\n\n- this\n- that\n"
    assert shown("one entry for each token, [tokens][experts]") == r"one entry for each token, [tokens]\[experts]"


@pytest.mark.slow
@pytest.mark.needs("mkdocs")
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "load_adapter" in (tmp_path / "api.html").read_text()
