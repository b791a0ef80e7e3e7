"""Stacked experts held packed: their products are right, and whatever else reads them sees the weights as they were."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from loraplex.kernels.native import native_available
from loraplex.kernels.packed_experts import PackedExperts, can_be_packed_experts, pack_experts, unpack_experts
from tests.kernels.rounding import Sizes, excess

pytestmark = pytest.mark.needs("compiler")
EXPERTS, OUT, IN = 4, 50, 70


@pytest.fixture
def weights() -> tuple[Tensor, PackedExperts]:
    assert native_available()
    torch.manual_seed(0)
    plain = torch.randn(EXPERTS, OUT, IN).bfloat16()
    return plain, PackedExperts.of(plain)


@pytest.mark.parametrize("stops", [(3, 3, 9, 12), (0, 0, 0, 12), (2, 5, 9, 10), (0, 0, 0, 0)])
def test_grouped_products_are_right(weights: tuple[Tensor, PackedExperts], stops: tuple[int, ...]) -> None:
    plain, packed = weights
    x = torch.randn(12, IN).bfloat16()
    y = _grouped_linear(x, packed, torch.tensor(stops, dtype=torch.int32))
    assert type(y) is Tensor
    assert y.shape == (12, OUT)
    start = 0
    for expert, stop in enumerate(stops):
        own, weight = x[start:stop].double(), plain[expert].double()
        expected = own @ weight.t()
        sizes = Sizes(own.abs() @ weight.abs().t(), expected.abs())
        assert excess(y[start:stop], expected, sizes) <= 1, expert
        start = stop
    assert not y[start:].any(), "what belongs to no expert"


def test_single_experts_multiply_as_they_lie(weights: tuple[Tensor, PackedExperts]) -> None:
    plain, packed = weights
    for number in (2, torch.tensor(2)):
        expert = packed[number]
        assert expert.packed.data_ptr() == packed.packed[2].data_ptr()
        assert torch.equal(expert.unpack(), plain[2])


def test_gradients_flow_to_the_inputs(weights: tuple[Tensor, PackedExperts]) -> None:
    plain, packed = weights
    stops = torch.tensor([3, 4, 4, 9], dtype=torch.int32)
    x, grad = torch.randn(9, IN).bfloat16(), torch.randn(9, OUT).bfloat16()
    leaf = x.clone().requires_grad_()
    _grouped_linear(leaf, packed, stops).backward(grad)
    start = 0
    for expert, stop in enumerate(stops.tolist()):
        assert torch.equal(leaf.grad[start:stop], grad[start:stop] @ plain[expert])
        start = stop


def test_all_else_sees_the_weights_as_they_were(weights: tuple[Tensor, PackedExperts]) -> None:
    plain, packed = weights
    assert packed.shape == plain.shape
    assert packed.dtype == plain.dtype
    assert torch.equal(packed, plain)
    assert torch.equal(packed[1:3], plain[1:3])
    assert torch.equal(packed[torch.tensor([3, 0, 3])], plain[[3, 0, 3]])
    assert torch.equal(packed.transpose(1, 2) * 1, plain.transpose(1, 2))
    assert torch.equal(packed.transpose(0, 1), plain.transpose(0, 1))
    x = torch.randn(EXPERTS, 3, IN).bfloat16()
    assert torch.equal(torch.bmm(x, packed.transpose(-2, -1)), torch.bmm(x, plain.transpose(-2, -1)))
    assert torch.equal(packed.float(), plain.float())


def test_a_module_is_packed_and_given_back(weights: tuple[Tensor, PackedExperts]) -> None:
    plain, _ = weights
    module = nn.Module()
    module.up_proj = nn.Parameter(plain.clone(), requires_grad=False)
    module.down_proj = nn.Parameter(plain.transpose(1, 2).contiguous(), requires_grad=False)
    assert can_be_packed_experts(module.up_proj)
    pack_experts(module, ("up_proj", "down_proj"))
    assert isinstance(module.up_proj, PackedExperts)
    assert not can_be_packed_experts(module.up_proj)
    state = module.state_dict()
    assert type(state["up_proj"]) is Tensor
    assert torch.equal(state["down_proj"], plain.transpose(1, 2))
    assert type(copy.deepcopy(module).up_proj) is nn.Parameter
    module.load_state_dict({"up_proj": plain * 2, "down_proj": plain.transpose(1, 2)})
    assert torch.equal(module.up_proj.unpack(), plain * 2)
    unpack_experts(module)
    assert type(module.up_proj) is nn.Parameter
    assert torch.equal(module.up_proj, plain * 2)
    assert not module._state_dict_hooks
