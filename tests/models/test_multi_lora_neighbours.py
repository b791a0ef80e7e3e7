"""A row never depends on its neighbours: to rounding in any batch, to the bit when only their adapters change."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import loraplex.routing.plan
from loraplex import MultiLoraModel
from loraplex.routing.adapter_spec import AdapterSpec
from tests.examples import examples
from tests.parity.oracle import assert_close
from tests.parts import require
from tests.tiny_models import VOCAB_SIZE, embedding_target, linear_targets, random_peft_adapter, tiny_model

CHOICES: list[AdapterSpec] = [
    None,
    "small",
    "large",
    "dora",
    "everywhere",
    "alora",
    "small:0.7+dora:-0.4",
    "large+small",
]
ROW_LENGTHS = st.integers(2, 14)  # on both sides of the length up to which the kernels for few tokens run


class Row(NamedTuple):
    ids: Tensor  # [tokens]
    adapters: AdapterSpec


def make_model(architecture: str, folder, dtype=torch.float32, *, fast_decode: bool = True) -> MultiLoraModel:
    base = tiny_model(architecture, dtype=dtype)
    model = MultiLoraModel(base, fast_decode=fast_decode)
    linears = linear_targets(architecture)

    def load(name, targets, r, **options):
        path = random_peft_adapter(base, folder / name, targets=targets, r=r, seed=r, options=options)
        model.load_adapter(name, path)

    load("small", linears, 3)
    load("large", linears[:2], 17)
    load("dora", linears, 4, use_dora=True)
    load("everywhere", [*linears, embedding_target(architecture), "lm_head"], 5)
    load("alora", linears, 6, alora_invocation_tokens=[7], task_type="CAUSAL_LM")
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory):
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model_of_dtype(request, tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"), request.param)


DECODERS = {
    "llama": ("llama", torch.float32, True),
    "llama with torch's base product": ("llama", torch.float32, False),
    "llama in bfloat16": ("llama", torch.bfloat16, True),
    "gpt2": ("gpt2", torch.float32, True),
}


@pytest.fixture(scope="module", params=DECODERS.values(), ids=DECODERS)
def decoder(request, tmp_path_factory):
    architecture, dtype, fast_decode = request.param
    return make_model(architecture, tmp_path_factory.mktemp(architecture), dtype, fast_decode=fast_decode)


@torch.no_grad()
def logits_of_rows(model: MultiLoraModel, rows: Sequence[Row]) -> list[Tensor]:  # each [tokens of the row, vocab]
    """Run the rows as one batch, padded on the left."""
    ids, mask = pad_left(rows)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # gpt2's positions are absolute
    logits = model(ids, mask, adapters=[row.adapters for row in rows], position_ids=positions).logits
    return [logits[i, mask[i].bool()] for i in range(len(rows))]


def pad_left(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:  # [rows, tokens] each
    length = max(len(row.ids) for row in rows)
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, length - len(row.ids) :] = row.ids
        mask[i, length - len(row.ids) :] = 1
    return ids, mask


@st.composite
def row(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return Row(torch.randint(3, VOCAB_SIZE, (draw(ROW_LENGTHS),), generator=generator), draw(st.sampled_from(CHOICES)))


@examples(30)
@given(rows=st.lists(row(), min_size=1, max_size=6), data=st.data())
def test_row_is_the_same_alone_and_in_any_batch_in_any_order(model, rows, data):
    together = logits_of_rows(model, rows)
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = logits_of_rows(model, [rows[i] for i in order])
    for i, own in enumerate(rows):
        (alone,) = logits_of_rows(model, [own])
        assert_close(together[i], alone, f"row {i} ({own.adapters}) in the batch")
        assert_close(shuffled[order.index(i)], alone, f"row {i} ({own.adapters}) in the shuffled batch")


@examples(10)
@given(rows=st.lists(row(), min_size=2, max_size=5))
def test_row_generates_the_same_logits_alone_and_in_any_batch(model, rows):
    """Its first step; later ones follow its own tokens, which a near tie may change."""
    _, together = generate(model, rows, num_tokens=1)
    for i, own in enumerate(rows):
        assert_close(together[i], generate(model, [own], num_tokens=1)[1][0], f"row {i} ({own.adapters})")


# The stacked kernel is left out of the tests for equal bits: its sums run over the adapters of the whole batch.


def use_kernel(patch: pytest.MonkeyPatch, kernel: str | None) -> None:
    """Let one kernel run everything; None leaves the choice as it is."""
    if kernel == "native":
        require("compiler")
    if kernel is not None:
        patch.setattr(loraplex.routing.plan, "choose_kernel", lambda *args, **kwargs: kernel)


@st.composite
def batches_that_differ_in_neighbours(draw):
    """Prompts, a row of them, its adapters, and two choices of adapters for all others."""
    rows = draw(st.lists(row(), min_size=2, max_size=5))
    fixed = draw(st.integers(0, len(rows) - 1))
    # Neighbours that share the row's adapters tempt an implementation to join them with it.
    others = st.sampled_from([*CHOICES, rows[fixed].adapters, rows[fixed].adapters])
    batches = [
        [own if i == fixed else own._replace(adapters=draw(others)) for i, own in enumerate(rows)] for _ in range(2)
    ]
    return fixed, *batches


@pytest.mark.parametrize("kernel", ["native", "segmented", None])
@examples(25)
@given(case=batches_that_differ_in_neighbours())
def test_row_keeps_its_bits_when_its_neighbours_change_adapters(model_of_dtype, kernel, case):
    fixed, one, other = case
    with pytest.MonkeyPatch.context() as patch:
        use_kernel(patch, kernel)
        assert torch.equal(logits_of_rows(model_of_dtype, one)[fixed], logits_of_rows(model_of_dtype, other)[fixed])


@examples(25)
@given(case=batches_that_differ_in_neighbours())
def test_row_stays_close_with_the_stacked_kernel_when_its_neighbours_change_adapters(model, case):
    fixed, one, other = case
    with pytest.MonkeyPatch.context() as patch:
        use_kernel(patch, "stacked")
        assert_close(logits_of_rows(model, one)[fixed], logits_of_rows(model, other)[fixed], f"row {fixed}")


@torch.no_grad()
def generate(
    model: MultiLoraModel, rows: Sequence[Row], num_tokens: int
) -> tuple[Tensor, Tensor]:  # [rows, new tokens], [rows, new tokens, vocab]
    ids, mask = pad_left(rows)
    out = model.generate(
        ids,
        mask,
        adapters=[row.adapters for row in rows],
        max_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("kernel", ["native", "segmented", None])
@examples(10)
@given(case=batches_that_differ_in_neighbours())
def test_row_decodes_the_same_bits_when_its_neighbours_change_adapters(decoder, kernel, case):
    fixed, one, other = case
    with pytest.MonkeyPatch.context() as patch:
        use_kernel(patch, kernel)
        tokens_one, logits_one = generate(decoder, one, num_tokens=6)
        tokens_other, logits_other = generate(decoder, other, num_tokens=6)
    assert torch.equal(tokens_one[fixed], tokens_other[fixed])
    assert torch.equal(logits_one[fixed], logits_other[fixed])


@pytest.mark.parametrize("kernel", ["native", "segmented", None])
def test_large_batch_of_one_adapter_is_decoded_as_a_row_of_it(decoder, kernel):
    """Ten neighbours with the same adapter or without any: the adapter's tokens in a step are 11 or 1."""
    torch.manual_seed(0)
    rows = [Row(torch.randint(3, VOCAB_SIZE, (6,)), "small") for _ in range(11)]
    apart = [rows[0], *(own._replace(adapters=None) for own in rows[1:])]
    with pytest.MonkeyPatch.context() as patch:
        use_kernel(patch, kernel)
        one, other = generate(decoder, rows, num_tokens=4)[1][0], generate(decoder, apart, num_tokens=4)[1][0]
    assert torch.equal(one, other)


def test_choice_of_the_kernel_ignores_what_rows_ask_for(model, monkeypatch):
    asked: list[tuple[object, ...]] = []

    def choose(device, dtype, tokens_per_row, *, has_table):
        asked.append((dtype, tokens_per_row, has_table))
        return "segmented"

    monkeypatch.setattr(loraplex.routing.plan, "choose_kernel", choose)
    rows = [Row(torch.arange(3, 12), "small") for _ in range(12)]
    logits_of_rows(model, rows)
    logits_of_rows(model, [own._replace(adapters=CHOICES[i % len(CHOICES)]) for i, own in enumerate(rows)])
    assert set(asked) == {(torch.float32, 9, True)}
