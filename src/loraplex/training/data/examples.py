"""From records to token ids, with the positions whose next token counts for the loss."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from loraplex.errors import DatasetError, RequestError
from loraplex.models.text.chat_template import render_chat
from loraplex.models.text.end_tokens import TrainingEnds, training_ends
from loraplex.training.data.first_user import BeforeFirstUser
from loraplex.training.data.generation_mask import generation_spans, marks_generations
from loraplex.training.data.records import Record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A record as the model sees it."""

    ids: tuple[int, ...]  # the record's tokens up to the last that counts, after truncation
    answer: tuple[int, ...]  # ascending indices (>= 1) of the tokens that count for the loss
    place: str
    num_truncated: int = 0  # tokens cut off on the left
    first_adapted: int = 0  # aLoRA: where the invocation starts
    num_before_user: int = 0  # tokens before the content of the first user turn: the template's, and a system prompt
    weight: float = 1.0  # of its tokens' losses: a reward
    rejected: "Example | None" = None  # of a pair, whose chosen answer this is

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """What goes through the model: all but the last token, after which nothing is predicted."""
        return self.ids[:-1]

    @property
    def both(self) -> "tuple[Example, ...]":
        """The example, and the rejected answer of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def num_tokens(self) -> int:
        return sum(len(example.ids) for example in self.both)

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """The token after each of the predicting positions answer[i] - 1."""
        return tuple(self.ids[index] for index in self.answer)


def make_examples(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    ends: TrainingEnds | None = None,  # None: what the tokenizer alone says
) -> list[Example]:
    """Tokenize records and mark their answers.

    Conversations go through the tokenizer's chat template; the assistant turns from the record's first that counts
    on count, with their end-of-turn tokens. Which they are the template's `{% generation %}` blocks tell, else
    renderings of the conversation up to each. The last one gets the end of a completion where the template writes
    none. A completion counts with an end token after it, and is tokenized apart from its prompt, as when the model is
    asked. Of a text all tokens count, the end token included. Records of more than
    `max_length` tokens lose tokens on the left: the answer and what precedes it closely stay. Raises
    DatasetError.
    """
    ends = ends or training_ends(None, tokenizer)
    by_template = marks_generations(tokenizer)
    parts_of = [
        [] if by_template and record.messages is not None else _record_parts(record, tokenizer) for record in records
    ]
    texts = [text for parts in parts_of for text, _ in parts]
    all_ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    examples, before = [], BeforeFirstUser(tokenizer)
    for record, parts in zip(records, parts_of, strict=True):
        ids = [next(all_ids) for _ in parts]
        if record.messages is not None and by_template:
            tokens, answer = _marked_conversation(record, tokenizer, ends)
        elif record.messages is not None:
            tokens, answer = _conversation(ids, record, ends)
        else:
            tokens, answer = _plain(ids, [is_answer for _, is_answer in parts], tokenizer, ends)
        num_before_user = before.count(record.messages, tokens) if record.messages is not None else 0
        examples.append(_truncated(tokens, answer, record.place, max_length, num_before_user))
    return examples


def _record_parts(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Texts to tokenize, and whether they are answers; of a conversation, its growing prefixes."""
    if record.text is not None:
        return [(record.text, True)]
    if record.messages is None:
        assert record.prompt is not None, f"{record.place}: a record without messages and text has a prompt"
        assert record.completion is not None, f"{record.place}: a prompt has a completion"
        return [(record.prompt, False), (record.completion, True)]
    if tokenizer.chat_template is None:
        raise DatasetError(
            f"{record.place} is a conversation, but the tokenizer has no chat template. Set "
            "tokenizer.chat_template, or "
            'write the record as {"prompt": "...", "completion": "..."}.'
        )
    parts = []
    for index, message in enumerate(record.messages):
        if message["role"] == "assistant" and index >= record.first_counted:
            parts.append((_render(record, index, tokenizer, ask=True), False))
            parts.append((_render(record, index + 1, tokenizer, ask=False), True))
    return parts


def _render(record: Record, num_messages: int, tokenizer: PreTrainedTokenizerBase, *, ask: bool) -> str:
    assert record.messages is not None, f"{record.place} has no messages to render"
    try:
        return render_chat(tokenizer, record.messages[:num_messages], add_generation_prompt=ask)
    except RequestError as error:
        raise DatasetError(
            f"{record.place}, its first {num_messages} messages: {error} Write the roles in the order that the "
            "template asks for."
        ) from error


def _conversation(prefixes: Sequence[Sequence[int]], record: Record, ends: TrainingEnds) -> tuple[list[int], list[int]]:
    """The tokens up to the last assistant turn, and the indices of the tokens of all of them."""
    end = ends.plain if ends.turn is None else ends.turn
    answer: list[int] = []
    for turn in range(0, len(prefixes), 2):
        before, through, last = prefixes[turn], prefixes[turn + 1], prefixes[-1]
        stable = through[: len(before)] == before and last[: len(through)] == through
        if not stable or len(through) == len(before):
            raise DatasetError(
                f"{record.place}: assistant turn {turn // 2} can't be told from the prompt, because the "
                "tokenizer's chat template renders the conversation up to it in another way than as a part "
                "of the whole (thinking removed from earlier turns, for example). Train on the last turns alone "
                "(turns='last'), or write the record as "
                '{"prompt": "...", "completion": "..."}.'
            )
        answer += range(len(before), _turn_end(through, len(before), end))
    return _ended(prefixes[-1], answer, end)


def _marked_conversation(
    record: Record, tokenizer: PreTrainedTokenizerBase, ends: TrainingEnds
) -> tuple[list[int], list[int]]:
    """The same by a template that marks what the assistant generates."""
    assert record.messages is not None, f"{record.place} has no messages"
    try:
        ids, spans = generation_spans(tokenizer, record.messages)
    except RequestError as error:
        raise DatasetError(
            f"{record.place}: {error} Write the roles in the order that the template asks for."
        ) from error
    turns = [number for number, message in enumerate(record.messages) if message["role"] == "assistant"]
    if len(spans) != len(turns):
        raise DatasetError(
            f"{record.place}: the chat template marks {len(spans)} stretches of text as generated, but the "
            f"conversation has {len(turns)} assistant turns, so which tokens to train on can't be told. Mend its "
            'generation blocks, or write the record as {"prompt": "...", "completion": "..."}.'
        )
    end = ends.plain if ends.turn is None else ends.turn
    answer: list[int] = []
    for turn, span in zip(turns, spans, strict=True):
        if turn >= record.first_counted:
            # Answers are trained to end, where a template leaves the end-of-turn token outside of its block too.
            is_open = ids[span.stop - 1] != end and ids[span.stop : span.stop + 1] == [end]
            answer += range(span.start, _turn_end(ids[: span.stop + is_open], span.start, end))
    return _ended(ids, answer, end)


def _ended(ids: Sequence[int], answer: list[int], end: int | None) -> tuple[list[int], list[int]]:
    """The tokens up to the last of the answers, and an end token where the template writes none."""
    tokens = list(ids[: answer[-1] + 1])
    if end is not None and tokens[-1] != end:  # the template ends its turns with nothing that serving could stop at
        answer.append(len(tokens))
        tokens.append(end)
    return tokens, answer


def _turn_end(ids: Sequence[int], start: int, end: int | None) -> int:
    """After the end-of-turn token, where there is one: what the template writes behind it is never generated."""
    ends = [index for index in range(start, len(ids)) if ids[index] == end]
    return ends[-1] + 1 if ends else len(ids)


def _plain(
    parts: Sequence[Sequence[int]],
    is_answer: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    ends: TrainingEnds,
) -> tuple[list[int], list[int]]:
    bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    eos = [ends.plain] if ends.plain is not None else []
    tokens, answer = list(bos), []
    for ids, counts in zip(parts, is_answer, strict=True):
        if counts:
            answer = list(range(len(tokens), len(tokens) + len(ids) + len(eos)))
        tokens += ids
    # The first token of all has nothing before it to predict it from.
    return tokens + eos, [index for index in answer if index > 0]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def _truncated(tokens: list[int], answer: list[int], place: str, max_length: int, num_before_user: int = 0) -> Example:
    cut = max(0, len(tokens) - max_length)
    kept = tuple(index - cut for index in answer if index - cut > 0)
    if not kept:
        raise DatasetError(
            f"{place} has no token to learn: the answer is {'cut off' if cut else 'a single first token'}. "
            f"Write a longer answer or raise max_length ({max_length})."
        )
    return Example(tuple(tokens[cut:]), kept, place, cut, num_before_user=max(0, num_before_user - cut))


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


def steps_per_epoch(num_records: int, records_per_step: int) -> int:
    return math.ceil(num_records / records_per_step)
