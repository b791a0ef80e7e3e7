"""/v1/embeddings and /v1/score: transformers' last hidden states, through OpenAI's client."""

import base64
import copy

import numpy as np
import openai
import pytest
import torch
from peft import PeftModel

from tests.server.tiny_server import Running, character_tokenizer, wait_until_idle
from tests.tiny_models import tiny_model

TEXTS = ["The protein", "Silk", "x" * 100]


@pytest.fixture(scope="module")
def expected(root):
    """By PEFT, for each text alone: [tokens, hidden]."""
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_model("llama")), str(root / "a")).eval()
    tokenizer = character_tokenizer()
    with torch.no_grad():
        return [
            model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states[-1][0]
            for text in TEXTS
        ]


def post(server: Running, path: str, **body):
    return server.http().post(path, json={"model": "a"} | body)


def unit(vector: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vector.double(), dim=-1).numpy()


def test_vectors_are_normalized_means_of_pefts_hidden_states(server, expected):
    told = server.client().embeddings.create(model="a", input=TEXTS)  # asks for base64
    assert [entry.index for entry in told.data] == [0, 1, 2]
    for entry, hidden in zip(told.data, expected, strict=True):
        np.testing.assert_allclose(entry.embedding, unit(hidden.mean(dim=0)), atol=1e-5)
    assert told.usage.prompt_tokens == told.usage.total_tokens == sum(map(len, TEXTS))
    plain = server.client().embeddings.create(model="a", input=TEXTS, encoding_format="float")
    for one, other in zip(plain.data, told.data, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-7)


def test_last_tokens_and_lengths_as_they_are(server, expected):
    told = post(server, "/v1/embeddings", input=TEXTS, pooling="last", normalize=False).json()
    for entry, hidden in zip(told["data"], expected, strict=True):
        np.testing.assert_allclose(entry["embedding"], hidden[-1], rtol=1e-3, atol=1e-4)


def test_one_text_token_ids_and_base64(server):
    ids = character_tokenizer()(TEXTS[0])["input_ids"]
    first = post(server, "/v1/embeddings", input=TEXTS[0]).json()["data"]
    assert post(server, "/v1/embeddings", input=ids).json()["data"] == first
    assert post(server, "/v1/embeddings", input=[ids]).json()["data"] == first
    coded = post(server, "/v1/embeddings", input=ids, encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), "<f4"), first[0]["embedding"], atol=1e-7)
    own = len(first[0]["embedding"])
    assert post(server, "/v1/embeddings", input=ids, dimensions=own).json()["data"] == first


def test_many_texts_come_in_their_order(server):
    texts = [f"text {number}" for number in range(150)]
    told = post(server, "/v1/embeddings", input=texts).json()["data"]
    assert [entry["index"] for entry in told] == list(range(150))
    alone = post(server, "/v1/embeddings", input=texts[77]).json()["data"][0]["embedding"]
    np.testing.assert_allclose(told[77]["embedding"], alone, atol=1e-5)
    wait_until_idle(server)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x" * 300}, "input"),
        ({"input": [[]]}, None),
        ({"input": [1, "a"]}, "input"),
        ({"input": [10**6]}, None),
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "unheard_of": 1}, "unheard_of"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({}, "input"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_has_no_vector_is_a_400(server, fields, param):
    answer = post(server, "/v1/embeddings", **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_long_texts_can_be_cut(server):
    cut = post(server, "/v1/embeddings", input="x" * 300, truncate_prompt_tokens=-1).json()
    assert cut["usage"]["prompt_tokens"] == 255


def test_unknown_models_are_404(server):
    with pytest.raises(openai.NotFoundError):
        server.client().embeddings.create(model="unknown", input="x")


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")])
def test_scores_are_cosines(server, expected, names):
    vectors = [unit(hidden.mean(dim=0)) for hidden in expected]
    told = post(server, "/v1/score", **{names[0]: TEXTS[0], names[1]: TEXTS}).json()
    scores = [entry["score"] for entry in told["data"]]
    np.testing.assert_allclose(scores, [float(vectors[0] @ vector) for vector in vectors], atol=1e-5)
    assert told["usage"]["prompt_tokens"] == len(TEXTS[0]) + sum(map(len, TEXTS))
    pairs = post(server, "/v1/score", **{names[0]: TEXTS, names[1]: TEXTS[::-1]}).json()["data"]
    expected_pairs = [float(one @ other) for one, other in zip(vectors, vectors[::-1], strict=True)]
    np.testing.assert_allclose([entry["score"] for entry in pairs], expected_pairs, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text_1": "x"},
        {"text_1": ["x", "y"], "text_2": "z"},
        {"text_1": "x", "text_2": "y", "queries": "z", "documents": "z"},
    ],
)
def test_pairs_that_are_none_are_a_400(server, fields):
    assert post(server, "/v1/score", **fields).status_code == 400
