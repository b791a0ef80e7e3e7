"""A job's training and held-out examples, and which of them a step takes."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from loraplex.errors import ConfigError, DatasetError
from loraplex.models.end_tokens import TrainingEnds, training_ends
from loraplex.training.config import AdapterJob
from loraplex.training.core.checks import check_num_steps
from loraplex.training.core.rng import Purpose, generator
from loraplex.training.data.examples import Example, make_examples
from loraplex.training.data.records import Record, add_content, read_records

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JobData:
    """What one job trains on and is evaluated on, in tokens."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    num_steps: int
    records_per_step: int
    seed: int
    digest: str  # of the files: a checkpoint belongs to their content
    end_tokens: tuple[int, ...] = ()  # that answers are trained to end with

    @property
    def num_truncated(self) -> int:
        return sum(example.num_truncated > 0 for example in self.train)

    def examples_of_step(self, step: int) -> list[Example]:
        """The records that step `step` (from 0) takes: every epoch goes through all, in its own order.

        The last step of an epoch takes what is left.
        """
        epoch, index = divmod(step, steps_per_epoch(len(self.train), self.records_per_step))
        order = torch.randperm(len(self.train), generator=generator(self.seed, Purpose.ORDER, epoch)).tolist()
        first = index * self.records_per_step
        return [self.train[number] for number in order[first : first + self.records_per_step]]


def load_job_data(
    job: AdapterJob, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: TrainingEnds | None = None
) -> JobData:
    """Read, check, tokenize and split a job's data. Raises DatasetError or ConfigError."""
    ends = ends or training_ends(None, tokenizer)
    train = _load(job, job.data, tokenizer, vocab_size, ends)
    digest = hashlib.sha256()
    add_content(digest, job.data)
    if job.eval_data is not None:
        held_out = _load(job, job.eval_data, tokenizer, vocab_size, ends)
        add_content(digest, job.eval_data)
    else:
        train, held_out = _split(job, train)
    num_steps = job.max_steps or (job.epochs or 0) * steps_per_epoch(len(train), job.records_per_step)
    check_num_steps(f"job {job.name!r}", num_steps)
    if job.warmup_steps >= num_steps:
        raise ConfigError(
            f"job {job.name!r}: warmup_steps is {job.warmup_steps}, but the job has only {num_steps} steps. "
            "Lower warmup_steps."
        )
    return JobData(
        train=train,
        held_out=held_out[: job.eval_records],
        num_steps=num_steps,
        records_per_step=job.records_per_step,
        seed=job.seed,
        digest=digest.hexdigest(),
        end_tokens=ends.all,
    )


def steps_per_epoch(num_records: int, records_per_step: int) -> int:
    return math.ceil(num_records / records_per_step)


def _load(
    job: AdapterJob, path: str | Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: TrainingEnds
) -> list[Example]:
    label, records = f"job {job.name!r}", read_records(path)
    examples = load_examples(label, records, str(path), tokenizer, vocab_size, max_length=job.max_length, ends=ends)
    if job.invocation is not None:
        for example in examples:
            _check_invocation(job, example)
    return examples


def load_examples(
    label: str,  # what messages start with
    records: Sequence[Record],
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    max_length: int,
    ends: TrainingEnds,
) -> list[Example]:
    """Tokenize records, warn of truncated ones, and check that the base model knows all tokens. Raises DatasetError."""
    examples = make_examples(records, tokenizer, max_length, ends)
    num_truncated = sum(example.num_truncated > 0 for example in examples)
    if num_truncated:
        longest = max(len(example.ids) + example.num_truncated for example in examples)
        logger.warning(
            "%s: %d of the %d records in %s have more than max_length=%d tokens (up to %d) and lose their first ones",
            *(label, num_truncated, len(examples), place, max_length, longest),
        )
    for example in examples:
        if max(example.ids) >= vocab_size:
            raise DatasetError(
                f"{example.place} has the token {max(example.ids)}, but the base model knows only "
                f"{vocab_size}. Pass the tokenizer of this base model."
            )
    return examples


def _check_invocation(job: AdapterJob, example: Example) -> None:
    tokens = job.invocation
    if tokens is not None and invocation_start(example.ids, tokens) is None:
        raise DatasetError(
            f"{example.place} lacks the invocation tokens {list(tokens)} of the aLoRA job {job.name!r}, so "
            "the adapter would stay off. End the prompt with them, or raise max_length if they are cut off."
        )


def invocation_start(ids: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where the last occurrence of the invocation tokens starts."""
    size = len(invocation)
    starts = (
        start for start in range(len(ids) - size, -1, -1) if tuple(ids[start : start + size]) == tuple(invocation)
    )
    return next(starts, None)


def _split(job: AdapterJob, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    draw = generator(job.seed, Purpose.SPLIT)
    return hold_out(f"job {job.name!r}", examples, job.eval_fraction, draw, str(job.data))


def hold_out(
    label: str, examples: list[Example], fraction: float, draw: torch.Generator, place: str
) -> tuple[list[Example], list[Example]]:
    """Split off a drawn fraction of the examples; both parts keep their order. Raises DatasetError."""
    if fraction == 0:
        return examples, []
    num_held_out = max(1, round(fraction * len(examples)))
    if num_held_out >= len(examples):
        raise DatasetError(
            f"{label}: {place} has {len(examples)} record(s), too few to hold out {fraction:.0%} of them. Add "
            "records, give eval_data, or set eval_fraction=0."
        )
    order = torch.randperm(len(examples), generator=draw).tolist()
    held_out = set(order[:num_held_out])
    return (
        [example for number, example in enumerate(examples) if number not in held_out],
        [example for number, example in enumerate(examples) if number in held_out],
    )
