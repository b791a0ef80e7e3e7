"""PEFT adapters that bring more than factors, and what PEFT makes of a row with them: the oracle of their tests."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny_models import VOCAB_SIZE, fill_factor, tiny_model

LENGTH = 9


def base_model(name: str, *, tied: bool = False, seed: int = 0) -> PreTrainedModel:
    """A tiny model whose output layer is the embedding, or isn't."""
    base = tiny_model(name, seed)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if tied:
        head.weight = embedding.weight
    elif head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.15)
    base.config.tie_word_embeddings = tied
    return base.requires_grad_(False)


def content_adapter(
    base: PreTrainedModel, folder: Path, *, targets: Sequence[str] | str, seed: int = 0, **options: Any
) -> Path:
    """Write a PEFT folder whose every trained weight is far from the base's, or from zero."""
    save = options.pop("save_embedding_layers", "auto")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options)
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_B.default.weight" in name or "lora_embedding_" in name:
            fill_factor(name, parameter.data, generator)
        elif parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(str(folder), save_embedding_layers=save)
    return folder


def with_peft(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A copy of the base with the adapter, by PEFT alone."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


def with_link(base: PreTrainedModel, parts: Sequence[tuple[Path, float]]) -> PreTrainedModel:
    """A copy of the base whose every weight is W + sum of weight * (W' - W), W' as PEFT merges each adapter."""
    linked = copy.deepcopy(base)
    head = linked.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    linked.config.tie_word_embeddings = False
    own = dict(base.named_parameters(remove_duplicate=False))
    total = {path: parameter.detach().double() for path, parameter in own.items()}
    for folder, weight in parts:
        adapted = with_peft(base, folder)
        _untie(adapted)  # PEFT merges into a shared weight what is one module's alone
        merged = dict(adapted.merge_and_unload().named_parameters(remove_duplicate=False))
        for path in total:
            total[path] = total[path] + weight * (merged[path].detach().double() - own[path].detach().double())
    for path, parameter in linked.named_parameters(remove_duplicate=False):
        parameter.data = total[path].to(parameter.dtype)
    return linked


def _untie(model: nn.Module) -> None:
    """Give the output layer a copy of what it shares."""
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        if ".lm_head." in path:
            module, _, name = path.rpartition(".")
            setattr(model.get_submodule(module), name, nn.Parameter(parameter.detach().clone()))


def prompts(num_rows: int, *, seed: int = 0, length: int = LENGTH) -> Tensor:  # [rows, length]
    return torch.randint(3, VOCAB_SIZE, (num_rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def alone(model: PreTrainedModel, ids: Tensor) -> Tensor:  # [length, vocab]
    return model(input_ids=ids[None]).logits[0]


def folders_of(base: PreTrainedModel, root: Path, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """By name, a folder for each case."""
    return {
        name: content_adapter(base, root / name, seed=seed, **options)
        for seed, (name, options) in enumerate(cases.items(), 1)
    }


def resized(base: PreTrainedModel, num_tokens: int, *, seed: int = 5) -> PreTrainedModel:
    """A copy of the base with another number of tokens."""
    made = copy.deepcopy(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made.resize_token_embeddings(num_tokens, mean_resizing=False)
    return made.requires_grad_(False)
