"""Modules that see the rows in another order than [rows, tokens, features]: each row is PEFT's, or all are refused."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex import MultiLoraModel
from loraplex.errors import BatchError, UnsupportedAdapterError
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.rows.order import RowOrder, find_order
from tests.architectures.variants import make_model
from tests.layers.other_layouts import VOCAB, layout_model
from tests.parity.oracle import PeftOracle, assert_close
from tests.tiny_models import random_peft_adapter, tiny_model

ROWS = {None: None, "a": "a", "b": "b", "a:0.5+b": "link"}


def make_pair(base: PreTrainedModel, folder, targets="all-linear", **options) -> tuple[MultiLoraModel, PeftOracle]:
    folders = {
        name: random_peft_adapter(base, folder / name, targets=targets, seed=seed, r=3 + seed, options=options)
        for seed, name in enumerate("ab")
    }
    oracle = PeftOracle(base, folders)
    oracle.link("link", [("a", 0.5), ("b", 1.0)])
    model = MultiLoraModel(copy.deepcopy(base))
    for name, path in folders.items():
        model.load_adapter(name, path)
    return model, oracle


def inputs(base: PreTrainedModel, num_rows: int, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (num_rows, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, VOCAB, (num_rows, 5), generator=generator)
    return given


def expected(oracle: PeftOracle, name: str | None, given: dict[str, Tensor], row: int) -> Tensor:
    model = oracle.base if name is None else oracle.model
    if name is not None:
        oracle.model.set_adapter(name)
    return model(**{key: value[row : row + 1] for key, value in given.items()}).logits[0]


def check_rows(model: MultiLoraModel, oracle: PeftOracle, rows: list[str | None], length: int = 9) -> None:
    given = inputs(oracle.base, len(rows), length)
    logits = model(**given, adapters=rows).logits
    for row, name in enumerate(rows):
        assert_close(logits[row], expected(oracle, ROWS.get(name, name), given, row), f"row {row} ({name})")


@pytest.fixture(scope="module", params=["led", "longformer", "fsmt", "xlnet"])
def tokens_first(request, tmp_path_factory):
    return make_pair(layout_model(request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("length", [9, 4])  # 4: as many tokens as rows
@torch.no_grad()
def test_rows_of_models_that_put_tokens_first_equal_peft_alone(tokens_first, length):
    model, oracle = tokens_first
    check_rows(model, oracle, list(ROWS), length)


@torch.no_grad()
def test_generation_of_models_that_put_tokens_first_equals_peft_alone(tokens_first):
    model, oracle = tokens_first
    if not oracle.base.can_generate():
        return
    given = inputs(oracle.base, len(ROWS))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    tokens = model.generate(given["input_ids"], given["attention_mask"], adapters=list(ROWS), **options)
    for row, name in enumerate(ROWS.values()):
        alone = oracle.generate(name, given["input_ids"][row], given["attention_mask"][row], **options)
        assert torch.equal(tokens[row : row + 1], alone), f"row {row}"


@torch.no_grad()
def test_embedding_of_a_model_that_puts_tokens_first_is_adapted(tmp_path):
    model, oracle = make_pair(layout_model("xlnet"), tmp_path, targets=["word_embedding", "layer_1"])
    check_rows(model, oracle, list(ROWS))


@torch.no_grad()
def test_experts_that_see_chosen_tokens_are_refused_unless_all_rows_are_the_same(tmp_path):
    model, oracle = make_pair(layout_model("switch"), tmp_path)
    given = inputs(oracle.base, 2)
    for rows in ([None, "a"], ["a", "b"], ["a", "a:0.5"]):
        with pytest.raises(BatchError, match=r"experts\.expert_.*rows with different adapters"):
            model(**given, adapters=rows)
        with pytest.raises(BatchError, match=r"experts\.expert_"):
            model.generate(given["input_ids"], given["attention_mask"], adapters=rows, max_new_tokens=2)
    for rows in (["a", "a", "a"], ["a:0.5+b"] * 2, ["b"], [None, None]):
        check_rows(model, oracle, rows)


@torch.no_grad()
def test_module_that_sees_one_token_of_each_row_is_adapted(tmp_path):
    model, oracle = make_pair(layout_model("classifier"), tmp_path, targets=["query", "dense"])
    assert model.adaptable.order_of("bert.pooler.dense") is RowOrder.ROWS
    check_rows(model, oracle, list(ROWS))


@torch.no_grad()
def test_module_that_sees_positions_instead_of_rows_is_refused_unless_all_rows_are_the_same(tmp_path):
    model, oracle = make_pair(make_model("deberta_v2"), tmp_path)
    with pytest.raises(BatchError, match=r"pos_.*_proj"):
        model(**inputs(oracle.base, 2), adapters=["a", None])
    check_rows(model, oracle, ["a", "a"])


@pytest.mark.parametrize("name", ["phimoe", "deepseek_v4"])
def test_module_that_does_not_answer_with_one_vector_for_each_input_is_refused_at_load(name, tmp_path):
    base = make_model(name)
    folder = random_peft_adapter(base, tmp_path / "a", targets=["router"] if name == "phimoe" else ["o_a_proj"])
    model = MultiLoraModel(base, fast_decode=False)
    before = {path: (type(module), len(module._forward_hooks)) for path, module in base.named_modules()}
    with pytest.raises(UnsupportedAdapterError, match="router" if name == "phimoe" else "o_a_proj"):
        model.load_adapter("a", folder)
    assert model.names() == []
    assert {path: (type(module), len(module._forward_hooks)) for path, module in base.named_modules()} == before


def test_trying_a_model_out_leaves_it_as_it_was():
    base = layout_model("big_bird").train()  # gives up sparse attention where it sees a few tokens
    before = [(path, type(module), dict(vars(module))) for path, module in base.named_modules()]
    torch.manual_seed(5)
    numbers = torch.rand(3)
    torch.manual_seed(5)
    assert AdaptableModel(base).order_of("bert.encoder.layer.0.intermediate.dense") is RowOrder.ROWS
    assert torch.equal(torch.rand(3), numbers)
    after = [(path, type(module), dict(vars(module))) for path, module in base.named_modules()]
    assert before == after
    assert base.bert.attention_type == "block_sparse"


def test_model_is_tried_out_once(monkeypatch, tmp_path):
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "a", targets=["q_proj"])
    model, calls = MultiLoraModel(base), []
    base.register_forward_pre_hook(lambda *_: calls.append(1))
    model.load_adapter("a", folder)
    assert 0 < len(calls) <= 4
    calls.clear()
    model.load_adapter("b", folder)
    assert calls == []


@torch.no_grad()
def test_model_that_can_not_be_tried_out_serves_one_adapter_at_a_time(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("needs more than tokens")

    with monkeypatch.context() as patched:
        patched.setattr("loraplex.layers.rows.probe._inputs", fail)
        model, oracle = make_pair(tiny_model("llama"), tmp_path, targets=["q_proj"])
    with pytest.raises(BatchError, match="q_proj"):
        model(**inputs(oracle.base, 2), adapters=["a", None])
    check_rows(model, oracle, ["a", "a"])


ALONE = [torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
TOGETHER = torch.cat(ALONE)


@pytest.mark.parametrize(
    ("alone", "together", "order"),
    [
        (ALONE, TOGETHER, RowOrder.ROWS),
        (ALONE, TOGETHER + 1e-3, RowOrder.ROWS),
        ([x.transpose(0, 1) for x in ALONE], TOGETHER.transpose(0, 1), RowOrder.TOKENS),
        ([x[0] for x in ALONE], TOGETHER.flatten(0, 1), RowOrder.ROWS),
        ([x[0] for x in ALONE], TOGETHER.transpose(0, 1).flatten(0, 1), RowOrder.UNKNOWN),  # flattened across rows
        ([x[0] for x in ALONE], TOGETHER.flatten(0, 1)[:8], RowOrder.UNKNOWN),  # chosen tokens
        (ALONE, TOGETHER.flip(0), RowOrder.UNKNOWN),
        ([ALONE[0], ALONE[0]], ALONE[0], RowOrder.UNKNOWN),  # the same for all rows
        ([x[:, :, None] for x in ALONE], TOGETHER[:, :, None], RowOrder.ROWS),
    ],
)
def test_order_is_found_from_what_a_module_sees_of_each_row_alone(alone, together, order):
    assert find_order([[x] for x in alone], [together]) is order
    assert find_order([[x, x] for x in alone], [together, together]) is order
    assert find_order([[x, x] for x in alone], [together]) is RowOrder.UNKNOWN
