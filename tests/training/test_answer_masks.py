"""Which tokens of a conversation count: told by the template's generation blocks, or by renderings of its prefixes."""

from typing import Any

import pytest

from loraplex.errors import DatasetError
from loraplex.training.data.examples import Example, make_examples
from loraplex.training.data.records import Record
from tests.training.tiny_jobs import CHAT_TEMPLATE, tiny_tokenizer

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Earlier answers lose what stands before the last "=": as templates of thinking models do.
FORGETS = (
    "{% for message in messages %}{% set is_old = message['role'] == 'assistant' and not loop.last %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'].split('=')[-1] if is_old else message['content'] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "x=cd"},
    {"role": "user", "content": "ef"},
    {"role": "assistant", "content": "y=gh"},
)


def example(template: str, *, last: bool = False, turns: tuple[dict[str, Any], ...] = TURNS) -> Example:
    record = Record(place="here", messages=turns)
    (made,) = make_examples([record.last_turn_alone() if last else record], tiny_tokenizer(template), 512)
    return made


def answers(made: Example, template: str) -> str:
    return "".join(tiny_tokenizer(template).convert_ids_to_tokens([made.ids[index] for index in made.answer]))


def test_generation_blocks_mark_what_renderings_of_prefixes_find() -> None:
    assert example(MARKED) == example(CHAT_TEMPLATE)
    assert example(MARKED, last=True) == example(CHAT_TEMPLATE, last=True)
    assert answers(example(MARKED), MARKED) == "x=cd<|im_end|>y=gh<|im_end|>"
    assert answers(example(MARKED, last=True), MARKED) == "y=gh<|im_end|>"


def test_the_end_of_a_turn_counts_where_it_stands_outside_of_its_block() -> None:
    outside = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
    assert outside != MARKED
    assert example(outside) == example(MARKED)


def test_blocks_tell_the_answers_of_a_template_that_renders_a_prefix_otherwise() -> None:
    marked = FORGETS.replace(
        "{{ message['content'].split('=')[-1] if is_old else message['content'] }}{{ '<|im_end|>\n' }}",
        "{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'].split('=')[-1] if is_old else message['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}",
    )
    with pytest.raises(DatasetError, match=r"assistant turn 0 can't be told.*turns='last'"):
        example(FORGETS)
    assert answers(example(marked), marked) == "cd<|im_end|>y=gh<|im_end|>"


def test_the_last_turn_alone_is_exact_where_earlier_ones_are_not() -> None:
    made = example(FORGETS, last=True)
    assert answers(made, FORGETS) == "y=gh<|im_end|>"
    whole = tiny_tokenizer(FORGETS).apply_chat_template(list(TURNS), return_dict=True)["input_ids"]
    assert list(made.ids) == whole[: len(made.ids)]


def test_refuses_blocks_that_are_not_one_for_each_turn() -> None:
    broken = MARKED.replace("message['role'] == 'assistant' %}{% gen", "message['content'] == 'y=gh' %}{% gen")
    with pytest.raises(DatasetError, match=r"here: the chat template marks 1 stretches.* 2 assistant turns"):
        example(broken)
