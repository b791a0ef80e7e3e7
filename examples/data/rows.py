"""Question rows, and splits in which no group of related rows is on two sides."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("test", "valid", "train")  # in the order they are filled


@dataclass(frozen=True)
class Row:
    """One question with a one-word answer; rows of one `group` stay in one split."""

    question: str
    answer: str
    group: str


class DataError(ValueError):
    """The rows don't allow the splits that were asked for."""


def level(value: float, low_below: float, high_from: float) -> str:
    """Return "low", "medium" or "high": low < low_below <= medium < high_from <= high."""
    if value < low_below:
        return "low"
    return "medium" if value < high_from else "high"


def draw(seed: int, *key: str) -> str:
    """Return a pseudo-random sort key of `key`: the same on every machine and Python version."""
    return hashlib.sha256("\x1f".join([str(seed), *key]).encode()).hexdigest()


def split_rows(rows: Iterable[Row], sizes: Mapping[str, int], seed: int, large_group: int = 10) -> dict[str, list[Row]]:
    """Distribute rows over test, valid and train, whole groups at a time in a random order.

    A group of more than `large_group` rows only goes to train: one family must not be half a test set.
    A split's last group may be cut to meet its size. Raises DataError if the rows don't fill the splits.
    """
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for group in sorted(groups, key=lambda name: draw(seed, name)):
        members = groups[group]
        for name in SPLITS:
            allowed = name == "train" or len(members) <= large_group
            if allowed and len(splits[name]) < sizes[name]:
                splits[name] += members[: sizes[name] - len(splits[name])]
                break
    short = {name: len(part) for name, part in splits.items() if len(part) < sizes[name]}
    if short:
        raise DataError(f"not enough rows: {short} of {dict(sizes)}. Ask for smaller splits.")
    return {name: sorted(part, key=lambda row: draw(seed, row.question)) for name, part in splits.items()}


def check_splits(splits: Mapping[str, list[Row]]) -> None:
    """Raise DataError if a question occurs twice, or a group in two splits."""
    questions = Counter(row.question for part in splits.values() for row in part)
    twice = [question for question, count in questions.items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} questions occur twice, e.g. {twice[0]!r}. Remove duplicates first.")
    homes: defaultdict[str, set[str]] = defaultdict(set)
    for name, part in splits.items():
        for row in part:
            homes[row.group].add(name)
    torn = [group for group, names in homes.items() if len(names) > 1]
    if torn:
        raise DataError(f"{len(torn)} groups are in two splits, e.g. {torn[0]!r}. Give their rows one group.")


def write_chat(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line: {"messages": [user question, assistant answer]}."""
    lines = []
    for row in rows:
        messages = [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
