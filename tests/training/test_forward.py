"""The losses of a batch against those that transformers computes from its own logits, for many architectures."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.layers.attention.interface import attention_functions
from loraplex.training.adapters.data import load_job_data
from loraplex.training.forward.attention import fast_attention
from loraplex.training.forward.batch import TrainingRow, TrainingSlot, TrainingWeightProvider
from loraplex.training.forward.loss import LossComputer
from loraplex.training.forward.probe import can_share_prefixes, check_trainable_base
from tests.models.untouched import BaseSnapshot
from tests.tiny_models import TINY_CAUSAL_MODELS, tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

# Their caches keep every token; those of the others forget what left the sliding window.
KEEP_EVERY_TOKEN = {"llama", "qwen3", "gpt2", "gpt_neox", "opt"}
FORMS = ("messages", "prompt", "text")


@pytest.fixture
def rows(tmp_path: Path) -> list[TrainingRow]:
    """Records of three jobs, of different lengths, with and without a common prefix."""
    made = []
    for job, form in enumerate(FORMS):
        data = load_job_data(tiny_job(tmp_path, form, form), tiny_tokenizer(), 128)
        made += [TrainingRow(job, job, example) for example in data.examples_of_step(0)]
    return made


def transformers_losses(base: PreTrainedModel, rows: list[TrainingRow]) -> Tensor:
    """By job: one row at a time, from all logits."""
    sums = torch.zeros(len(FORMS))
    for row in rows:
        ids = torch.tensor([row.example.ids])
        with torch.no_grad():
            logits = base(input_ids=ids).logits[0, :-1]
        answer = torch.tensor(row.example.answer)
        sums[row.job] += torch.nn.functional.cross_entropy(logits[answer - 1], ids[0, answer], reduction="sum")
    return sums


@pytest.mark.parametrize("name", TINY_CAUSAL_MODELS)
def test_every_causal_model_trains_and_those_that_keep_every_token_share_prefixes(name: str) -> None:
    base = tiny_model(name)
    check_trainable_base(base)
    assert can_share_prefixes(base) == (name in KEEP_EVERY_TOKEN)


@pytest.mark.parametrize(
    ("name", "share_prefixes"),
    [(name, share) for name in TINY_CAUSAL_MODELS for share in {False, name in KEEP_EVERY_TOKEN}],
)
def test_losses_equal_those_from_all_logits_of_each_row_alone(
    name: str, share_prefixes: bool, rows: list[TrainingRow]
) -> None:
    base = tiny_model(name)
    bank = TrainingWeightProvider([TrainingSlot({}) for _ in FORMS])
    computer = LossComputer(base, len(FORMS), tokens_per_forward=200, share_prefixes=share_prefixes)
    with fast_attention(base, 100):
        scores = computer.score(rows, bank)
    actual = torch.zeros(len(FORMS)).index_add(0, torch.tensor([row.job for row in rows]), scores.losses)
    torch.testing.assert_close(actual, transformers_losses(base, rows), rtol=1e-4, atol=0)


def test_only_the_positions_that_count_reach_the_output_layer(rows: list[TrainingRow]) -> None:
    base = tiny_model("llama")
    seen = []
    base.lm_head.register_forward_hook(lambda module, args, y: seen.append(y.shape[:-1].numel()))
    bank = TrainingWeightProvider([TrainingSlot({}) for _ in FORMS])
    LossComputer(base, len(FORMS), tokens_per_forward=200, share_prefixes=True).score(rows, bank)
    assert sum(seen) == sum(len(row.example.answer) for row in rows)


def test_fast_attention_gives_the_model_back_as_it_was() -> None:
    base = tiny_model("llama")
    before = BaseSnapshot(base)
    for num_tokens, stands in ((10, True), (5000, False)):
        with fast_attention(base, num_tokens):
            assert any(map(attention_functions, base.modules())) == stands
            assert base.config._attn_implementation == "sdpa"
        before.check()
