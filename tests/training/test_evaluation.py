"""Exact match of one-word answers, against what the model really generates."""

import json

import pytest

from loraplex import MultiLoraModel
from loraplex.errors import DatasetError
from loraplex.models.text.prompts import generate_texts
from loraplex.training.adapters.evaluation import Question, evaluate, exact_matches, label_tokens, read_questions


@pytest.fixture(scope="module")
def model(smollm2):
    return MultiLoraModel.from_pretrained(smollm2, dtype="float32")


def test_score_counts_the_answers_that_the_model_generates(model):
    """Questions whose truth is, or is not, the word the base model really starts with."""
    prompts = ["What is the capital of France? One word.", "What is two plus two? One word.", "Say hello. One word."]
    first_words = [text.split()[0].strip(".,!") for text in generate_texts(model, prompts, max_new_tokens=4).texts]
    questions = [Question(prompt=p, answer=w) for p, w in zip(prompts, first_words, strict=True)]
    questions[1] = Question(prompt=prompts[1], answer="banana")
    tokens = label_tokens(model, sorted({q.answer for q in questions}))
    said = {
        q.prompt: model.tokenizer(w, add_special_tokens=False)["input_ids"][0]
        for q, w in zip(questions, first_words, strict=True)
    }
    expected = sum(said[q.prompt] == tokens[q.answer] for q in questions) / 3
    (score,) = evaluate(model, questions, [None], batch_rows=2)
    assert (score.num_questions, score.exact) == (3, expected)
    assert 0 < score.exact < 1
    assert score.among_labels >= score.exact


def test_choices_are_scored_apart_in_shared_batches(model):
    questions = [Question(prompt="What is the capital of France?", answer="The")]
    first, second = evaluate(model, questions, [None, None])
    assert first == second


def test_answers_with_one_first_token_can_not_be_told_apart(model):
    with pytest.raises(DatasetError, match="share a first token"):
        label_tokens(model, ["yes sir", "yes madam"])


def test_a_conversation_asks_for_its_last_answer(model, tmp_path):
    """The same words as the model writes after the turns before: a single turn would be answered otherwise."""
    history = [
        {"role": "user", "content": "Answer with one word. What is the capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And of Italy?"},
    ]
    (said,) = generate_texts(model, [history], max_new_tokens=3).texts
    (alone,) = generate_texts(model, ["And of Italy?"], max_new_tokens=3).texts
    assert said != alone
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"messages": [*history, {"role": "assistant", "content": said}]}))
    (question,) = read_questions(path)
    assert (question.prompt, question.answer, list(question.history)) == ("And of Italy?", said, history[:2])
    assert exact_matches(model, [question], [None]) == [1.0]
    assert exact_matches(model, [Question(prompt=question.prompt, answer=said)], [None]) == [0.0]


def test_questions_alternate_turns(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"text": "no question"}))
    with pytest.raises(DatasetError, match=r"q\.jsonl:1"):
        read_questions(path)
