"""Gradients of a layer's parts against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex.kernels import native_parts
from loraplex.layers.fusion.activations import Activation

pytestmark = pytest.mark.needs("compiler")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}  # of the largest value
SIZES = [1, 16, 37, 576]


def random(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected).abs().max().item()
    assert error <= TOLERANCE[actual.dtype] * expected.abs().max().item(), f"off by {error:.1e}"


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_gradient_of_a_root_mean_square_norm(dtype: torch.dtype, size: int, plus_one: bool, scale: float) -> None:
    x, grad = random(5, 3, size, dtype=dtype, seed=0, scale=scale), random(5, 3, size, dtype=dtype, seed=1)
    weight = random(size, dtype=dtype, seed=2)
    found = native_parts.rms_norm_gradient(grad, x, weight, 1e-5, plus_one)
    exact = x.double().requires_grad_()
    normed = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + plus_one)
    normed.backward(grad.double())
    assert exact.grad is not None
    if size > 1:  # of one value, the gradient is the difference of two equal numbers
        assert_near(found, exact.grad)
    else:
        assert found.isfinite().all()


ACTIVATIONS = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.RELU: F.relu,
    Activation.SQUARED_RELU: lambda x: F.relu(x).square(),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_gradients_of_a_gated_activation(dtype: torch.dtype, size: int, kind: Activation, scale: float) -> None:
    gate, up, grad = (random(50, size, dtype=dtype, seed=seed, scale=scale) for seed in range(3))
    exact = [part.double().requires_grad_() for part in (gate, up)]
    out = ACTIVATIONS[kind](exact[0]) * exact[1]  # type: ignore[operator]
    out.backward(grad.double())
    assert_near(native_parts.gated_activation(gate, up, kind), out.detach())
    for found, one in zip(native_parts.gated_activation_gradients(grad, gate, up, kind), exact, strict=True):
        assert one.grad is not None
        assert_near(found, one.grad)


def test_many_values_are_split_over_threads_without_a_difference() -> None:
    x, grad, weight = (random(*shape, dtype=torch.float32, seed=0) for shape in ((700, 48), (700, 48), (48,)))
    whole = native_parts.rms_norm_gradient(grad, x, weight, 1e-5, False)
    parts = [native_parts.rms_norm_gradient(grad[i : i + 1], x[i : i + 1], weight, 1e-5, False) for i in range(700)]
    assert torch.equal(whole, torch.cat(parts))
    both = native_parts.gated_activation_gradients(grad, x, x, Activation.SILU)
    for found, rows in zip(
        both,
        zip(
            *(native_parts.gated_activation_gradients(g, v, v, Activation.SILU) for g, v in zip(grad, x, strict=True)),
            strict=True,
        ),
        strict=True,
    ):
        assert torch.equal(found, torch.stack(rows))


@pytest.mark.parametrize("break_", ["shape", "dtype", "kind", "stride"])
def test_what_does_not_fit_is_refused(break_: str) -> None:
    gate, up = torch.zeros(4, 32), torch.zeros(4, 32)
    kind = 9 if break_ == "kind" else 0
    if break_ == "shape":
        up = up[:2]
    elif break_ == "dtype":
        up = up.bfloat16()
    elif break_ == "stride":
        up = torch.zeros(32, 4).t()
    with pytest.raises(RuntimeError):
        native_parts.gated_activation(gate, up, kind)
    with pytest.raises(RuntimeError):
        native_parts.gated_activation_gradients(gate, gate, up, kind)
    if break_ != "kind":
        with pytest.raises(RuntimeError):
            native_parts.rms_norm_gradient(gate, up, torch.zeros(32), 1e-5, False)
