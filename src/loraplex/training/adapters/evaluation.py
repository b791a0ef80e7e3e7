"""How good an adapter is on held-out records: exact match of one-word answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex.errors import DatasetError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.prompts import encode_prompts, first_token_logits
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.training.data.records import read_records


@dataclass(frozen=True, kw_only=True)
class Question:
    """A user's turn, the turns before it, and the words that answer it."""

    prompt: str
    answer: str
    history: tuple[Mapping[str, str], ...] = ()  # messages

    @property
    def messages(self) -> list[Mapping[str, str]]:
        return [*self.history, {"role": "user", "content": self.prompt}]

    @property
    def num_characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many questions were answered right, freely and among the answers that occur."""

    num_questions: int
    exact: float  # the share whose most likely first token is the answer's, among the whole vocabulary
    among_labels: float  # the same among the labels' tokens only: what a model without the format still knows


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """Read a chat JSONL file; a record's last answer is asked for, after the turns before it. Raises DatasetError."""
    questions = []
    for record in read_records(path)[:limit]:
        messages = record.messages or ()
        roles = [message["role"] for message in messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise DatasetError(
                f"{record.place} is not a question: its roles are {roles}. Give a user turn and an assistant turn, as "
                "often as you like."
            )
        prompt, answer = messages[-2]["content"], messages[-1]["content"]
        questions.append(Question(prompt=prompt, answer=answer, history=messages[:-2]))
    return questions


def evaluate(
    model: MultiLoraModel, questions: Sequence[Question], choices: Sequence[AdapterSpec], *, batch_rows: int = 32
) -> list[Score]:
    """One score for each choice of adapters; all choices share the batches, a row for each question and choice.

    Raises DatasetError if two answers start with the same token: their first token would not tell them apart.
    """
    labels = label_tokens(model, sorted({question.answer for question in questions}))
    right = [[0, 0] for _ in choices]
    per_batch = max(1, batch_rows // len(choices))
    order = sorted(questions, key=lambda question: question.num_characters)  # rows of one length need little padding
    for start in range(0, len(order), per_batch):
        part = order[start : start + per_batch]
        prompts = [question.messages for _ in choices for question in part]
        rows = [choice for choice in choices for _ in part]
        logits = first_token_logits(model, prompts, adapters=rows)
        free = logits.argmax(dim=-1).tolist()
        ids = list(labels.values())
        limited = [ids[i] for i in logits[:, ids].argmax(dim=-1).tolist()]
        for row in range(len(rows)):
            wanted = labels[part[row % len(part)].answer]
            right[row // len(part)][0] += free[row] == wanted
            right[row // len(part)][1] += limited[row] == wanted
    total = len(questions)
    return [Score(num_questions=total, exact=exact / total, among_labels=among / total) for exact, among in right]


def exact_matches(
    model: MultiLoraModel, questions: Sequence[Question], choices: Sequence[AdapterSpec], *, batch_rows: int = 32
) -> list[float]:
    """For each choice of adapters, the share of questions whose every answer token is the most likely one.

    That is what greedy generation writes, at the price of one forward pass; answers may have several tokens.
    """
    answered = right_answers(model, questions, choices, batch_rows=batch_rows)
    return [sum(of_choice) / len(questions) for of_choice in answered]


@torch.no_grad()
def right_answers(
    model: MultiLoraModel, questions: Sequence[Question], choices: Sequence[AdapterSpec], *, batch_rows: int = 32
) -> list[list[bool]]:
    """For each choice of adapters and each question, whether every answer token is the most likely one."""
    right = [[False] * len(questions) for _ in choices]
    per_batch = max(1, batch_rows // len(choices))
    order = sorted(range(len(questions)), key=lambda number: questions[number].num_characters)
    for start in range(0, len(order), per_batch):
        numbers = order[start : start + per_batch]
        ids, mask, answers = _with_answers(model, [questions[number] for number in numbers])
        rows = [choice for choice in choices for _ in numbers]
        copies = (len(choices), 1)
        kept = max(len(answer) for answer in answers) + 1
        output = model(
            ids.repeat(copies),
            mask.repeat(copies),
            adapters=rows,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0).repeat(copies),
            logits_to_keep=kept,
            use_cache=False,
        )
        guesses = output.logits.argmax(dim=-1)  # [rows, kept]
        for row in range(len(rows)):
            choice, place = divmod(row, len(numbers))
            answer = answers[place]
            right[choice][numbers[place]] = guesses[row, -len(answer) - 1 : -1].tolist() == answer
    return right


def _with_answers(model: MultiLoraModel, questions: Sequence[Question]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Prompts followed by their answers, padded on the left: ids and mask [questions, tokens], answers' tokens."""
    tokenizer = model.tokenizer
    prompts = encode_prompts(tokenizer, [question.messages for question in questions])
    answers = [tokenizer(question.answer, add_special_tokens=False)["input_ids"] for question in questions]
    rows = [
        ids[mask == 1].tolist() + answer
        for ids, mask, answer in zip(prompts["input_ids"], prompts["attention_mask"], answers, strict=True)
    ]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = model.base.device
    return ids.to(device), mask.to(device), answers


def label_tokens(model: MultiLoraModel, labels: Sequence[str]) -> dict[str, int]:
    """The first token of each label, as it stands at the start of an answer."""
    tokens = {label: model.tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in labels}
    if len(set(tokens.values())) < len(tokens):
        raise DatasetError(f"the answers {tokens} share a first token, so it can't judge them. Choose other labels.")
    return tokens
