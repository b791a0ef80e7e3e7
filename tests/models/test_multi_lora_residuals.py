"""Residuals, captures and steerings of a MultiLoraModel's rows, beside LoRAs, links and mixtures."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraplex import MultiLoraModel
from loraplex.errors import AdapterExistsError, AdapterNotFoundError, RequestError
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.format import write_residual
from loraplex.residual.modules import FunctionResidual
from loraplex.residual.registry import AttentionRequest
from loraplex.residual.steering import Steering
from tests.parity.oracle import assert_close, padded_batch
from tests.residual.tiny_residuals import random_linked, random_vector
from tests.tiny_models import VOCAB_SIZE, tiny_model
from tests.xlora.mixed_model import mixed_model

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
CHOICES = ["science+a:0.5", None, "0:0.5+a:0.5+b:0.3", "1", "b:0.5+science", "a:0.5+v:0.5"]
LENGTH = 8


def linked_model(name: str, folder: Path) -> MultiLoraModel:
    """The mixture "science" of the adapters "0", "1", "2", and the residuals "a", "b" (from a folder) and "v"."""
    model = mixed_model(name, folder)
    layers = model.registry.linked.layers
    write_residual(random_linked(layers, 1, r=5), folder / "a")
    model.load_adapter("a", folder / "a")
    model.load_residual("b", random_linked(layers, 2, at=[1]))
    model.load_residual("v", random_vector(layers, 3))
    return model


def uncached_logits(model: MultiLoraModel, sequences: Tensor, mask: Tensor, **options: object) -> Tensor:
    """The logits of every new token [new tokens, rows, vocab], from one forward pass over the whole sequences."""
    grown = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    with torch.no_grad():
        out = model(sequences[:, :-1], grown[:, :-1], use_cache=False, **options)
    return out.logits[:, LENGTH - 1 :].transpose(0, 1)


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_cached_generation_of_all_kinds_of_rows_equals_the_uncached_forward(
    name: str, draft: bool, tmp_path: Path
) -> None:
    model = linked_model(name, tmp_path)
    ids, mask = padded_batch(len(CHOICES), LENGTH, "left", VOCAB_SIZE)
    out = model.generate(ids, mask, adapters=CHOICES, max_new_tokens=60, draft=draft, **GREEDY)
    expected = uncached_logits(model, out.sequences, mask, adapters=CHOICES)
    assert_close(torch.stack(out.logits), expected, f"draft={draft}")


def test_rows_equal_themselves_alone_and_differ_without_their_residuals(tmp_path: Path) -> None:
    model = linked_model("llama", tmp_path)
    ids, mask = padded_batch(len(CHOICES), LENGTH, "left", VOCAB_SIZE)
    with torch.no_grad():
        together = model(ids, mask, adapters=CHOICES).logits
        for row, choice in enumerate(CHOICES):
            real = mask[row].bool()
            alone = model(ids[row, real].unsqueeze(0), adapters=[choice]).logits[0]
            assert_close(together[row, real], alone, f"row {row}")
        bare = ["science", None, "0:0.5", "1", "science", None]
        without = model(ids, mask, adapters=bare).logits
    assert without[1].equal(together[1])
    for row in (0, 2, 4, 5):
        assert (without[row] - together[row]).abs().max() > 1e-2


def test_beams_of_all_kinds_of_rows(tmp_path: Path) -> None:
    model = linked_model("llama", tmp_path)
    ids, mask = padded_batch(len(CHOICES), LENGTH, "left", VOCAB_SIZE)
    options = {"adapters": CHOICES, "max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    assert model.generate(ids, mask, **options).equal(model.generate(ids, mask, use_cache=False, **options))


def test_captures_and_steerings_come_with_any_row(tmp_path: Path) -> None:
    model = linked_model("llama", tmp_path)
    ids, mask = padded_batch(len(CHOICES), LENGTH, "left", VOCAB_SIZE)
    steering = [None] * 4 + [Steering(spans=((0, 2),), strength=0), None]
    capture = [CaptureRequest()] + [None] * 3 + [CaptureRequest(queries="generated"), CaptureRequest(layers=(1,))]
    request = AttentionRequest(capture=capture, steering=steering)
    out = model.generate(ids, mask, adapters=CHOICES, max_new_tokens=20, attention=request, **GREEDY)
    again = AttentionRequest(steering=steering)
    expected = uncached_logits(model, out.sequences, mask, adapters=CHOICES, attention=again)
    assert_close(torch.stack(out.logits), expected, "steered")
    assert [found is not None for found in request.captures] == [True, False, False, False, True, True]
    generated, last = request.captures[4], request.captures[5]
    assert generated is not None
    assert last is not None
    assert generated.weights.shape[2] == 20
    assert generated.weights[..., :2].max() == 0, "muted keys are attended to"
    assert last.residual_norms is not None
    assert (last.residual_norms > 0).all()
    first = AttentionRequest(capture=[CaptureRequest(), *[None] * 5])
    grown = torch.nn.functional.pad(mask, (0, 19), value=1)
    with torch.no_grad():
        model(out.sequences[:, :-1], grown, adapters=CHOICES, attention=first, use_cache=False)
    whole, pieces = first.captures[0], request.captures[0]
    assert whole is not None
    assert pieces is not None
    assert torch.allclose(torch.from_numpy(whole.weights), torch.from_numpy(pieces.weights), atol=1e-4)
    assert torch.allclose(
        torch.from_numpy(whole.residual_norms), torch.from_numpy(pieces.residual_norms), rtol=1e-3, atol=1e-4
    )


def test_first_use_of_attention_may_come_with_any_batch() -> None:
    model = MultiLoraModel(tiny_model("llama"))
    ids, mask = padded_batch(3, LENGTH, "left", VOCAB_SIZE)
    expected = model.generate(ids, mask, max_new_tokens=4, do_sample=False)
    request = AttentionRequest(capture=CaptureRequest())
    assert model.generate(ids, mask, attention=request, max_new_tokens=4, do_sample=False).equal(expected)
    assert all(found is not None for found in request.captures)


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    model = linked_model("llama", tmp_path)
    ids, mask = padded_batch(2, LENGTH, "left", VOCAB_SIZE)
    choices = [["a", None], ["b+a:0.5", "v"], [None, "science+b"], ["0+a", "a:-1"]] * 2
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = [model.generate(ids, mask, adapters=choice, **options) for choice in choices]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda choice: model.generate(ids, mask, adapters=choice, **options), choices))
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


def test_names_are_shared_between_kinds_of_adapters(tmp_path: Path) -> None:
    model = linked_model("llama", tmp_path)
    assert model.names() == ["0", "1", "2", "a", "b", "science", "v"]
    with pytest.raises(AdapterExistsError, match="adapter '0' is loaded"):
        model.load_residual("0", tmp_path / "a")
    with pytest.raises(AdapterExistsError, match="'a' is the name of a residual"):
        model.load_adapter("a", tmp_path / "0", replace=True)
    model.unload("a")
    assert "a" not in model.names()
    ids, mask = padded_batch(1, LENGTH, "left", VOCAB_SIZE)
    with pytest.raises(AdapterNotFoundError, match="'a'"):
        model(ids, mask, adapters=["a"])


def test_failed_function_is_recorded_for_its_row_alone(tmp_path: Path) -> None:
    model = MultiLoraModel(tiny_model("llama"))
    calls = []

    def fails_later(hidden: Tensor, attention: Tensor, context: object) -> Tensor:
        calls.append(hidden.shape[0])
        return hidden * (float("nan") if len(calls) > 6 else 0.1)

    model.load_residual("f", FunctionResidual(function=fails_later))
    ids, mask = padded_batch(2, LENGTH, "left", VOCAB_SIZE)
    request = AttentionRequest(record_failures=True)
    options = {"max_new_tokens": 8, "do_sample": False}
    out = model.generate(ids, mask, adapters=[None, "f"], attention=request, **options)
    assert list(request.failures) == [1]
    assert "NaN" in str(request.failures[1])
    assert len(calls) == 7, "the function is called again after it failed"
    assert out[0].equal(model.generate(ids, mask, **options)[0])


def test_requests_that_do_not_fit_the_batch_are_refused_before_anything_runs(tmp_path: Path) -> None:
    model = MultiLoraModel(tiny_model("llama"))
    ids, mask = padded_batch(2, LENGTH, "left", VOCAB_SIZE)
    with pytest.raises(RequestError, match="not in its prompt"):
        model(ids, mask, attention=AttentionRequest(steering=[None, Steering(spans=((0, 99),), strength=2)]))
    with pytest.raises(RequestError, match="2 rows"):
        model(ids, mask, attention=AttentionRequest(capture=[CaptureRequest()]))
    with pytest.raises(RequestError, match="assisted generation"):
        model.generate(ids, mask, attention=AttentionRequest(capture=CaptureRequest()), prompt_lookup_num_tokens=3)
