"""Scripts outside the package name what is there: nobody else imports them, so a name that moved stays unseen."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "examples", "scripts")
SCRIPTS = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OWN = ("loraplex", *FOLDERS, "tests")


def names_of(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """The modules that a program imports, each with a name from it or None."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def is_there(module: str, name: str | None) -> bool:
    try:
        found = importlib.import_module(module)
        return name is None or hasattr(found, name) or bool(importlib.import_module(f"{module}.{name}"))
    except ModuleNotFoundError as error:
        # what an extra, or the environment of a peer, would bring
        return error.name is not None and error.name.split(".")[0] not in OWN


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_what_a_script_imports_is_there(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    names = set(names_of(ast.parse((ROOT / script).read_text(encoding="utf-8"))))
    missing = sorted(
        (module, name) for module, name in names if module.split(".")[0] in OWN and not is_there(module, name)
    )
    assert not missing
