"""PiSSA and OLoRA folders that were not converted: rows as PEFT computes them, which repeats the init at each load."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import UnsupportedAdapterError
from loraplex.layers import adapter_start
from tests.parity.content_adapters import alone, base_model, content_adapter, prompts, with_link, with_peft
from tests.parity.oracle import assert_close

LLAMA, GPT2 = ["q_proj", "v_proj", "down_proj"], ["c_attn", "c_fc"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"targets": LLAMA, "init_lora_weights": "pissa"}),
    "olora": ("llama", {"targets": LLAMA, "init_lora_weights": "olora"}),
    "rslora": ("llama", {"targets": LLAMA, "init_lora_weights": "pissa", "use_rslora": True}),
    "patterns": (
        "llama",
        {"targets": LLAMA, "init_lora_weights": "OLoRA", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "dora": ("llama", {"targets": LLAMA, "init_lora_weights": "pissa", "use_dora": True}),
    "conv1d": ("gpt2", {"targets": GPT2, "init_lora_weights": "pissa", "fan_in_fan_out": True}),
    "bias": ("gpt2", {"targets": GPT2, "init_lora_weights": "pissa", "fan_in_fan_out": True, "bias": "lora_only"}),
}


@pytest.mark.parametrize("case", list(CASES))
@torch.no_grad()
def test_rows_are_those_of_peft_and_base_rows_keep_their_bits(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    base = base_model(name)
    folder = content_adapter(base, tmp_path / "a", seed=3, **options)
    plain = content_adapter(base, tmp_path / "plain", targets=options["targets"][:1], seed=4)
    model = MultiLoraModel(base_model(name))
    model.load_adapter("a", folder)
    model.load_adapter("plain", plain)
    choices = [None, "a", "a:0.5+plain", None]
    ids = prompts(len(choices))
    logits = model(ids, adapters=choices).logits
    expected = alone(with_peft(base, folder), ids[1])
    assert_close(logits[1], expected, case)
    if case != "dora":  # whose link adds to the base's output, not to its weight
        assert_close(logits[2], alone(with_link(base, [(folder, 0.5), (plain, 1.0)]), ids[2]), f"{case}, linked")
    assert logits[[0, 3]].equal(model(ids, adapters=[None] * 4).logits[[0, 3]])
    assert (expected - alone(base, ids[1])).abs().max() > 0.05 * (expected.max() - expected.min())


def test_an_untrained_adapter_is_the_base_model(tmp_path: Path) -> None:
    base = base_model("llama")
    config = peft.LoraConfig(r=4, target_modules=LLAMA, init_lora_weights="pissa")
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path))
    model = MultiLoraModel(base_model("llama"))
    model.load_adapter("a", tmp_path)
    ids = prompts(1)
    assert_close(model(ids, adapters=["a"]).logits[0], alone(base, ids[0]), "untrained")


@pytest.mark.parametrize(
    ("case", "init"), [("pissa", "pissa_niter_4"), ("pissa", "corda"), ("conv1d", "olora"), ("pissa", "lora_ga")]
)
def test_starts_that_cannot_be_told_are_refused_with_the_way_to_convert(case: str, init: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    folder = content_adapter(base_model(name), tmp_path / "a", **options)
    settings = folder / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"pissa"', f'"{init}"'))
    model = MultiLoraModel(base_model(name))
    with pytest.raises(UnsupportedAdapterError, match=f"{init}.*path_initial_model_for_weight_conversion"):
        model.load_adapter("a", folder)
    assert model.names() == []


def test_a_start_that_takes_long_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = CASES["pissa"]
    folder = content_adapter(base_model(name), tmp_path / "a", **options)
    monkeypatch.setattr(adapter_start, "MAX_OPERATIONS", 1e6)
    with pytest.raises(UnsupportedAdapterError, match="6 matrices would have to be computed again"):
        MultiLoraModel(base_model(name)).load_adapter("a", folder)


def test_others_than_load_adapter_still_refuse_it(tmp_path: Path) -> None:
    name, options = CASES["pissa"]
    with pytest.raises(UnsupportedAdapterError, match="changes the base model's weights"):
        read_adapter(content_adapter(base_model(name), tmp_path / "a", **options))
