"""Write docs/walks.md: the files that three pieces of work go through, with what each is for.

    python -m scripts.write_walks

The files and their order come from scripts/trace_files.py, the words from the files' own docstrings.
"""

import ast
from collections.abc import Mapping
from pathlib import Path

from scripts.trace_files import ROOT, WORK, Files, trace

PAGE = Path(__file__).parent.parent / "docs" / "walks.md"
INTRODUCTION = """# A request's way through the files

In the order of their first call, as `python -m scripts.trace_files` saw them with a tiny Llama on a CPU;
`python -m scripts.write_walks` renews this page. What the rooms are for is in [architecture](architecture.md)."""
TITLES = {
    "chat": "One chat request",
    "mixture": "A decode step with a mixture",
    "training": "A training step",
}
INTRODUCTIONS = {
    "chat": "A request for a link of two adapters, from the socket to the last token and back.",
    "mixture": "A step of the engine with one mixture row: a scaling pass and a main pass.",
    "training": "One step of two adapters in the same batches.",
}


def table(files: Files) -> str:
    lines = ["| | file | what it is for |", "|---:|---|---|"]
    for number, file in enumerate(files, 1):
        path = f"../src/loraplex/{file}"
        lines.append(f"| {number} | [{file}]({path}) | {first_sentence(ROOT / file)} |")
    return "\n".join(lines)


def first_sentence(file: Path) -> str:
    words = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0]
    return " ".join(words.split()).replace("|", "\\|")


def page(walks: Mapping[str, Files]) -> str:
    parts = [INTRODUCTION]
    for name, files in walks.items():
        functions = sum(map(len, files.values()))
        head = f"## {TITLES[name]}\n\n{INTRODUCTIONS[name]} {len(files)} files, {functions} functions."
        parts.append(f"{head}\n\n{table(files)}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    PAGE.write_text(page({name: trace(name) for name in WORK}), encoding="utf-8")


if __name__ == "__main__":
    main()
