"""Gradients of a linear router, and of experts beside it, against autograd in a loop in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex import LinearRouterConfig, XLoraConfig
from loraplex.training.data.examples import Example
from tests.training.mixture.tiny_mixture import tiny_config, tiny_data, tiny_sources
from tests.training.routers.tiny_router import (
    TEACHER,
    XLORA,
    LoopModel,
    answer_loss,
    teacher_scalings,
    tiny_router,
    tiny_task,
)


def top_two(row: Tensor) -> Tensor:
    best = [place for place in row.argsort(descending=True).tolist() if row[place] > float("-inf")][:2]
    return torch.zeros_like(row).scatter(0, torch.tensor(best), torch.softmax(row[best], dim=0))


def top_p(row: Tensor) -> Tensor:
    probabilities, kept, total = torch.softmax(row, dim=0), [], 0.0
    for place in row.argsort(descending=True).tolist():
        if total >= 0.6:
            break
        kept.append(place)
        total += float(probabilities[place].detach())
    return torch.zeros_like(row).scatter(0, torch.tensor(kept), probabilities[kept] / probabilities[kept].sum())


KINDS: dict[str, tuple[LinearRouterConfig, Callable[[Tensor], Tensor]]] = {
    "softmax": (LinearRouterConfig(temperature=0.7), lambda row: torch.softmax(row / 0.7, dim=0)),
    "top_k": (LinearRouterConfig(top_k=2), top_two),
    "top_p": (LinearRouterConfig(top_p=0.6), top_p),
    "sigmoid": (LinearRouterConfig(activation="sigmoid"), torch.sigmoid),
    "shared": (LinearRouterConfig(shared=True), lambda row: torch.softmax(row, dim=0)),
}
LossOf = Callable[[LoopModel, list[Example]], Tensor]


def assert_gradients_equal(
    folder: Path, kind: str, loss: LossOf, *, xlora: XLoraConfig | None = None, **options: Any
) -> None:
    """Of the first step, against those of `loss`, and that there are some."""
    config, rule = KINDS[kind]
    model = tiny_router(folder, config, teacher=xlora)
    settings = tiny_config(folder / "out", eval_fraction=0, **options)
    data = tiny_data(tiny_sources(folder), settings)
    examples = [row.example for row in data.examples_of_step(0)]
    task = tiny_task(model, data, settings)
    (found,) = task.accumulate_gradients([0])

    loop = LoopModel(folder, model, rule)
    expected = loss(loop, examples)
    expected.backward()
    router = task.states[0].router
    ours = [parameter.grad for parameter in (*router.weights, *router.biases)]
    theirs = loop.gradients()
    assert len(ours) == len(theirs)
    norm = torch.cat([gradient.flatten() for gradient in theirs]).norm()
    assert norm > 1e-3, "there is no gradient"
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine is not None
        assert (mine.double() - reference).norm() < 1e-4 * norm
    assert not any(parameter.grad is not None for parameter in model.base.parameters())
    if not any(name.endswith("_weight") for name in options):
        assert found.value == pytest.approx(float(expected.detach()), rel=1e-5)


def mean_answer_loss(loop: LoopModel, examples: list[Example]) -> Tensor:
    total = sum(answer_loss(loop.forward(example), example) for example in examples)
    assert isinstance(total, Tensor)
    return total / sum(len(example.answer) for example in examples)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_a_float64_loop(tmp_path: Path, kind: str) -> None:
    assert_gradients_equal(tmp_path, kind, mean_answer_loss, batch_size=3, gradient_accumulation=2)


def layer_means(loop: LoopModel, examples: list[Example], of_tokens: Callable[[str, list[Tensor]], Tensor]) -> Tensor:
    """The mean over LoRA layers of what `of_tokens` makes of a layer's logits, by example."""
    logits: dict[str, list[Tensor]] = {path: [] for path in loop.place}
    for example in examples:
        loop.forward(example)
        for path, (_, found, _) in loop.gatings.items():
            logits[path].append(found[loop.tokens_of(path, example)])
    return torch.stack([of_tokens(path, found) for path, found in logits.items()]).mean()


def load_balance(path: str, logits: list[Tensor]) -> Tensor:
    probabilities = torch.softmax(torch.cat(logits), dim=-1)
    num_experts = probabilities.shape[1]
    chosen = [int(row.argmax()) for row in probabilities]
    fractions = torch.tensor([chosen.count(expert) / len(chosen) for expert in range(num_experts)])
    num_there = int((logits[0][0] > float("-inf")).sum())
    return num_there * (fractions * probabilities.mean(dim=0)).sum()


def z_loss(path: str, logits: list[Tensor]) -> Tensor:
    return torch.cat(logits).exp().sum(dim=-1).log().square().mean()


def mean_entropy(path: str, logits: list[Tensor]) -> Tensor:
    probabilities = torch.softmax(torch.cat(logits), dim=-1)
    return -(probabilities * probabilities.clamp_min(1e-30).log()).sum(dim=-1).mean()


@pytest.mark.parametrize(
    ("option", "term"),
    [("load_balance_weight", load_balance), ("z_loss_weight", z_loss), ("sparsity_weight", mean_entropy)],
)
def test_gradients_of_regularizers_equal_their_formulas(
    tmp_path: Path, option: str, term: Callable[[str, list[Tensor]], Tensor]
) -> None:
    """However a step is cut into forward passes."""

    def loss(loop: LoopModel, examples: list[Example]) -> Tensor:
        return mean_answer_loss(loop, examples) + 3.0 * layer_means(loop, examples, term)

    options = {"batch_size": 3, "gradient_accumulation": 2, "tokens_per_forward": 80, option: 3.0}
    assert_gradients_equal(tmp_path, "shared", loss, **options)


@pytest.mark.parametrize("kind", ["softmax", "top_k", "sigmoid"])
@pytest.mark.parametrize("top_k_lora", [None, 2])
def test_gradients_of_the_teachers_gates_equal_the_divergence(
    tmp_path: Path, kind: str, top_k_lora: int | None
) -> None:
    """KL of the teacher's kept scalings, made to add up to 1, from a softmax over all experts of the layer."""
    teacher = XLoraConfig(layerwise_scalings=True, softmax_temperature=0.7, top_k_lora=top_k_lora)
    model = tiny_router(tmp_path, teacher=teacher)
    temperature = KINDS[kind][0].temperature

    def loss(loop: LoopModel, examples: list[Example]) -> Tensor:
        totals = dict.fromkeys(loop.place, torch.zeros(()))
        counts = dict.fromkeys(loop.place, 0)
        for example in examples:
            scalings = teacher_scalings(model, example)
            loop.forward(example)
            for path, (x, _, _) in loop.gatings.items():
                logits = loop.logits(path, x.detach())
                for token in loop.tokens_of(path, example):
                    totals[path] = totals[path] + divergence(scalings[path][token], logits[token], kind, top_k_lora)
                    counts[path] += 1
        return torch.stack([totals[path] / counts[path] for path in totals]).mean()

    def relative(t: Tensor, log_p: Tensor) -> Tensor:
        return t * (t.clamp_min(1e-300).log() - log_p)

    def divergence(scalings: Tensor, logits: Tensor, kind: str, top_k_lora: int | None) -> Tensor:
        there = [expert for expert in range(3) if logits[expert] > float("-inf")]
        kept = scalings.clone()
        if top_k_lora is not None:
            kept[scalings.argmin()] = 0
        if kind == "sigmoid":
            t, z = kept[there], logits[there]
            return (relative(t, F.logsigmoid(z)) + relative(1 - t, F.logsigmoid(-z))).sum()
        t = kept[there] / kept[there].sum().clamp_min(1e-300)
        return relative(t, torch.log_softmax(logits[there] / temperature, dim=0)).sum()

    options = {"teacher": TEACHER, "answer_weight": 0.0, "gate_kl_weight": 1.0, "tokens_per_forward": 80}
    assert_gradients_equal(tmp_path, kind, loss, xlora=teacher, **options)


def test_gradients_of_the_teachers_logits_equal_the_divergence(tmp_path: Path) -> None:
    model = tiny_router(tmp_path, teacher=XLORA)

    def loss(loop: LoopModel, examples: list[Example]) -> Tensor:
        total = torch.zeros(())
        for example in examples:
            at = [index - 1 for index in example.answer]
            ids = torch.tensor([example.inputs])
            with torch.no_grad():
                wanted = torch.softmax(model(ids, adapters=[TEACHER], use_cache=False).logits[0, at].double(), dim=-1)
            found = torch.log_softmax(loop.forward(example)[at], dim=-1)
            total = total + (wanted * (wanted.log() - found)).sum()
        return mean_answer_loss(loop, examples) + 2.0 * total / sum(len(example.answer) for example in examples)

    options = {"teacher": TEACHER, "gate_kl_weight": 0.0, "logit_kl_weight": 2.0}
    assert_gradients_equal(tmp_path, "softmax", loss, xlora=XLORA, **options)


def test_gradients_of_experts_in_training_equal_those_of_the_loop(tmp_path: Path) -> None:
    config, rule = KINDS["softmax"]
    model = tiny_router(tmp_path, config)
    settings = tiny_config(tmp_path / "out", eval_fraction=0, train_experts=True)
    data = tiny_data(tiny_sources(tmp_path), settings)
    task = tiny_task(model, data, settings)
    task.accumulate_gradients([0])
    loop = LoopModel(tmp_path, model, rule)
    mean_answer_loss(loop, [row.example for row in data.examples_of_step(0)]).backward()
    parameters = task.states[0].parameters
    for number, (name, adapter) in enumerate(parameters.adapters.items()):
        factors = iter(parameters.factors[name])
        for path in adapter.layers:
            for reference in loop.factors[number, path]:
                ours = next(factors).grad
                assert ours is not None
                assert reference.grad is not None
                assert reference.grad.norm() > 1e-5
                assert (ours.double() - reference.grad).norm() < 1e-4 * reference.grad.norm()
