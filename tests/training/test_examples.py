"""Which tokens count for the loss."""

from typing import Any

import pytest

from loraplex.errors import DatasetError
from loraplex.training.data.examples import Example, make_examples
from loraplex.training.data.records import Record
from tests.training.tiny_jobs import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def example(max_length: int = 100, **form: Any) -> Example:
    (made,) = make_examples([Record(place="file:1", **form)], TOKENIZER, max_length)
    return made


def text_of(ids: tuple[int, ...]) -> str:
    return "".join(TOKENIZER.convert_ids_to_tokens(list(ids)))


def answers(made: Example) -> list[str]:
    """The runs of tokens that count."""
    runs: list[list[int]] = []
    for index in made.answer:
        if not runs or runs[-1][-1] != index - 1:
            runs.append([])
        runs[-1].append(index)
    return [text_of(tuple(made.ids[index] for index in run)) for run in runs]


def turns(*contents: str) -> tuple[dict[str, Any], ...]:
    roles = ["user", "assistant"]
    return tuple({"role": roles[number % 2], "content": content} for number, content in enumerate(contents))


def test_every_assistant_turn_counts_with_its_end_and_nothing_else() -> None:
    made = example(messages=turns("hi", "ho", "what", "that"))
    assert answers(made) == ["ho<|im_end|>", "that<|im_end|>"]
    assert text_of(made.ids).startswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n")
    assert made.ids[-1] == TOKENIZER.eos_token_id


def test_messages_after_the_last_answer_are_left_out() -> None:
    assert example(messages=turns("hi", "ho", "bye")) == example(messages=turns("hi", "ho"))


def test_a_completion_counts_with_an_end_and_its_prompt_does_not() -> None:
    made = example(prompt="2+2=", completion="4")
    assert (text_of(made.ids), answers(made)) == ("2+2=4<|im_end|>", ["4<|im_end|>"])


def test_of_a_text_all_tokens_count_that_have_one_before_them() -> None:
    made = example(text="abc")
    assert (text_of(made.ids), answers(made)) == ("abc<|im_end|>", ["bc<|im_end|>"])
    assert (made.inputs, made.targets) == (made.ids[:-1], made.ids[1:])


def test_a_completion_without_prompt_counts_from_its_second_token() -> None:
    assert answers(example(prompt="", completion="abc")) == ["bc<|im_end|>"]


def test_long_records_lose_tokens_on_the_left() -> None:
    made = example(max_length=5, prompt="what is it? ", completion="yes")
    assert (text_of(made.ids), answers(made)) == (" yes<|im_end|>", ["yes<|im_end|>"])
    assert made.num_truncated == 11
    assert answers(example(max_length=3, prompt="what? ", completion="yes")) == ["s<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = tiny_tokenizer(
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    once = make_examples([Record(place="file:1", messages=turns("a", "b"))], forgetful, 100)
    assert [once[0].ids[index] for index in once[0].answer] == [forgetful.convert_tokens_to_ids("b"), 3]  # and an end
    with pytest.raises(DatasetError, match="file:2: assistant turn 0"):
        make_examples([Record(place="file:2", messages=turns("a", "b", "c", "d"))], forgetful, 100)


def test_a_missing_or_failing_template_is_refused() -> None:
    record = Record(place="file:3", messages=turns("a", "b"))
    with pytest.raises(DatasetError, match="file:3 is a conversation, but the tokenizer has no chat template"):
        make_examples([record], tiny_tokenizer(None), 100)
    strict = tiny_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DatasetError, match=r"file:3.*roles must alternate"):
        make_examples([record], strict, 100)


def test_a_record_without_anything_to_predict_is_refused() -> None:
    headless = tiny_tokenizer()
    headless.eos_token = headless.chat_template = None
    with pytest.raises(DatasetError, match="file:4 has no token to learn"):
        make_examples([Record(place="file:4", text="a")], headless, 100)
