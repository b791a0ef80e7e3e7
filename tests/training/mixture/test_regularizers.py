"""Load balance and sparsity: their values by hand, and their gradients as parts of a step's."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraplex import XLoraConfig
from loraplex.training import train_mixture
from loraplex.training.mixture.regularizers import load_balance, mean_entropy
from tests.training.mixture.tiny_mixture import NAME, tiny_config, tiny_data, tiny_losses, tiny_mixture, tiny_sources


def test_values_at_the_extremes() -> None:
    one = torch.tensor([[[1.0, 0.0, 0.0]]] * 4)  # every token uses the first expert
    spread = torch.eye(3).unsqueeze(1)  # each of three tokens another expert
    uniform = torch.full((5, 2, 3), 1 / 3)
    assert [float(load_balance(s)) for s in (one, spread, uniform)] == pytest.approx([3.0, 1.0, 1.0])
    assert [float(mean_entropy(s)) for s in (one, spread, uniform)] == pytest.approx([0, 0, math.log(3)], abs=1e-6)


def test_layers_are_judged_each_by_itself() -> None:
    scalings = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]] * 4)  # balanced over layers, not within any
    assert float(load_balance(scalings)) == pytest.approx(2.0)


def test_entropy_has_a_finite_gradient_where_a_scaling_is_zero() -> None:
    logits = torch.tensor([[[0.0, -200.0]]], requires_grad=True)
    mean_entropy(torch.softmax(logits, dim=-1)).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_a_step_adds_the_weighted_terms_of_all_its_tokens(tmp_path: Path) -> None:
    model = tiny_mixture(tmp_path, XLoraConfig(layerwise_scalings=True))
    weights = {"load_balance_weight": 0.3, "sparsity_weight": 0.2}
    config = tiny_config(tmp_path / "out", tokens_per_forward=60, **weights)
    data = tiny_data(tiny_sources(tmp_path), config)
    state, hidden, losses = tiny_losses(model, data, config)
    rows = data.examples_of_step(0)
    terms = losses.accumulate_regularizers(rows)
    assert state.flat.grad is not None
    gradient = state.flat.grad.clone()

    state.flat.grad.zero_()
    tokens = torch.cat([hidden.compute(torch.tensor([row.example.inputs]))[0] for row in rows])
    scalings = state.head(tokens)
    expected = 0.3 * load_balance(scalings) + 0.2 * mean_entropy(scalings)
    expected.backward()
    assert 0.3 * terms["load_balance"] + 0.2 * terms["sparsity"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(gradient, state.flat.grad, rtol=1e-3, atol=1e-6)
    assert gradient.norm() > 1e-4


@pytest.mark.parametrize(("option", "term"), [("load_balance_weight", load_balance), ("sparsity_weight", mean_entropy)])
def test_a_large_weight_brings_its_term_down(
    tmp_path: Path, option: str, term: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = tiny_mixture(tmp_path)
    with torch.no_grad():
        model.mixtures.get(NAME).head.layers[0].bias += torch.tensor([2.0, 0.0, 0.0])  # one expert is preferred
    config = tiny_config(tmp_path / "out", max_steps=40, eval_fraction=0, **{option: 100.0})
    data = tiny_data(tiny_sources(tmp_path), config)

    def now() -> float:
        state, hidden, _ = tiny_losses(model, data, config)
        rows = data.examples_of_step(0)
        tokens = torch.cat([hidden.compute(torch.tensor([row.example.inputs]))[0] for row in rows])
        return float(term(state.head(tokens)).detach())

    before = now()
    train_mixture(model, NAME, tiny_sources(tmp_path), config)
    least = 1.0 if term is load_balance else 0.0
    assert now() - least < 0.2 * (before - least)
