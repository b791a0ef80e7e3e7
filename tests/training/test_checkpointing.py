"""Gradient checkpointing: the gradients of a run without it, to the bit, for less memory."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from loraplex.adapters.config import LoraConfig
from loraplex.errors import ConfigError
from loraplex.layers.attach import AdaptableModel
from loraplex.training import train_adapters
from loraplex.training.adapters.config import AdapterJob
from loraplex.training.adapters.setup import make_states
from loraplex.training.adapters.task import AdapterTask
from loraplex.training.core.config import StepsConfig, TrainConfig
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.forward.checkpointing import checkpointable_layers
from loraplex.training.mixture.config import MixtureTrainConfig
from tests.architectures.variants import make_model
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

ARCHITECTURES = ("llama", "gemma2", "gpt2", "qwen3_moe")


def jobs_of(folder: Path, base: PreTrainedModel) -> list[AdapterJob]:
    """A LoRA with dropout, and two without, on all linear modules."""
    linear = tuple(
        {path.rsplit(".", 1)[-1] for path, shape in AdaptableModel(base).shapes.items() if shape.kind == "linear"}
    )
    targets = tuple(name for name in linear if name not in ("lm_head", "gate"))
    options = {"target_modules": targets, "r": 4, "lora_alpha": 8}
    return [
        tiny_job(folder, "dropping", lora=LoraConfig(**options, lora_dropout=0.3)),
        tiny_job(folder, "wide", "text", lora=LoraConfig(**options | {"r": 8})),
        tiny_job(folder, "plain", "prompt", lora=LoraConfig(**options)),
    ]


def run(base: PreTrainedModel, jobs: list[AdapterJob], folder: Path, checkpointing: bool) -> tuple[list[Tensor], int]:
    """The gradients of the first step, and how many bytes were kept for the backward pass at once."""
    base = copy.deepcopy(base).requires_grad_(False)
    adaptable = AdaptableModel(base)
    states = make_states(jobs, base, adaptable, tiny_tokenizer())
    adaptable.attach([path for state in states for path in state.parameters.paths])
    config = TrainConfig(
        output=folder,
        plots=False,
        gradient_checkpointing=checkpointing,
        share_prefixes=False,
        tokens_per_forward=10_000,
    )
    task = AdapterTask(base, states, config, ProcessGroup(base.device))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        task.accumulate_gradients(range(len(jobs)))
    grads = [state.flat.grad for state in states]
    return [grad.clone() for grad in grads if grad is not None], sum(kept.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_without_it(name: str, tmp_path: Path) -> None:
    base = make_model(name)
    jobs = jobs_of(tmp_path, base)
    expected, kept = run(base, jobs, tmp_path / "a", checkpointing=False)
    found, kept_then = run(base, jobs, tmp_path / "b", checkpointing=True)
    assert kept_then < kept / 2
    assert len(found) == len(jobs)
    for own, other in zip(found, expected, strict=True):
        assert own.any()
        assert torch.equal(own, other)


def test_a_run_learns_the_same(tmp_path: Path) -> None:
    base = tiny_model("llama")
    jobs = jobs_of(tmp_path, base)
    runs = []
    for checkpointing in (False, True):
        config = TrainConfig(
            output=tmp_path / str(checkpointing),
            plots=False,
            progress=False,
            share_prefixes=False,
            gradient_checkpointing=checkpointing,
        )
        runs.append(train_adapters(copy.deepcopy(base), tiny_tokenizer(), jobs=jobs, config=config))
    for own, other in zip(*runs, strict=True):
        assert own.train_losses == other.train_losses
        assert own.eval_losses == other.eval_losses
    assert not any("forward" in vars(module) for module in base.modules())


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no layers that can run again"):
        checkpointable_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("option", ["gradient_checkpointing", "packing", "fsdp"])
def test_mixtures_refuse_what_is_for_adapters(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{option} is for adapters alone"):
        MixtureTrainConfig(steps=StepsConfig(max_steps=1), run=TrainConfig(output=tmp_path, **{option: True}))
