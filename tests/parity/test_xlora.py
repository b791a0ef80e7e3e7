"""Mixtures against PEFT's X-LoRA: logits, scalings, generation."""

import itertools

import pytest
import torch

from loraplex import MultiLoraModel, XLoraConfig
from tests.parity.oracle import assert_close, padded_batch
from tests.parity.xlora_oracle import peft_logits, peft_xlora
from tests.tiny_models import VOCAB_SIZE, embedding_target, linear_targets, random_peft_adapter, tiny_model

HEAD = "lm_head"
GRID = [
    XLoraConfig(xlora_depth=1),
    XLoraConfig(xlora_depth=2, xlora_size=32, layerwise_scalings=True, softmax_temperature=0.5),
    XLoraConfig(xlora_depth=4, xlora_size=16, xlora_dropout_p=0.0, softmax_temperature=3.0),
    XLoraConfig(layerwise_scalings=True, top_k_lora=1),
    XLoraConfig(layerwise_scalings=True, top_k_lora=2, enable_softmax=False, enable_softmax_topk=True),
    XLoraConfig(top_k_lora=2, enable_softmax_topk=True, global_scaling_weight=0.5),
    XLoraConfig(xlora_depth=2, xlora_size=32, scaling_pass_value=0.5, global_scaling_weight=2.0),
    XLoraConfig(layerwise_scalings=True, scaling_pass_value=None, enable_softmax=False),
    XLoraConfig(top_k_lora=1, scaling_pass_value=None, softmax_temperature=0.5),
    XLoraConfig(top_k_lora=2, scaling_pass_value=0.5, enable_softmax=False, enable_softmax_topk=True),
]
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt2")
# The whole grid on one architecture and one case of each other; the rest is slow in sum.
CASES = [
    pytest.param(name, config, id=f"{name}-{i}", marks=[] if name == "llama" or i == 1 else pytest.mark.slow)
    for name in ARCHITECTURES
    for i, config in enumerate(GRID)
]


def write_experts(name, base, folder, *, everywhere=True):
    """Experts of different ranks and targets; the last one adapts embedding and head too."""
    linears = linear_targets(name)
    also = [embedding_target(name), HEAD] if everywhere else []
    return {
        "0": random_peft_adapter(base, folder / "0", targets=linears, seed=1, r=3, lora_alpha=4),
        "1": random_peft_adapter(base, folder / "1", targets=linears[:2], seed=2, r=5, options={"use_rslora": True}),
        "2": random_peft_adapter(base, folder / "2", targets=[*linears, *also], seed=3, r=4),
    }


def with_mixture(name, folders, config, oracle, mixture="science"):
    """Our model with the same experts and the oracle's head."""
    model = MultiLoraModel(tiny_model(name))
    for expert, path in folders.items():
        model.load_adapter(expert, path)
    model.create_mixture(mixture, list(folders), config)
    state = oracle.base_model.internal_xlora_classifier.state_dict()
    model.mixtures.get(mixture).head.load_state_dict(state)
    return model


@pytest.mark.parametrize(("name", "config"), CASES)
def test_logits_and_scalings_equal_pefts(name, config, tmp_path):
    base = tiny_model(name)
    folders = write_experts(name, base, tmp_path)
    oracle = peft_xlora(base, folders, config, seed=5)
    model = with_mixture(name, folders, config, oracle)
    ids, mask = padded_batch(3, 11, "right", VOCAB_SIZE)
    with torch.no_grad():
        out, scalings = model(ids, attention_mask=mask, adapters=["science"] * 3, return_scalings=True)
    for row in range(3):
        length = int(mask[row].sum())
        logits, expected = peft_logits(oracle, ids[row, :length])
        assert_close(out.logits[row, :length], logits, f"row {row}")
        (report,) = scalings[row]
        assert_close(report.values, expected, f"scalings of row {row}")
        assert report.token_ids == tuple(ids[row, :length].tolist())
        assert (expected[0] - expected[-1]).abs().max() > 1e-3, "the oracle's scalings don't depend on the token"


def test_mixture_rows_share_a_batch_with_all_others(tmp_path):
    base = tiny_model("llama")
    folders = write_experts("llama", base, tmp_path)
    config = XLoraConfig(layerwise_scalings=True)
    oracle = peft_xlora(base, folders, config, seed=5)
    model = with_mixture("llama", folders, config, oracle)
    model.create_mixture("second", ["2", "0"], XLoraConfig(scaling_pass_value=0.5), seed=3)
    ids, mask = padded_batch(6, 9, "left", VOCAB_SIZE)
    choices = [None, "science", "1", "0:0.5+science:2.0", "second", "science+second:0.5"]
    for row, choice in itertools.chain(enumerate(choices), enumerate(choices[::-1])):
        choices_now = choices if choices[row] == choice else choices[::-1]
        with torch.no_grad():
            batch = model(ids, attention_mask=mask, adapters=choices_now).logits[row]
            alone = model(ids[row : row + 1], attention_mask=mask[row : row + 1], adapters=[choice]).logits[0]
        assert_close(batch[mask[row] == 1], alone[mask[row] == 1], f"{choice} in row {row}")


def test_a_mixtures_weight_in_a_link_multiplies_its_gates(tmp_path):
    base = tiny_model("llama")
    folders = write_experts("llama", base, tmp_path)
    plain, weighted = XLoraConfig(), XLoraConfig(global_scaling_weight=0.25)
    oracle = peft_xlora(base, folders, weighted, seed=5)
    model = with_mixture("llama", folders, plain, oracle)
    ids, _ = padded_batch(1, 9, "left", VOCAB_SIZE)
    with torch.no_grad():
        out = model(ids, adapters=["science:0.25"])
    assert_close(out.logits[0], peft_logits(oracle, ids[0])[0], "weight 0.25")


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2",
        "gpt2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3", "mistral", "phi3", "gpt_neox")),
    ],
)
def test_greedy_tokens_equal_pefts_without_cache(name, draft, tmp_path):
    base = tiny_model(name)
    folders = write_experts(name, base, tmp_path, everywhere=False)
    config = XLoraConfig(layerwise_scalings=True, xlora_depth=2, xlora_size=16)
    oracle = peft_xlora(base, folders, config, seed=5)
    model = with_mixture(name, folders, config, oracle)
    ids, mask = padded_batch(3, 9, "left", VOCAB_SIZE)
    ours = model.generate(
        ids, attention_mask=mask, adapters=["science", None, "science"], max_new_tokens=12, do_sample=False, draft=draft
    )
    for row in (0, 2):
        prompt = ids[row][mask[row] == 1]
        theirs = oracle.generate(input_ids=prompt[None], max_new_tokens=12, do_sample=False)
        assert ours[row, 9:].tolist() == theirs[0, len(prompt) :].tolist()
    plain = base.generate(ids[1:2], attention_mask=mask[1:2], max_new_tokens=12, do_sample=False)
    assert ours[1].tolist() == plain[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("config", [GRID[1], GRID[4], GRID[7]], ids=["layerwise", "top-k", "pass value"])
def test_smollm2_equals_pefts(config, smollm2, tmp_path):
    from loraplex.models.checkpoints.loading import load_base_model

    base = load_base_model(smollm2, dtype="float32")[0]
    targets = linear_targets("llama")
    folders = {
        str(i): random_peft_adapter(base, tmp_path / str(i), targets=targets, seed=i, r=4 + 4 * i) for i in range(3)
    }
    oracle = peft_xlora(base, folders, config, seed=5)
    model = MultiLoraModel.from_pretrained(smollm2, dtype="float32")
    for expert, path in folders.items():
        model.load_adapter(expert, path)
    model.create_mixture("science", list(folders), config)
    model.mixtures.get("science").head.load_state_dict(oracle.base_model.internal_xlora_classifier.state_dict())
    ids = torch.randint(100, 40000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out, scalings = model(ids, adapters=["science", "science"], return_scalings=True)
    for row in range(2):
        logits, expected = peft_logits(oracle, ids[row])
        assert_close(out.logits[row], logits, f"row {row}")
        assert_close(scalings[row][0].values, expected, f"scalings of row {row}")
