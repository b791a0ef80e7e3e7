"""What every column answers to every test question, in a file a column: asked once, scored as often as you like.

Test questions are for one look. An answer that is in the file is never asked for again; a file whose questions have
changed is refused, so that nobody tunes on test by repeating.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.science.columns import load_column, load_model
from examples.science.layout import answers_path, cells, question_path
from examples.science.settings import Settings
from examples.science.tasks import STRETCH, TASKS, Task
from loraplex import Engine, EngineConfig, Request, SamplingParams
from loraplex.training.adapters.evaluation import Question, read_questions

MAX_TOKENS = {"number": 12, "word": 6, "labels": 2 * STRETCH, "design": 130}
FORM_TOKENS = 24


class Answers:
    """One column's answers, in a file that is written after each task."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def has(self, task: str, questions: Path) -> bool:
        """Whether the task is answered. Raises SystemExit if its questions were others."""
        known = self.content.get(task)
        if known is not None and known["questions"] != fingerprint(questions):
            raise SystemExit(
                f"{self._path} answers other questions of {task!r} than those in {questions}. Test questions are for "
                "one look: give the run another output folder, or remove the file."
            )
        return known is not None

    def add(self, task: str, questions: Path, answers: list[list[str]]) -> None:
        self.content[task] = {"questions": fingerprint(questions), "answers": answers}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.content) + "\n")
        part.replace(self._path)


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def ask_all(settings: Settings) -> None:
    """Answer every cell that isn't answered yet, column by column; adapters are loaded as they are needed."""
    columns = {column: Answers(answers_path(settings, column)) for column, _ in cells(settings)}
    left = [cell for cell in cells(settings) if not columns[cell[0]].has(cell[1], question_path(settings, cell[1]))]
    if not left:
        return
    model = load_model(settings)
    with Engine(model, EngineConfig()) as engine:
        for column, task in sorted(left, key=lambda cell: list(columns).index(cell[0])):
            wanted = load_column(model, settings, column, _domain(settings, task))
            path = question_path(settings, task)
            questions = read_questions(path)
            sampling = sampling_of(settings, TASKS.get(task), len(questions))
            columns[column].add(task, path, ask(engine, questions, wanted, sampling))
            print(f"{column}, {task}: {len(questions)} questions", flush=True)


def _domain(settings: Settings, task: str) -> str | None:
    return next((domain for domain, expert in settings.experts.items() if task in expert.shares), None)


def sampling_of(settings: Settings, task: Task | None, count: int) -> list[SamplingParams]:
    """Greedy for words and labels; a numeric answer is the median of several samples, a design is one sample."""
    kind = task.kind if task is not None else "form"
    tokens = MAX_TOKENS.get(kind, FORM_TOKENS)
    if kind == "number" and settings.ask.samples > 1:
        warm = {"temperature": settings.ask.temperature, "n": settings.ask.samples}
    elif kind == "design":
        warm = {"temperature": settings.ask.temperature}
    else:
        return [SamplingParams(max_tokens=tokens)] * count
    return [SamplingParams(max_tokens=tokens, seed=settings.seed * 10_000 + i, **warm) for i in range(count)]


def ask(
    engine: Engine, questions: Sequence[Question], column: str | None, sampling: Sequence[SamplingParams]
) -> list[list[str]]:
    """The texts of every question's answers, all questions in the engine's batches."""
    requests = [
        Request(question.messages, adapters=column, sampling=how)
        for question, how in zip(questions, sampling, strict=True)
    ]
    return [[completion.text for completion in result.completions] for result in engine.generate(requests)]
