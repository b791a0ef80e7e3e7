"""Captures within budgets, functions that fail, residuals of other bases; the neighbours unharmed."""

import pytest
import torch
from torch import Tensor

from loraplex.errors import (
    AdapterError,
    BaseModelError,
    BaseModelMismatchError,
    BatchError,
    CapacityError,
    RequestError,
)
from loraplex.residual.calls import captures
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.hooks import layer_number
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import FunctionResidual, ResidualContext
from tests.models.untouched import BaseSnapshot
from tests.parity.oracle import padded_batch
from tests.residual.tiny_residuals import forward, generate, random_linked, row
from tests.tiny_models import VOCAB_SIZE, tiny_model

LENGTH = 12


def prompt(num_rows: int = 3) -> tuple[Tensor, Tensor]:
    return padded_batch(num_rows, LENGTH, "left", VOCAB_SIZE)


def test_budget_is_checked_before_anything_runs() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids, mask = prompt()
    exact = 2 * 4 * (LENGTH - 1) * (LENGTH - 1) * 4  # layers, heads, queries, keys of row 1, float32
    fits = row(capture=CaptureRequest(budget_bytes=exact))
    _, scope = forward(base, layers, [row(), fits, row()], ids, mask)
    result = captures(scope, ids, None)[1]
    assert result is not None
    assert result.num_bytes == exact
    with pytest.raises(CapacityError, match=str(exact)):
        forward(base, layers, [row(), row(capture=CaptureRequest(budget_bytes=exact - 1)), row()], ids, mask)
    with pytest.raises(CapacityError, match="queries"):
        generate(base, layers, [row(), fits, row()], ids, mask, max_new_tokens=4)


def test_capture_is_smaller_when_reduced_and_in_float16() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids, mask = prompt()
    rows = [row(), row(capture=CaptureRequest(reduce="mean", dtype="float16", layers=(1,))), row()]
    _, scope = forward(base, layers, rows, ids, mask)
    result = captures(scope, ids, None)[1]
    assert result is not None
    assert result.weights.shape == (1, 1, LENGTH - 1, LENGTH - 1)
    assert str(result.weights.dtype) == "float16"
    assert result.key_tokens == tuple(map(str, ids[1, 1:].tolist()))


def test_generated_capture_ends_where_the_row_ended() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids, mask = prompt(2)
    plain = base.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    end = int(plain[1, LENGTH + 3])
    first = plain[1, LENGTH:].tolist().index(end)
    rows = [row(), row(capture=CaptureRequest(queries="generated"))]
    sequences, scope = generate(
        base, layers, rows, ids, mask, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0
    )
    result = captures(scope, sequences, None, ends=[(end,)] * 2)[1]
    assert result is not None
    assert len(result.query_positions) == first + 1  # one query for each new token, the end included
    assert len(result.key_tokens) == LENGTH - 1 + first
    assert result.query_tokens[0] == str(int(ids[1, -1]))


def test_capture_with_beams_is_refused() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids, mask = prompt()
    with pytest.raises(RequestError, match="beam"):
        generate(base, layers, [row(), row(capture=CaptureRequest()), row()], ids, mask, num_beams=2, max_new_tokens=4)


@pytest.mark.parametrize(
    "asked",
    [
        {"layers": (2,)},
        {"heads": (4,)},
        {"heads": ()},
        {"queries": "generated"},
    ],
)
def test_capture_of_what_is_not_there_is_refused(asked: dict) -> None:  # type: ignore[type-arg]
    base = tiny_model("llama")
    ids, mask = prompt()
    with pytest.raises(RequestError):
        forward(base, AttentionLayers(base), [row(capture=CaptureRequest(**asked)), row(), row()], ids, mask)


@pytest.mark.parametrize(
    "asked", [{"queries": 0}, {"queries": "some"}, {"reduce": "max"}, {"dtype": "int8"}, {"budget_bytes": 0}]
)
def test_captures_that_mean_nothing_are_refused(asked: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(RequestError):
        CaptureRequest(**asked)


def test_function_gets_its_row_and_is_added_with_its_weight() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids, mask = prompt()
    linked = random_linked(layers, 1, at=[1])
    seen: list[ResidualContext] = []

    def aggregate(hidden: Tensor, attention: Tensor, context: ResidualContext) -> Tensor:
        seen.append(context)
        weights = linked.layers[context.layer]
        mix = torch.softmax(weights.head_logits, dim=-1)
        w = torch.einsum("kh,hts->kts", mix, attention)
        return torch.einsum("kts,sk->tk", w, hidden @ weights.a.t()) @ weights.b * linked.config.scaling

    function = FunctionResidual(function=aggregate, layers=(1,))
    as_function, _ = forward(base, layers, [row(), row({"f": (function, 0.5)}), row()], ids, mask)
    as_linked, _ = forward(base, layers, [row(), row({"a": (linked, 0.5)}), row()], ids, mask)
    assert torch.allclose(as_function.logits, as_linked.logits, atol=1e-4)
    assert seen == [ResidualContext(name="f", layer=1, row=1, weight=0.5, first_position=0, num_padding=1)]


@pytest.mark.parametrize("fault", ["shape", "nan", "raises", "nothing"])
def test_failing_function_ends_the_call_or_only_its_row(fault: str) -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids, mask = prompt()

    def function(hidden: Tensor, attention: Tensor, context: ResidualContext) -> Tensor:
        if fault == "raises":
            raise KeyError("mine")
        wrong = {"shape": hidden[:, :-1], "nan": hidden * float("nan"), "nothing": None}
        return wrong[fault]  # type: ignore[return-value]

    other = {"a": (random_linked(layers, 1), 1.0)}
    rows = [row(), row({"f": (FunctionResidual(function=function), 1.0)}), row(other)]
    with pytest.raises(AdapterError, match="'f' at layer 0 of row 1"):
        forward(base, layers, rows, ids, mask)
    output, scope = forward(base, layers, rows, ids, mask, record_failures=True)
    assert scope.plans.failures is not None
    assert list(scope.plans.failures) == [1]
    expected, _ = forward(base, layers, [row(), row(), row(other)], ids, mask)
    assert torch.allclose(output.logits, expected.logits, atol=1e-5)
    assert output.logits[0].equal(expected.logits[0])
    again, _ = forward(base, layers, [row(), row(), row(other)], ids, mask)
    assert again.logits.equal(expected.logits), "the failed call left something behind"


def test_residual_of_another_base_is_refused() -> None:
    llama, mistral = tiny_model("llama"), tiny_model("mistral")
    ids, mask = prompt()
    residual = random_linked(AttentionLayers(mistral), 1)
    layers = AttentionLayers(llama)
    with pytest.raises(BaseModelMismatchError, match="MistralForCausalLM"):
        forward(llama, layers, [row({"a": (residual, 1.0)}), row(), row()], ids, mask)
    beyond = FunctionResidual(function=lambda hidden, attention, context: hidden, layers=(0, 7))
    with pytest.raises(BaseModelMismatchError, match=r"\[7\]"):
        forward(llama, layers, [row({"f": (beyond, 1.0)}), row(), row()], ids, mask)


def test_base_models_without_one_attention_a_token_are_refused() -> None:
    with pytest.raises(BaseModelError, match="encoder-decoder"):
        AttentionLayers(tiny_model("t5"))


def test_encoder_can_be_captured() -> None:
    base = tiny_model("bert")
    ids, mask = padded_batch(2, LENGTH, "right", VOCAB_SIZE)
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    with torch.no_grad():
        eager = base(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    base.set_attn_implementation(before)
    _, scope = forward(base, AttentionLayers(base), [row(capture=CaptureRequest()), row()], ids, mask)
    result = captures(scope, ids, None)[0]
    assert result is not None
    assert torch.allclose(torch.from_numpy(result.weights), torch.stack([layer[0] for layer in eager]), atol=1e-5)


def test_batch_with_another_number_of_rows_is_refused() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids, mask = prompt(3)
    with pytest.raises(BatchError, match="3 sequences for 2 rows"):
        forward(base, layers, [row({"a": (random_linked(layers, 1), 1.0)}), row()], ids, mask)


def test_two_owners_of_one_base_are_served_once_and_the_last_gives_it_back() -> None:
    base = tiny_model("llama")
    before = BaseSnapshot(base)
    first, second = AttentionLayers(base), AttentionLayers(base)
    ids = prompt(2)[0]
    rows = [row(), row({"r": (random_linked(first, 1), 1.0)})]
    both = forward(base, first, rows, ids)[0].logits
    first.detach()
    assert forward(base, second, rows, ids)[0].logits.equal(both)
    assert not both[1].equal(forward(base, second, [row(), row()], ids)[0].logits[1])
    second.detach()
    before.check()
    assert all(layer_number(module) is None for module in base.modules())
