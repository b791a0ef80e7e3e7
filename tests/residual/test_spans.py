"""From marked text to token spans, and vectors from contrasting prompts."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.models.checkpoints.loading import load_tokenizer
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.steering import spans_of_ranges, spans_of_text, unmark
from loraplex.residual.vectors import vector_from_pairs
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(smollm2)


def test_marks_are_taken_out_of_the_text() -> None:
    assert unmark("Use <<this>> and <<that one>>.") == ("Use this and that one.", ((4, 8), (13, 21)))
    assert unmark("nothing marked") == ("nothing marked", ())
    assert unmark("a [[b]]", "[[", "]]") == ("a b", ((2, 3),))


@pytest.mark.parametrize("marked", ["a <<b", "a >> b", "<<a <<b>> c>>", "a <<>> b"])
def test_marks_that_do_not_pair_are_refused(marked: str) -> None:
    with pytest.raises(RequestError, match="mark"):
        unmark(marked)


def test_spans_hold_the_tokens_of_the_marked_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text, ranges = unmark("The capital of <<France>> is Paris, of <<Great Britain>> London.")
    spans = spans_of_ranges(tokenizer, text, ranges)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(ids[start:stop]).strip() for start, stop in spans] == ["France", "Great Britain"]
    assert spans_of_text(tokenizer, text, "France") == spans[:1]
    assert len(spans_of_text(tokenizer, "yes and yes", "yes")) == 2


def test_text_that_is_not_there_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RequestError, match="not in the prompt"):
        spans_of_text(tokenizer, "The capital", "Paris")
    with pytest.raises(RequestError, match="no token"):
        spans_of_ranges(tokenizer, "The capital", [(40, 50)])


def test_vector_is_the_mean_difference_of_block_outputs(tokenizer: PreTrainedTokenizerBase) -> None:
    class Ids:
        def __call__(self, text: str, **options: object) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    base = tiny_model("llama")
    layers = AttentionLayers(base)
    pairs = [("3 4 5", "3 4 6"), ("9 8", "7 8 9 10")]
    vector = vector_from_pairs(base, layers, Ids(), pairs, at=[1])  # type: ignore[arg-type]
    outputs = []
    block = base.model.layers[1].self_attn
    handle = block.register_forward_hook(lambda module, args, output: outputs.append(output[0][0, -1]))
    with torch.no_grad():
        for text in ("3 4 5", "3 4 6", "9 8", "7 8 9 10"):
            base(input_ids=torch.tensor([[int(word) for word in text.split()]]))
    handle.remove()
    expected = ((outputs[0] - outputs[1]) + (outputs[2] - outputs[3])) / 2
    assert list(vector.vectors) == [1]
    assert torch.allclose(vector.vectors[1], expected, atol=1e-6)
    with pytest.raises(RequestError, match="pairs"):
        vector_from_pairs(base, layers, tokenizer, [])
    with pytest.raises(RequestError, match="don't exist"):
        vector_from_pairs(base, layers, tokenizer, pairs, at=[5])
