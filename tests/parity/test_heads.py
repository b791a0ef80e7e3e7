"""Classification adapters that bring their own head: each row through its adapter's, as PEFT computes it alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from loraplex import EngineConfig, MultiLoraModel
from loraplex.engine.engine import Engine
from loraplex.errors import BaseModelError, BaseModelMismatchError
from tests.parity.content_adapters import alone, base_model, content_adapter, prompts, with_peft
from tests.parity.oracle import assert_close
from tests.tiny_models import ARCHITECTURES

NUM_LABELS = 3
HEADS: dict[str, tuple[type[PreTrainedModel], str, list[str], str]] = {
    "llama sequences": (transformers.LlamaForSequenceClassification, "llama", ["q_proj", "v_proj"], "SEQ_CLS"),
    "bert sequences": (transformers.BertForSequenceClassification, "bert", ["query", "dense"], "SEQ_CLS"),
    "gpt2 tokens": (transformers.GPT2ForTokenClassification, "gpt2", ["c_attn"], "TOKEN_CLS"),
    "bert tokens": (transformers.BertForTokenClassification, "bert", ["query"], "TOKEN_CLS"),
}


def classifier(name: str) -> Callable[[], PreTrainedModel]:
    model_class, architecture, _, _ = HEADS[name]

    def make() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = ARCHITECTURES[architecture].config()
            config.num_labels = NUM_LABELS
            return model_class(config).eval().requires_grad_(False)

    return make


@pytest.mark.parametrize("name", list(HEADS))
@torch.no_grad()
def test_each_row_goes_through_its_adapters_head(name: str, tmp_path: Path) -> None:
    base, (_, _, targets, task) = classifier(name)(), HEADS[name]
    options: dict[str, Any] = {"fan_in_fan_out": True} if "gpt2" in name else {}
    model = MultiLoraModel(classifier(name)())
    oracles: dict[str | None, PreTrainedModel] = {None: base}
    for seed, adapter in enumerate("ab"):
        folder = content_adapter(base, tmp_path / adapter, targets=targets, seed=seed, task_type=task, **options)
        model.load_adapter(adapter, folder)
        oracles[adapter] = with_peft(base, folder)
    choices = ["a", None, "b", "a", None]
    ids = prompts(len(choices))
    logits = model(ids, torch.ones_like(ids), adapters=choices).logits
    before = model(ids, torch.ones_like(ids), adapters=[None] * len(choices)).logits
    for row, choice in enumerate(choices):
        expected = alone(oracles[choice], ids[row])
        assert_close(logits[row], expected, f"row {row}, {choice}")
        if choice is None:
            assert logits[row].equal(before[row])
        else:
            assert not torch.allclose(logits[row], before[row], atol=1e-2)


def test_a_head_neither_generates_nor_runs_in_an_engine(tmp_path: Path) -> None:
    model = MultiLoraModel(classifier("llama sequences")())
    ids = prompts(1)
    with pytest.raises(BaseModelError, match="LlamaForSequenceClassification can't generate text"):
        model.generate(ids, torch.ones_like(ids), max_new_tokens=1)
    with pytest.raises(BaseModelError, match="LlamaForSequenceClassification"):
        Engine(model, EngineConfig())


def test_a_head_for_another_base_is_refused(tmp_path: Path) -> None:
    base = classifier("llama sequences")()
    folder = content_adapter(base, tmp_path / "a", targets=["q_proj"], task_type="SEQ_CLS")
    causal = MultiLoraModel(base_model("llama"))
    with pytest.raises(BaseModelMismatchError, match=r"score\.weight.*SequenceClassification"):
        causal.load_adapter("a", folder)
    assert causal.names() == []
