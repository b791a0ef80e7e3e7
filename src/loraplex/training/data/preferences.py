"""Records for losses beside cross-entropy: pairs of a chosen and a rejected answer, and answers with a reward."""

import json
from pathlib import Path
from typing import Any

from loraplex.errors import DatasetError
from loraplex.json_files import parse_json
from loraplex.training.data.records import Record, parse_record, read_lines_of
from loraplex.validation import is_finite, quoted

FORMS = (
    '{"prompt": "...", "chosen": "...", "rejected": "..."}, or with lists of messages: {"prompt": [...], '
    '"chosen": [...], "rejected": [...]}, where the prompt may be what both begin with'
)


def read_pairs(path: str | Path) -> list[tuple[Record, Record]]:
    """Read a JSONL file of preferences: each record's chosen and rejected answers as records of their own.

    Raises DatasetError, which names file and line.
    """
    return read_lines_of(path, parse_pair, FORMS)


def read_rewarded(path: str | Path) -> list[tuple[Record, float]]:
    """Read a JSONL file whose records, of any form, have a finite number "reward". Raises DatasetError."""
    return read_lines_of(path, _parse_rewarded, '{"prompt": "...", "completion": "...", "reward": 1.0}')


def parse_pair(line: str, place: str) -> tuple[Record, Record]:
    """The chosen and the rejected answer, after the same prompt. Raises DatasetError."""
    content = _object(line, place)
    if "chosen" not in content or "rejected" not in content:
        raise DatasetError(f"{place} has no chosen and rejected answer; a record is {FORMS}.")
    answers = {key: content[key] for key in ("chosen", "rejected")}
    if answers["chosen"] == answers["rejected"]:
        raise DatasetError(f"{place}: chosen and rejected are the same, so there is nothing to learn.")
    prompt = content.get("prompt")
    if all(isinstance(answer, str) for answer in answers.values()) and isinstance(prompt, str):
        made = [
            _record({"prompt": prompt, "completion": answer}, f"{place} ({key})") for key, answer in answers.items()
        ]
        return made[0], made[1]
    before = [] if prompt is None else prompt
    if not all(isinstance(messages, list) for messages in (before, *answers.values())):
        raise DatasetError(
            f"{place}: prompt is {quoted(prompt)}, chosen {quoted(answers['chosen'])} and rejected "
            f"{quoted(answers['rejected'])}; a record is {FORMS}."
        )
    whole = {key: [*before, *messages] for key, messages in answers.items()}
    first = len(before) or _num_shared(whole["chosen"], whole["rejected"])
    made = [_record({"messages": messages}, f"{place} ({key})", first) for key, messages in whole.items()]
    return made[0], made[1]


def _num_shared(messages: list[Any], others: list[Any]) -> int:
    """How many messages both begin with."""
    same = [a == b for a, b in zip(messages, others, strict=False)]
    return same.index(False) if False in same else len(same)


def _record(content: dict[str, Any], place: str, first_counted: int = 0) -> Record:
    """One of the forms; of a conversation the assistant turns from a message on count. Raises DatasetError."""
    return parse_record(json.dumps(content), place).counted_from(first_counted)


def _parse_rewarded(line: str, place: str) -> tuple[Record, float]:
    reward = _object(line, place).get("reward")
    if not is_finite(reward):
        raise DatasetError(f"{place}: reward is {quoted(reward)}; it must be a finite number.")
    assert isinstance(reward, int | float), "what is finite is a number"
    return parse_record(line, place), float(reward)


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        content = parse_json(line)
    except ValueError as error:
        raise DatasetError(f"{place} is not JSON: {error}. Write one JSON object a line: {FORMS}.") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{place} holds a JSON {type(content).__name__}; it must be an object: {FORMS}.")
    return content
