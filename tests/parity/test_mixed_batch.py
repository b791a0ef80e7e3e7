"""Every row of a mixed batch against PEFT running that row alone with that adapter."""

import pytest
import torch

from loraplex import MultiLoraModel
from tests.parity.oracle import PeftOracle, assert_close, padded_batch
from tests.tiny_models import (
    TINY_CAUSAL_MODELS,
    VOCAB_SIZE,
    embedding_target,
    linear_targets,
    random_peft_adapter,
    tiny_model,
)

LINK = [("small", 0.7), ("large", -0.4)]
# One entry a row: what loraplex is asked for, and what PEFT runs.
ROWS = {
    None: None,
    "small": "small",
    "large": "large",
    "small:0.7+large:-0.4": "link",
    "everywhere": "everywhere",
    "dora": "dora",
    "rs": "rs",
}


def write_adapters(name, base, folder):
    """Adapters of different methods, ranks and targets; "everywhere" adapts the embedding and the head too."""
    linears = linear_targets(name)
    head = "embed_out" if name == "gpt_neox" else "lm_head"

    def write(adapter, seed, targets, **settings):
        return random_peft_adapter(base, folder / adapter, targets=targets, seed=seed, **settings)

    return {
        "small": write("small", 1, linears, r=3, lora_alpha=4),
        "large": write("large", 2, linears[:2], r=9, lora_alpha=7),
        "everywhere": write("everywhere", 3, [*linears, embedding_target(name), head], r=4),
        "dora": write("dora", 4, linears, r=4, options={"use_dora": True}),
        "rs": write(
            "rs",
            5,
            linears,
            r=4,
            options={"use_rslora": True, "rank_pattern": {linears[0]: 6}, "alpha_pattern": {linears[1]: 3}},
        ),
    }


def make_pair(name, folder):
    base = tiny_model(name)
    folders = write_adapters(name, base, folder)
    oracle = PeftOracle(base, folders)
    oracle.link("link", LINK)
    model = MultiLoraModel(tiny_model(name))
    for adapter, path in folders.items():
        model.load_adapter(adapter, path)
    return model, oracle


@pytest.fixture(scope="module", params=TINY_CAUSAL_MODELS)
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_every_row_equal_peft_alone(pair, side):
    model, oracle = pair
    ids, mask = padded_batch(len(ROWS), 12, side, VOCAB_SIZE)
    logits = model(ids, mask, adapters=list(ROWS)).logits
    for row, peft_name in enumerate(ROWS.values()):
        expected = oracle.logits(peft_name, ids[row], mask[row])
        real = mask[row].bool()
        assert_close(logits[row][real], expected[real], f"row {row} ({peft_name})")


@torch.no_grad()
def test_greedy_tokens_of_every_row_equal_peft_alone(pair):
    model, oracle = pair
    ids, mask = padded_batch(len(ROWS), 12, "left", VOCAB_SIZE)
    tokens = model.generate(ids, mask, adapters=list(ROWS), max_new_tokens=12, do_sample=False)
    for row, peft_name in enumerate(ROWS.values()):
        expected = oracle.generate(peft_name, ids[row], mask[row], max_new_tokens=12, do_sample=False)[0]
        assert torch.equal(tokens[row], expected), f"row {row} ({peft_name})"


@torch.no_grad()
def test_adapters_change_what_a_row_says(pair):
    """Guards the tests above: if adapters did nothing, everything would be equal."""
    model, _ = pair
    ids, mask = padded_batch(1, 12, "left", VOCAB_SIZE)
    rows = list(ROWS)
    logits = model(ids.expand(len(rows), -1), mask.expand(len(rows), -1), adapters=rows).logits
    span = logits.max() - logits.min()
    for a in range(len(rows)):
        for b in range(a):
            assert (logits[a] - logits[b]).abs().max() > 1e-2 * span, (rows[a], rows[b])


@torch.no_grad()
def test_rows_without_adapters_are_exactly_the_base_model(pair):
    model, oracle = pair
    ids, mask = padded_batch(4, 12, "left", VOCAB_SIZE)
    expected = oracle.base(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(ids, mask).logits, expected)
    mixed = model(ids, mask, adapters=[None, "small", None, "small:0.7+large:-0.4"]).logits
    assert torch.equal(mixed[[0, 2]], expected[[0, 2]])
    assert not torch.equal(mixed[[1, 3]], expected[[1, 3]])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@torch.no_grad()
def test_beam_search_equals_peft_alone(pair, options):
    model, oracle = pair
    ids, mask = padded_batch(4, 10, "left", VOCAB_SIZE)
    rows = {None: None, "small": "small", "small:0.7+large:-0.4": "link", "everywhere": "everywhere"}
    options = {"max_new_tokens": 8, "do_sample": False} | options
    tokens = model.generate(ids, mask, adapters=list(rows), **options).view(4, -1, 18)
    for row, peft_name in enumerate(rows.values()):
        expected = oracle.generate(peft_name, ids[row], mask[row], **options)
        assert torch.equal(tokens[row], expected), f"row {row} ({peft_name})"


@torch.no_grad()
def test_cached_generation_equals_the_uncached_forward(pair):
    model, _ = pair
    ids = torch.randint(3, VOCAB_SIZE, (len(ROWS), 8))
    mask = torch.ones_like(ids)
    out = model.generate(
        ids,
        mask,
        adapters=list(ROWS),
        max_new_tokens=10,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    full_mask = torch.cat([mask, torch.ones(len(ids), 10, dtype=mask.dtype)], dim=1)
    logits = model(out.sequences, full_mask, adapters=list(ROWS)).logits
    for step, cached in enumerate(out.logits):
        assert_close(cached, logits[:, 7 + step], f"step {step}")


@pytest.mark.parametrize("name", ["t5", "bert"])
@torch.no_grad()
def test_forward_of_encoders_and_sequence_to_sequence_models_equals_peft(name, tmp_path):
    base = tiny_model(name)
    targets = linear_targets(name)
    folders = {
        "one": random_peft_adapter(base, tmp_path / "one", targets=targets, seed=1),
        "two": random_peft_adapter(base, tmp_path / "two", targets=[*targets, embedding_target(name)], r=6, seed=2),
    }
    oracle = PeftOracle(base, folders)
    model = MultiLoraModel(tiny_model(name))
    for adapter, path in folders.items():
        model.load_adapter(adapter, path)
    ids, mask = padded_batch(3, 10, "right", VOCAB_SIZE)
    extra = {"decoder_input_ids": torch.randint(3, VOCAB_SIZE, (3, 4))} if name == "t5" else {}
    logits = model(ids, mask, adapters=["one", None, "two"], **extra).logits
    for row, adapter in enumerate(["one", None, "two"]):
        reference = oracle.base if adapter is None else oracle.model
        if adapter is not None:
            oracle.model.set_adapter(adapter)
        one_row = {key: value[row : row + 1] for key, value in extra.items()}
        expected = reference(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **one_row).logits
        real = slice(None) if name == "t5" else mask[row].bool()
        assert_close(logits[row][real], expected[0][real], f"row {row} ({adapter})")


@torch.no_grad()
def test_sequence_to_sequence_generation_equals_peft(tmp_path):
    base = tiny_model("t5")
    folder = random_peft_adapter(base, tmp_path / "one", targets=linear_targets("t5"), seed=1)
    oracle = PeftOracle(base, {"one": folder})
    model = MultiLoraModel(tiny_model("t5"))
    model.load_adapter("one", folder)
    ids, mask = padded_batch(2, 10, "right", VOCAB_SIZE)
    options = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False}
    tokens = model.generate(ids, mask, adapters=["one", None], **options)
    assert torch.equal(tokens[:1], oracle.generate("one", ids[0], mask[0], **options))
    assert torch.equal(tokens[1:], oracle.generate(None, ids[1], mask[1], **options))


@torch.no_grad()
def test_sampling_draws_the_same_tokens_as_peft_from_the_same_seed(tmp_path):
    model, oracle = make_pair("llama", tmp_path)
    ids, mask = padded_batch(1, 8, "left", VOCAB_SIZE)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.3, "top_k": 20}
    torch.manual_seed(3)
    tokens = model.generate(ids, mask, adapters=["small"], **options)
    torch.manual_seed(3)
    assert torch.equal(tokens, oracle.generate("small", ids[0], mask[0], **options))
