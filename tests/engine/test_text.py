"""Text as it comes: whole characters, nothing of a stop string, and in the end what the tokenizer decodes at once."""

import pytest

from loraplex.engine.sampling.detokenizer import Detokenizer
from loraplex.models.checkpoints.loading import load_tokenizer

TEXTS = ("The capital of France is Paris.", "naïve — 数学 🙂 done", "a\n\n  b\tc", "1234 567.89%")


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(smollm2)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text_and_hold_whole_characters(tokenizer, text):
    prompt = tokenizer("Question: ")["input_ids"]
    answer = Detokenizer(tokenizer, prompt, ())
    pieces = [answer.add(token) for token in tokenizer(text)["input_ids"]]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + answer.end() == text
    assert answer.total == text


@pytest.mark.parametrize("stop", [("Paris",), ("is Par", "zzz"), ("capital of", "Paris"), (".",)])
def test_text_ends_before_the_first_stop_string(tokenizer, stop):
    answer = Detokenizer(tokenizer, (), stop)
    pieces = []
    for token in tokenizer(TEXTS[0])["input_ids"]:
        pieces.append(answer.add(token))
        if answer.is_stopped:
            break
    expected = TEXTS[0][: min(TEXTS[0].find(text) for text in stop if text in TEXTS[0])]
    assert answer.is_stopped
    assert "".join(pieces) + answer.end() == expected


def test_the_beginning_of_a_stop_string_is_told_when_it_goes_on_otherwise(tokenizer):
    answer = Detokenizer(tokenizer, (), ("Parix", "France was"))
    pieces = [answer.add(token) for token in tokenizer(TEXTS[0])["input_ids"]]
    assert not any(piece.endswith(" Pari") for piece in pieces)
    assert "".join(pieces) + answer.end() == TEXTS[0]
    assert not answer.is_stopped


def test_an_unfinished_character_at_the_end_is_told_as_the_tokenizer_does(tokenizer):
    tokens = tokenizer("🙂")["input_ids"][:-1]
    answer = Detokenizer(tokenizer, (), ())
    assert "".join(answer.add(token) for token in tokens) == ""
    assert answer.end() == tokenizer.decode(tokens)


def test_without_a_tokenizer_there_is_no_text():
    answer = Detokenizer(None, (1, 2), ())
    assert answer.add(5) + answer.end() == ""
