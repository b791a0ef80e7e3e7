"""Adapters of experts' stacked weights and of routers, written by PEFT, and what PEFT gives a row with them."""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from tests.architectures.checks import IDS, LENGTHS, Case
from tests.architectures.oracle import LINK, Oracle, forget_lengths
from tests.architectures.variants import kind_of, make_model
from tests.tiny_models import fill_factor

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def target_parameters(model: PreTrainedModel) -> tuple[str, ...]:
    """The stacked weights of the model's experts, and the weight of their router, where it is bare."""
    parameters = {name.partition(".layers.")[2].partition(".")[2] for name, _ in model.named_parameters()}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    routers = ("gate.weight", "router.weight")
    return tuple(
        sorted(
            name
            for name in parameters
            if name.endswith((".gate_up_proj", ".up_proj", ".down_proj"))
            or (name.endswith(routers) and not any(path.endswith(name.removesuffix(".weight")) for path in linear))
        )
    )


def write_expert_adapter(
    model: PreTrainedModel,
    folder: Path,
    parameters: Sequence[str],
    *,
    targets: Sequence[str] = ("o_proj",),
    r: int = 3,
    seed: int = 1,
    **options: Any,
) -> Path:
    """Write a PEFT LoRA of bare parameters with random factors; the model is left as it is."""
    config = peft.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=list(targets), target_parameters=list(parameters), **options
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    draw = torch.Generator().manual_seed(seed)
    for name, factor in adapted.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            fill_factor(name, factor.data, draw)
            if "lora_B" in name and factor.shape[1] > r:  # the rank rows of all experts
                factor.data.mul_((factor.shape[1] / r) ** 0.5)
    adapted.save_pretrained(str(folder))
    return folder


class ExpertOracle(Oracle):
    """PEFT; a link is several active adapters, since it can't concatenate those of parameters."""

    def __init__(self, name: str, folders: Mapping[str, Path]) -> None:
        self.name = name
        self.is_seq2seq = kind_of(name) == "seq2seq"
        self.base = make_model(name)
        self._peft = peft.PeftModel.from_pretrained(make_model(name), str(folders["0"]), "0").eval()
        self._peft.load_adapter(str(folders["1"]), "1")
        self._peft.eval()

    def model(self, choice: str | None) -> Any:
        forget_lengths(self.base)
        forget_lengths(self._peft)
        if choice is None:
            return self.base
        names = ["0", "1"] if choice == LINK else [choice]
        self._peft.base_model.set_adapter(names)
        for module in self._peft.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("0", 0.5 if choice == LINK else 1.0)
        return self._peft


class ExpertCase(Case):
    """One variant with two adapters of experts, routers and one kind of linear module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind = kind_of(name)
        self._folder = tempfile.TemporaryDirectory()
        base, folder = make_model(name), Path(self._folder.name)
        parameters = target_parameters(base)
        self.folders = {
            str(i): write_expert_adapter(base, folder / str(i), parameters, r=3 + i, seed=i + 1) for i in range(2)
        }
        draw = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(*IDS, (length,), generator=draw) for length in LENGTHS]

    @cached_property
    def oracle(self) -> Oracle:
        return ExpertOracle(self.name, self.folders)
