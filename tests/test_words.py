"""The code has the words of the glossary: no home-made names, and no name that two public classes share."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "loraplex"
FILES = sorted(PACKAGE.rglob("*.py"))
# Files of these names were here once; the glossary has the field's word for each.
FORMER_FILES = {
    *("intake", "asked", "answers", "request_book", "tracks", "blocks", "waiting", "shares", "leases"),
    *("binding", "parts", "packing", "feed", "heap", "text", "token_choice", "constraints", "attachment"),
    *("joining", "attending", "fronts", "observations", "responses", "drafts", "uses", "caches", "choice"),
    *("bank", "learner", "ranks", "seeds", "identity", "gate", "runs", "library", "roots", "rates", "seams"),
    *("front", "machinery", "runner", "room", "sight", "lengths", "attention_join", "seen", "chain", "generating"),
}
FORMER_NAMES = {
    *("Intake", "Answers", "AnswerText", "RequestBook", "Generation", "Track", "KeyPart", "Waiting", "Shares"),
    *("Leases", "Binding", "Part", "PassPlan", "PartResult", "PackedBatch", "Feed", "TokenChooser"),
    *("Attachment", "Observations", "ResponsePool", "Machinery", "Room", "Sight", "Learner", "Ranks", "Bank"),
    *("SlotBank", "TrainingBank", "Seam", "null_block", "use_batch", "prompt_parts", "parse_choice"),
    *("add_gains", "freeze_heap", "check_seams", "AttentionFront", "FrontHandle", "Behind", "join_front"),
}


def named(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[Path, str]]:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, kind):
                yield file, node.name  # type: ignore[attr-defined]


def test_no_file_has_a_home_made_name() -> None:
    # Other things: what stands in front of replicas, a compiled library, and OpenAI's /v1/responses.
    paths = ("server/replicas/front.py", "kernels/library.py", "server/api/routes/responses.py")
    elsewhere = {PACKAGE / path for path in paths}
    assert [file for file in FILES if file.stem in FORMER_FILES and file not in elsewhere] == []


def test_no_class_or_function_has_a_home_made_name() -> None:
    definitions = named((ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    assert [(file, name) for file, name in definitions if name in FORMER_NAMES] == []


def test_no_constant_is_called_most_or_few() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Name):
                assert not node.id.lstrip("_").startswith(("MOST", "FEW_")), f"{file}: {node.id}"


def test_no_two_public_classes_share_a_name() -> None:
    counts = Counter(name for _, name in named(ast.ClassDef) if not name.startswith("_"))
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("word", ["sequence", "scheduled chunk", "gate", "scaling pass", "weight provider"])
def test_glossary_has_the_words_that_the_code_is_made_of(word: str) -> None:
    assert word in (PACKAGE.parent.parent / "docs" / "glossary.md").read_text()
