"""A tiny model with a linear router, an X-LoRA that may teach it, and a training loop in float64 that knows neither."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraplex import LinearRouterConfig, MultiLoraModel, XLoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.routers.mixture import RoutedMixture
from loraplex.routers.router import LinearRouter
from loraplex.training import MixtureTrainConfig
from loraplex.training.data.examples import Example
from loraplex.training.mixture.data import MixtureData
from loraplex.training.routers.state import RouterState
from loraplex.training.routers.task import RouterTask
from loraplex.training.routers.teacher import Teacher
from tests.hook_oracle import Hook, hooked
from tests.tiny_models import tiny_model
from tests.training.mixture.tiny_mixture import tiny_base, write_experts

NAME, TEACHER = "routed", "teacher"
TARGETS: Sequence[tuple[str, ...]] = (
    ("q_proj", "v_proj"),
    ("q_proj", "o_proj", "up_proj", "lm_head"),
    ("down_proj", "q_proj", "lm_head"),
)
XLORA = XLoraConfig(layerwise_scalings=True, softmax_temperature=0.7)


def tiny_router(
    folder: Path, config: LinearRouterConfig | None = None, *, teacher: XLoraConfig | None = None
) -> MultiLoraModel:
    """The model with the mixture "routed" of the experts "e0", "e1" and "e2", and an X-LoRA of the same."""
    model = tiny_base(folder)
    if not (folder / "expert-0").exists():
        write_experts(folder, targets=TARGETS)
    names = [f"e{number}" for number in range(len(TARGETS))]
    for number, name in enumerate(names):
        model.load_adapter(name, folder / f"expert-{number}")
    model.create_mixture(NAME, names, config or LinearRouterConfig(), seed=2)
    if teacher is not None:
        model.create_mixture(TEACHER, names, teacher, seed=5)
        bias = model.mixtures.xlora(TEACHER).head.layers[-1].bias
        with torch.no_grad():  # scalings that are far from equal, and differ by layer more than by token
            bias.copy_(2 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(3)))
    return model


def router_of(model: MultiLoraModel, name: str = NAME) -> LinearRouter:
    router = model.mixtures.get(name).router  # type: ignore[union-attr]
    assert isinstance(router, LinearRouter)
    return router


def tiny_task(model: MultiLoraModel, data: MixtureData, config: MixtureTrainConfig) -> RouterTask:
    mixture = model.mixtures.get(NAME)
    assert isinstance(mixture, RoutedMixture)
    teacher = None
    if config.router.teacher is not None:
        xlora = model.mixtures.xlora(config.router.teacher)
        teacher = Teacher(model, xlora, mixture, budget_bytes=1 << 20, max_tokens=config.run.tokens_per_forward)
    return RouterTask(model.base, RouterState(model, mixture, data, config, teacher))


Gating = tuple[Tensor, Tensor, Tensor]  # x [tokens, in], logits and gates [tokens, experts]


class LoopModel:
    """A base model in float64 whose modules add the gated experts, one expert after the other."""

    def __init__(self, folder: Path, model: MultiLoraModel, rule: Callable[[Tensor], Tensor]) -> None:
        mixture, router = model.mixtures.get(NAME), router_of(model)
        assert isinstance(mixture, RoutedMixture)
        self.base = copy.deepcopy(tiny_model("llama")).double()
        self.rule = rule
        self.experts = [read_adapter(folder / f"expert-{number}") for number in range(len(TARGETS))]
        self.weights = [weight.detach().double().requires_grad_(True) for weight in router.weights]
        self.biases = [bias.detach().double().requires_grad_(True) for bias in router.biases]
        self.place = {path: router.place[m] for m, path in zip(mixture.modules, mixture.layers, strict=True)}
        self.gatings: dict[str, Gating] = {}  # of the last pass
        self.factors = {
            (number, path): (layer.lora_a.double().requires_grad_(True), layer.lora_b.double().requires_grad_(True))
            for number, expert in enumerate(self.experts)
            for path, layer in expert.layers.items()
        }

    def logits(self, path: str, x: Tensor) -> Tensor:
        place = self.place[path]
        missing = torch.tensor([path not in expert.layers for expert in self.experts])
        return (x @ self.weights[place].t() + self.biases[place]).masked_fill(missing, float("-inf"))

    def forward(self, example: Example) -> Tensor:  # [tokens, vocabulary]
        hooks = [(path, self._hook(path)) for path in self.place]
        with hooked(self.base, hooks) as base:
            logits: Tensor = base(torch.tensor([example.inputs]), use_cache=False).logits[0]
        return logits

    def _hook(self, path: str) -> Hook:
        def add(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = args[0][0]
            logits = self.logits(path, x)
            gates = torch.stack([self.rule(row) for row in logits])
            self.gatings[path] = (x, logits, gates)
            for number, expert in enumerate(self.experts):
                if path in expert.layers:
                    a, b = self.factors[number, path]
                    y = y + gates[:, number : number + 1] * (x @ a.t() @ b) * expert.layers[path].scaling
            return y

        return add

    def tokens_of(self, path: str, example: Example) -> list[int]:
        """The positions that count for a layer's means: lm_head sees only what predicts an answer's token."""
        return [index - 1 for index in example.answer] if path == "lm_head" else list(range(len(example.inputs)))

    def gradients(self) -> list[Tensor]:
        return [p.grad if p.grad is not None else torch.zeros_like(p) for p in (*self.weights, *self.biases)]


def answer_loss(logits: Tensor, example: Example) -> Tensor:
    """The summed cross-entropy of an example's answer."""
    at = [index - 1 for index in example.answer]
    return F.cross_entropy(logits[at], torch.tensor(example.targets), reduction="sum")


def teacher_scalings(model: MultiLoraModel, example: Example) -> Mapping[str, Tensor]:  # [tokens, experts] by path
    """The teacher's scalings as a call of the model reports them."""
    teacher = model.mixtures.xlora(TEACHER)
    with torch.no_grad():
        _, (reports,) = model(torch.tensor([example.inputs]), adapters=[TEACHER], return_scalings=True, use_cache=False)
    values = reports[0].values.double()
    return {path: values[:, layer] for layer, path in enumerate(teacher.layers)}
