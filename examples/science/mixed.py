"""What needs two experts: two questions in one prompt, conversations, and one molecule that two domains know.

<output>/data/mixed/<source>.{train,valid}.jsonl    what mixtures are trained on: the domains, and these forms
<output>/data/test/<form>.jsonl                     their test questions
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from mixed_data import conversations, pairs

from examples.science.make import SHARED, all_splits, read_asked, record_of
from examples.science.settings import Settings
from examples.science.splits import SPLITS
from examples.science.subject import Subject
from examples.science.tasks import TASKS, Asked, tasks_of
from loraplex.training.adapters.evaluation import Question

NUMBERS = {"quantum": "gap", "materials": "bulk", "chemistry": "melting"}  # the numeric task of two_numbers
PROPERTIES = {"quantum": "gap_level", "chemistry": "melting_level", "barrier": "crosses"}  # of one molecule


def make_mixed(settings: Settings) -> None:
    """Write the mixtures' training and validation sources, and the test questions of every mixed form."""
    splits, subjects, shared = all_splits(settings)
    folder = settings.output / "data"
    (folder / "mixed").mkdir(parents=True, exist_ok=True)
    sizes = {"train": settings.mixture.records, "valid": settings.mixture.valid_records}
    for split in SPLITS:
        words = {name: _words(settings, name, parts[split], split) for name, parts in splits.items()}
        numbers = _numbers(settings, {name: parts[split] for name, parts in splits.items()}, split)
        known = {name: {subject.key: subject for subject in parts[split]} for name, parts in splits.items()}
        if split == "test":  # the molecules that neither domain has trained on
            known = {name: {subject.key: subject for subject in found} for name, found in subjects.items()}
            wanted = dict(shared)
        else:
            wanted = {pair: _both(known, pair) for pair in SHARED if set(SHARED[pair]) <= set(known)}
        count = sizes.get(split, settings.ask.mixed_questions)
        seed = settings.seed + SPLITS.index(split)
        made = {
            "conversations": conversations(words, count, seed),
            "two_questions": pairs(words, count, seed),
            "two_numbers": _spaced_pairs(numbers, count, seed),
            "two_properties": two_properties(known, wanted, count, seed),
        }
        for form, questions in made.items():
            path = folder / ("test" if split == "test" else "mixed")
            write_questions(path / (f"{form}.jsonl" if split == "test" else f"{form}.{split}.jsonl"), questions)
        if split != "test":
            _copy_domains(settings, split, count)


def _words(settings: Settings, domain: str, subjects: Sequence[Subject], split: str) -> list[Question]:
    """The word questions of a domain's subjects; those of test are the questions that its expert is asked."""
    task = next(task for task in tasks_of(domain) if task.kind == "word")
    if split == "test":
        asked = read_asked(settings.output / "data/test" / f"{task.name}.jsonl")
    else:
        asked = [task.ask(each, random.Random(f"{settings.seed} mixed {each.key}")) for each in subjects]
    return [_question(each) for each in asked if each is not None]


def _numbers(settings: Settings, subjects: Mapping[str, Sequence[Subject]], split: str) -> dict[str, list[Question]]:
    draw = random.Random(settings.seed)
    found = {}
    for domain in subjects:
        if domain in NUMBERS:
            asked = [TASKS[NUMBERS[domain]].ask(subject, draw) for subject in subjects[domain]]
            found[domain] = [_question(each) for each in asked if each is not None]
    return found


def _question(asked: Asked) -> Question:
    return Question(prompt=asked.prompt, answer=asked.answer)


def _spaced_pairs(domains: Mapping[str, Sequence[Question]], count: int, seed: int) -> list[Question]:
    """Two numeric questions of different domains in one prompt: "[6.82] [124]"."""
    if len(domains) < 2:
        return []
    return [replace(each, answer=each.answer.replace("; ", " ")) for each in pairs(domains, count, seed)]


def _both(known: Mapping[str, Mapping[str, Subject]], pair: str) -> list[str]:
    one, other = SHARED[pair]
    return sorted(known[one].keys() & known[other].keys())


def two_properties(
    known: Mapping[str, Mapping[str, Subject]], wanted: Mapping[str, Sequence[str]], count: int, seed: int
) -> list[Question]:
    """One molecule, two questions that two domains' experts know: "low; high"; both orders alike."""
    made = []
    for pair, keys in wanted.items():
        for order in permutations(SHARED[pair]):
            for key in keys:
                draw = random.Random(f"{seed} {key}")
                asked = [TASKS[PROPERTIES[domain]].ask(known[domain][key], draw) for domain in order]
                if None not in asked:
                    first, second = asked
                    answer = f"{first.answer}; {second.answer}"
                    made.append(Question(prompt=f"{first.prompt} {second.prompt}", answer=answer))
    random.Random(seed).shuffle(made)
    return made[:count]


def _copy_domains(settings: Settings, split: str, count: int) -> None:
    """The first records of each domain's own file, which is in a random order."""
    data = settings.output / "data"
    for domain in settings.experts:
        lines = (data / f"{domain}.{split}.jsonl").read_text("utf-8").splitlines(keepends=True)[:count]
        _write(data / "mixed" / f"{domain}.{split}.jsonl", "".join(lines))


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """One record a line; of a conversation the turns before are kept."""
    lines = []
    for question in questions:
        asked = Asked(prompt=question.prompt, answer=question.answer, key="", value=question.answer, text="")
        record = record_of(asked)
        record["messages"] = [*question.history, *record["messages"]]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    _write(path, "".join(lines))


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.replace(path)
