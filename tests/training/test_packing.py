"""Packed rows: losses and gradients of rows apart, for every kind of row, against PEFT in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import ConfigError
from loraplex.layers.attach import AdaptableModel
from loraplex.residual.modules import ResidualConfig, SteeringVector
from loraplex.residual.positions import parse_positions
from loraplex.residual.reft import ReftConfig
from loraplex.training import AdapterJob, TrainConfig, train_adapters
from loraplex.training.adapters.data import load_job_data
from loraplex.training.adapters.setup import make_states
from loraplex.training.data.examples import Example
from loraplex.training.forward.attention import fast_attention
from loraplex.training.forward.batch import TrainingRow, TrainingSlot, TrainingWeightProvider
from loraplex.training.forward.loss import LossComputer, token_losses
from loraplex.training.forward.packed_rows import make_pack
from tests.parity.test_training_peft import padded, peft_model
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj", "lm_head")


def jobs_in(folder: Path, architecture: str = "llama", targets: Any = TARGETS) -> list[AdapterJob]:
    model, jobs = tiny_model(architecture), []
    for number, form in enumerate(("messages", "prompt", "text")):
        start = random_peft_adapter(model, folder / f"start-{number}", targets=targets, seed=number, r=2 + number)
        lora = read_adapter(start).config
        jobs.append(tiny_job(folder, form, form, lora=lora, init_from=start, batch_size=3 + number))
    return jobs


@pytest.mark.parametrize(
    ("attention", "max_tokens"), [("products", 1024), ("products", 90), ("fused", 90), ("the model's", 1024)]
)
def test_losses_and_gradients_equal_pefts_in_float64(attention: str, max_tokens: int, tmp_path: Path) -> None:
    jobs, model = jobs_in(tmp_path), tiny_model("llama")
    base = copy.deepcopy(model).double().requires_grad_(False)
    adaptable = AdaptableModel(base)
    states = make_states(jobs, base, adaptable, tiny_tokenizer())
    adaptable.attach([path for state in states for path in state.parameters.paths])
    rows = [TrainingRow(i, i, example) for i, state in enumerate(states) for example in state.data.examples_of_step(0)]
    bank = TrainingWeightProvider([TrainingSlot(state.parameters.slot_weights) for state in states])
    computer = LossComputer(base, 3, tokens_per_forward=max_tokens, share_prefixes=True, packing=True)
    longest = 100 if attention == "products" else 10_000
    with fast_attention(base, longest, packing=attention != "the model's"):
        sums = computer.accumulate_gradients(rows, bank, torch.ones(3))
        scores = computer.score(rows, bank)
    adaptable.detach()
    first = 0
    for index, (job, state) in enumerate(zip(jobs, states, strict=True)):
        adapted = peft_model(model, job).double()
        examples = load_job_data(job, tiny_tokenizer(), 128).examples_of_step(0)
        loss = adapted(**padded(examples)).loss * sum(len(example.answer) for example in examples)
        loss.backward()
        own = scores.losses[first : first + len(examples)].sum()
        first += len(examples)
        for found in (sums[index], own):
            torch.testing.assert_close(found.double(), loss.detach().double(), rtol=1e-5, atol=0)
        expected = gradients_of(adapted)
        largest = max(gradient.abs().max().item() for gradient in expected.values())
        paths = {number: path for path, number in adaptable.module_index.items()}
        for number, weights in state.parameters.slot_weights.items():
            assert weights.lora_a.grad is not None, f"{job.name}: no gradient"
            assert weights.lora_b.grad is not None, f"{job.name}: no gradient"
            for factor, gradient in {"A": weights.lora_a.grad, "B": weights.lora_b.grad.t()}.items():
                wanted = expected[f"{paths[number]}.{factor}"]
                torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5 * largest)


def gradients_of(adapted: Any) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            path, factor = name.removeprefix("base_model.model.").split(".lora_")
            gradients[f"{path}.{factor[0]}"] = parameter.grad
    return gradients


def test_a_row_doesnt_see_its_neighbours_to_the_bit_of_another_record() -> None:
    base = tiny_model("llama")
    bank = TrainingWeightProvider([TrainingSlot({}), TrainingSlot({})])

    def loss(other: tuple[int, ...]) -> Tensor:
        rows = [TrainingRow(0, 0, Example((5, 6, 7, 8), (2, 3), "a")), TrainingRow(1, 1, Example(other, (3,), "b"))]
        with torch.no_grad(), fast_attention(base, 8, packing=True):
            return token_losses(base, make_pack(rows, {}, base.device, base.dtype), bank, None)[:2]

    assert torch.equal(loss((1, 2, 3, 4)), loss((9, 10, 11, 12)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_training_follows_training_without(name: str, tmp_path: Path) -> None:
    targets = ("c_attn",) if name == "gpt2" else ("q_proj", "up_proj")
    dropout = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.3)
    plain = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    jobs = [tiny_job(tmp_path, "a", lora=dropout), tiny_job(tmp_path, "b", "text", lora=plain, start="pissa")]
    results = [
        train_adapters(
            tiny_model(name),
            tiny_tokenizer(),
            jobs=jobs,
            config=TrainConfig(output=tmp_path / str(packing), plots=False, packing=packing, tokens_per_forward=200),
        )
        for packing in (False, True)
    ]
    for apart, packed in zip(*results, strict=True):
        assert packed.train_losses == pytest.approx(apart.train_losses, rel=1e-4)
        assert packed.eval_losses == pytest.approx(apart.eval_losses, rel=1e-4)
        assert packed.eval_exact == apart.eval_exact


def test_refuses_what_cant_be_packed(tmp_path: Path) -> None:
    config = TrainConfig(output=tmp_path / "out", plots=False, packing=True)
    vector = SteeringVector(vectors={0: torch.ones(64)}, base=None)
    for options in (
        {"lora": None, "residual": ResidualConfig(r=2, alpha=4)},
        {"lora": None, "reft": ReftConfig(r=2, positions=parse_positions("all"))},
        {"after": [(vector, 1.0)]},
    ):
        with pytest.raises(ConfigError, match="job 'r' goes through residuals"):
            train_adapters(
                tiny_model("llama"), tiny_tokenizer(), jobs=[tiny_job(tmp_path, "r", **options)], config=config
            )
    assert not (tmp_path / "out").exists()
    windowed = tiny_model("mistral")
    windowed.config.sliding_window = 4
    lora = LoraConfig(r=2, target_modules=("q_proj",))
    with pytest.raises(ConfigError, match="packing is on, but"):
        train_adapters(windowed, tiny_tokenizer(), jobs=[tiny_job(tmp_path, "w", lora=lora)], config=config)
