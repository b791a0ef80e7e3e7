"""Scores of all answers, and the tables that a README can show."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixture_table import paired_error, share, standard_error

from examples.science.answers import Answers
from examples.science.layout import FORMS, FULL, JOINT, MIXTURES, answers_path, cells, question_path
from examples.science.make import read_asked
from examples.science.scores import label_scores, number_scores, word_scores
from examples.science.settings import Settings
from examples.science.tasks import TASKS, parse_number

Scores = dict[str, dict[str, dict[str, Any]]]  # by task and column


def measure(settings: Settings) -> Scores:
    """Score every answer that is there; written to <output>/scores.json."""
    scores: Scores = {}
    columns = {column: Answers(answers_path(settings, column)).content for column, _ in cells(settings)}
    for column, task in cells(settings):
        if task in columns[column]:
            texts = columns[column][task]["answers"]
            scores.setdefault(task, {})[column] = score(settings, task, texts)
    path = settings.output / "scores.json"
    path.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def score(settings: Settings, name: str, texts: Sequence[Sequence[str]]) -> dict[str, Any]:
    """One cell's scores. texts: by question, its answers."""
    asked = read_asked(question_path(settings, name))
    first = [answers[0].strip() for answers in texts]
    kind = TASKS[name].kind if name in TASKS else "form"
    if kind == "number":
        guesses = [median_number(answers) for answers in texts]
        return number_scores(guesses, [float(each.value) for each in asked], logarithms=TASKS[name].unit == "GPa")
    if kind == "labels":
        states = [text.strip("[]").replace(" ", "") for text in first]
        return label_scores(states, [str(each.value) for each in asked])
    if kind == "design":
        from examples.science.designs import design_scores

        return design_scores(settings, name, asked, first)
    truths = [each.answer for each in asked]
    right = "".join(str(int(guess == truth)) for guess, truth in zip(first, truths, strict=True))
    return word_scores(first, truths) | {"right": right} | _numbers_of_form(name, first, truths)


def median_number(answers: Sequence[str]) -> float | None:
    """The median of the answers that are numbers; None if half of them are none."""
    numbers = [number for number in map(parse_number, answers) if number is not None]
    return statistics.median(numbers) if 2 * len(numbers) > len(answers) else None


def _numbers_of_form(name: str, guesses: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Of two numbers in one answer: the share of answers with both within a tenth of the truth."""
    if name != "two_numbers":
        return {}
    near = [_both_near(guess, truth) for guess, truth in zip(guesses, truths, strict=True)]
    return {"near": round(sum(near) / len(near), 4)}


def _both_near(guess: str, truth: str) -> bool:
    guessed, true = ([parse_number(part) for part in text.split("]")[:2]] for text in (guess, truth))
    if len(guessed) < 2 or None in guessed or None in true:
        return False
    return all(abs(g - t) <= 0.1 * abs(t) for g, t in zip(guessed, true, strict=True))  # type: ignore[operator]


def render(settings: Settings, scores: Scores) -> str:
    """Markdown: experts beside baselines, designs, and mixtures beside experts."""
    baselines = json.loads((settings.output / "baselines.json").read_text())
    parts = [_experts(settings, scores, baselines), _designs(scores), _mixtures(settings, scores)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _experts(settings: Settings, scores: Scores, baselines: Mapping[str, Any]) -> str:
    lines = [
        "| domain | question | score | constant | linear | boosting | expert | full rank | after joint training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for domain, expert in settings.experts.items():
        for name in expert.shares:
            if name not in baselines or domain not in scores.get(name, {}):
                continue
            kind = TASKS[name].kind
            models = baselines[name]
            linear = max((models[m] for m in models if m.startswith("linear")), key=lambda found: _value(kind, found))
            boosting = max(
                (models[m] for m in models if m.startswith("boosting")), key=lambda found: _value(kind, found)
            )
            others = [scores[name].get(column) for column in (domain, FULL, JOINT)]
            cells_ = [models["majority or mean"], linear, boosting, *others]
            what = {"number": "R2", "word": "right", "labels": "Q3"}[kind]
            texts = ["" if cell is None else _cell(kind, cell, TASKS[name].unit) for cell in cells_]
            lines.append(f"| {domain} | {name} | {what} | {' | '.join(texts)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _value(kind: str, cell: Mapping[str, float]) -> float:
    return cell[{"number": "r2", "word": "share", "labels": "q3"}[kind]]


def _cell(kind: str, cell: Mapping[str, float], unit: str) -> str:
    if kind == "number":
        return f"{cell['r2']:.3f} ± {cell['r2_error']:.3f}, MAE {cell['mae']:.3g} {unit}".rstrip()
    key = {"word": "share", "labels": "q3"}[kind]
    return f"{cell[key]:.3f} ± {cell[f'{key}_error']:.3f}"


def _designs(scores: Scores) -> str:
    keys = ("valid", "new", "different", "in_table", "hits", "hits_by_chance")
    lines = [f"| design | by | {' | '.join(keys)} |", "|---" * (len(keys) + 2) + "|"]
    for name, columns in scores.items():
        if name in TASKS and TASKS[name].kind == "design":
            for column, cell in columns.items():
                texts = [f"{cell[key]:.3f}" for key in keys]
                texts[keys.index("hits")] += f" ± {cell['hits_error']:.3f}"
                lines.append(f"| {name} | {column} | {' | '.join(texts)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _mixtures(settings: Settings, scores: Scores) -> str:
    """Words of every domain and mixed forms: base, the domain's own or the best single expert, and mixtures."""
    domains = list(settings.experts)
    lines = [
        f"| questions | base | own or best single expert | {' | '.join(MIXTURES)} | best mixture above it |",
        "|---" * (4 + len(MIXTURES)) + "|",
    ]
    for name, columns in scores.items():
        if name not in FORMS and TASKS[name].kind != "word":
            continue
        single = [each for each in ([TASKS[name].domain] if name in TASKS else domains) if each in columns]
        mixed = [column for column in MIXTURES if column in columns]
        if not single or not mixed:
            continue
        own = max(single, key=lambda column: share(columns[column]["right"]))
        best = max(mixed, key=lambda column: share(columns[column]["right"]))
        gain = 100 * (share(columns[best]["right"]) - share(columns[own]["right"]))
        error = 100 * paired_error(columns[best]["right"], columns[own]["right"])
        texts = [_percent(columns.get(column)) for column in ("base", own, *MIXTURES)]
        lines.append(f"| {name} | {' | '.join(texts)} | {gain:+.1f} ± {error:.1f} ({best}) |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _percent(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    right = cell["right"]
    return f"{100 * share(right):.1f} ± {100 * standard_error(right):.1f}"


def mean_gain(scores: Scores, column: str, settings: Settings) -> tuple[float, float]:
    """Points of a column above each domain's own expert on its words, in the mean, and its standard error."""
    gains, errors = [], []
    for name, columns in scores.items():
        if name in TASKS and TASKS[name].kind == "word" and column in columns and TASKS[name].domain in columns:
            own, other = columns[TASKS[name].domain]["right"], columns[column]["right"]
            gains.append(100 * (share(other) - share(own)))
            errors.append(100 * paired_error(other, own))
    return sum(gains) / len(gains), math.sqrt(sum(error**2 for error in errors)) / len(errors)


def write_table(settings: Settings, path: Path) -> str:
    text = render(settings, measure(settings))
    path.write_text(text)
    return text
