"""A job's training and held-out examples, and which of them a step takes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from loraplex.errors import DatasetError
from loraplex.models.text.end_tokens import TrainingEnds, training_ends
from loraplex.routing.invocation import invocation_start
from loraplex.training.adapters.config import AdapterJob
from loraplex.training.core.rng import Purpose, generator
from loraplex.training.data.examples import Example, hold_out, load_examples, steps_per_epoch
from loraplex.training.data.preferences import read_pairs, read_rewarded
from loraplex.training.data.records import Record, add_content, read_records


@dataclass(frozen=True, kw_only=True)
class JobData:
    """What one job trains on and is evaluated on, in tokens."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    num_steps: int
    steps_per_epoch: int
    records_per_step: int
    seed: int
    digest: str  # of the files: a checkpoint belongs to their content
    end_tokens: tuple[int, ...] = ()  # that answers are trained to end with

    def examples_of_step(self, step: int) -> list[Example]:
        """The records that step `step` (from 0) takes: every epoch goes through all, in its own order.

        The last step of an epoch takes what is left.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.records_per_step
        order = _order(self.seed, epoch, len(self.train))
        return [self.train[number] for number in order[first : first + self.records_per_step]]

    def met_in_training(self) -> Sequence[Example]:
        """The examples that some step takes."""
        if self.num_steps >= self.steps_per_epoch:
            return self.train
        return [example for step in range(self.num_steps) for example in self.examples_of_step(step)]


@lru_cache(maxsize=64)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=generator(seed, Purpose.ORDER, epoch)).tolist()
    return order


def load_job_data(
    job: AdapterJob, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: TrainingEnds | None = None
) -> JobData:
    """Read, check, tokenize and split a job's data. Raises DatasetError or ConfigError."""
    ends = ends or training_ends(None, tokenizer)
    steps, evaluation = job.steps, job.evaluation
    train = _load(job, job.data, tokenizer, vocab_size, ends)
    digest = hashlib.sha256()
    add_content(digest, job.data)
    if job.eval_data is not None:
        held_out = _load(job, job.eval_data, tokenizer, vocab_size, ends)
        add_content(digest, job.eval_data)
    else:
        draw = generator(job.seed, Purpose.SPLIT)
        train, held_out = hold_out(job.label, train, evaluation.eval_fraction, draw, str(job.data))
    per_epoch = steps_per_epoch(len(train), steps.records_per_step)
    return JobData(
        train=train,
        held_out=held_out[: evaluation.eval_records],
        num_steps=steps.count(job.label, per_epoch, job.optimizer),
        steps_per_epoch=per_epoch,
        records_per_step=steps.records_per_step,
        seed=job.seed,
        digest=digest.hexdigest(),
        end_tokens=ends.all,
    )


def _load(
    job: AdapterJob, path: str | Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: TrainingEnds
) -> list[Example]:
    examples = _examples(job, path, tokenizer, vocab_size, ends)
    if job.gates_before_user != 1 and not any(example.num_before_user for example in examples):
        raise DatasetError(
            f"{job.label}: gates_before_user is {job.gates_before_user!r}, but no record of {path} has tokens before a "
            'user\'s turn. Write conversations ({"messages": [...]}), or leave gates_before_user at 1.'
        )
    if job.reft is not None and job.reft.positions.depends_on_prompt:
        for answer in (one for example in examples for one in example.both):
            _check_one_answer(job, answer)
    return [_with_invocation(job, example) for example in examples] if job.invocation is not None else examples


def _examples(
    job: AdapterJob, path: str | Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: TrainingEnds
) -> list[Example]:
    """The records that the job's loss takes; of pairs the chosen answers, which have the rejected ones."""

    def load(records: Sequence[Record]) -> list[Example]:
        longest = job.steps.max_length
        counted = [record.last_turn_alone() for record in records] if job.turns == "last" else records
        return load_examples(job.label, counted, str(path), tokenizer, vocab_size, max_length=longest, ends=ends)

    if job.loss == "cross_entropy":
        return load(read_records(path))
    if job.loss == "reward":
        rewarded = read_rewarded(path)
        examples = load([record for record, _ in rewarded])
        return [replace(e, weight=reward) for e, (_, reward) in zip(examples, rewarded, strict=True)]
    pairs = load([record for pair in read_pairs(path) for record in pair])
    return [replace(e, rejected=other) for e, other in zip(pairs[::2], pairs[1::2], strict=True)]


def _check_one_answer(job: AdapterJob, example: Example) -> None:
    """Raise DatasetError where it isn't clear which of a record's tokens are the prompt."""
    if example.answer[-1] - example.answer[0] >= len(example.answer):
        assert job.reft is not None, "only interventions ask where a prompt ends"
        raise DatasetError(
            f"{example.place} has several answers, but job {job.name!r} trains interventions at {job.reft.positions}, "
            "tokens of one prompt. Write a record for each answer, or choose positions='all'."
        )


def _with_invocation(job: AdapterJob, example: Example) -> Example:
    """The example of an aLoRA's job, which is adapted from the last occurrence of its invocation on."""
    tokens = job.invocation or ()
    start = invocation_start(example.ids, tokens)
    rejected = None if example.rejected is None else _with_invocation(job, example.rejected)
    if start is not None:
        return replace(example, first_adapted=start, rejected=rejected)
    raise DatasetError(
        f"{example.place} lacks the invocation tokens {list(tokens)} of the aLoRA job {job.name!r}, so "
        "the adapter would stay off. End the prompt with them, or raise max_length if they are cut off."
    )
