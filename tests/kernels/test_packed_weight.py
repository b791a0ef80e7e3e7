"""Packed weights: the product is right in every way of computing it, and all else sees the weight as it was."""

import copy
import io

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from loraplex.kernels.native import native_available
from loraplex.kernels.packed_weight import PackedWeight, can_be_packed, pack, packed_linear, packed_size, unpack
from loraplex.kernels.segments import LoraSegment
from loraplex.large_memory import LargeMemory
from tests.kernels.rounding import Sizes, excess, output_sizes

pytestmark = pytest.mark.needs("compiler")

PLAIN, VECTORS, TILES, EMULATED = range(4)  # of tiles.h
SHAPES = [(1, 1), (16, 32), (17, 33), (37, 576), (96, 2500), (130, 2600)]  # tiles, whole and not; slices of the depth
COUNTS = (*range(1, 20), 31, 32, 33, 48, 64, 65, 255, 256, 257, 300)


@pytest.fixture(params=[PLAIN, VECTORS, TILES, EMULATED], ids=["plain", "vectors", "tiles", "emulated"])
def tiling(request):
    assert native_available()
    if request.param != EMULATED and request.param > torch.ops.loraplex.tiling():
        pytest.skip("not on this machine")
    return request.param


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_keeps_every_value(shape):
    weight = random(*shape)
    packed = PackedWeight.of(weight)
    assert packed.packed.numel() == packed_size(*shape)
    assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_right_and_the_same_alone(tiling, shape, with_bias):
    torch.manual_seed(sum(shape))
    weight, x = random(*shape), random(max(COUNTS), shape[1])
    bias = random(shape[0]) if with_bias else None
    packed = PackedWeight.of(weight)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    terms = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    for float_sums in (True, False):
        alone = torch.cat(
            [packed_linear(row.unsqueeze(0), packed, bias, float_sums=float_sums, tiling=tiling) for row in x]
        )
        assert alone.dtype == (torch.float32 if float_sums else torch.bfloat16)
        assert excess(alone, expected, Sizes(terms, expected.abs())) <= 1
        for count in COUNTS:
            together = packed_linear(x[:count], packed, bias, float_sums=float_sums, tiling=tiling)
            assert torch.equal(together, alone[:count]), count


def test_large_values_and_those_that_are_no_numbers(tiling):
    weight, x = random(64, 128), random(40, 128)
    x[3] *= 1e30
    x[5, 7] = float("inf")
    x[6, 7] = float("nan")
    y = packed_linear(x, PackedWeight.of(weight), None, float_sums=True, tiling=tiling)
    expected = x.double() @ weight.double().t()
    assert torch.isfinite(y).all(1).tolist() == torch.isfinite(expected).all(1).tolist()
    assert torch.isnan(y[6]).all()
    assert torch.equal(y[5].sign(), expected[5].sign().float())


def test_adapters_are_right_however_many_threads_share_them(tiling):
    torch.manual_seed(0)
    (out, width), counts, ranks = (80, 200), (1, 70, 1, 33, 1, 2), (9, 3, 64, 16, 1, 8)
    x, weight = random(sum(counts), width), random(out, width)
    factors = [(random(rank, width), random(rank, out)) for rank in ranks]
    table = torch.tensor([[(a.data_ptr(), b.data_ptr(), len(a))] for a, b in factors])
    stops = torch.tensor(counts).cumsum(0).tolist()
    segments = torch.tensor(
        [(stop - count, stop, slot, stop - count) for slot, (count, stop) in enumerate(zip(counts, stops, strict=True))]
    )
    gates = torch.rand(sum(counts))
    loras = [
        LoraSegment(start, stop, a, b, 0.5 * gates[start:stop])
        for (start, stop, _, _), (a, b) in zip(segments.tolist(), factors, strict=True)
    ]
    expected = x.double() @ weight.double().t()
    sizes = Sizes(
        output_sizes(x.double().abs() @ weight.double().abs().t(), x, loras).terms,
        output_sizes(expected, x, loras).kept,
    )
    for s in loras:
        expected[s.start : s.stop] += (
            s.gates[:, None].double() * (x[s.start : s.stop].double() @ s.lora_a.double().t()) @ s.lora_b.double()
        )
    adapters = (table, torch.full((len(ranks), 1), 0.5), 0, segments, gates, ())
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 5):
            torch.set_num_threads(num_threads)
            results.append(packed_linear(x, PackedWeight.of(weight), None, adapters, tiling=tiling))
    finally:
        torch.set_num_threads(before)
    assert excess(results[0], expected, sizes) <= 1
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.fixture
def modules():
    torch.manual_seed(1)
    plain = nn.Linear(70, 50, dtype=torch.bfloat16).requires_grad_(False)
    packed = copy.deepcopy(plain)
    pack(packed, LargeMemory())
    assert isinstance(packed.weight, PackedWeight)
    return plain, packed


def test_a_module_runs_as_before(modules):
    plain, packed = modules
    x = random(3, 5, 70)
    expected = x.double() @ plain.weight.double().t() + plain.bias.double()
    terms = x.double().abs() @ plain.weight.double().abs().t() + plain.bias.double().abs()
    assert excess(packed(x), expected, Sizes(terms, expected.abs())) <= 1
    assert torch.allclose(packed(x.float().bfloat16()), plain(x), rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="dtype"):
        packed(x.float())
    with pytest.raises(RuntimeError, match="shape"):
        packed(random(3, 71))


def test_gradients_flow_through_it(modules):
    x, grad = random(4, 70), random(4, 50)
    found = []
    for module in modules:
        leaf = x.clone().requires_grad_()
        module(leaf).backward(grad)
        found.append(leaf.grad)
    assert torch.equal(*found)  # the same product of the same values: nothing of the packed one is in it


def test_all_else_sees_the_weight_as_it_was(modules):
    plain, packed = modules
    weight = plain.weight
    assert packed.weight.shape == weight.shape
    assert packed.weight.dtype == weight.dtype
    assert torch.equal(packed.weight, weight)
    assert torch.equal(packed.weight[3:7], weight[3:7])
    assert torch.equal(packed.weight.float() * 2, weight.float() * 2)
    assert torch.equal(functional.embedding(torch.tensor([1, 4]), packed.weight), weight[[1, 4]])
    assert type(copy.deepcopy(packed).weight) is nn.Parameter
    assert torch.equal(copy.deepcopy(packed).weight, weight)
    assert torch.equal(packed.weight.detach().clone(), weight)


def test_files_have_the_weight_as_it_was(modules):
    plain, packed = modules
    state = packed.state_dict()
    assert type(state["weight"]) is Tensor
    assert torch.equal(load(save(state))["weight"], plain.weight)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["weight"], plain.weight)


def test_what_is_written_to_it_is_kept(modules):
    _, packed = modules
    other = random(50, 70)
    packed.load_state_dict({"weight": other, "bias": random(50)})
    assert isinstance(packed.weight, PackedWeight)
    assert torch.equal(packed.weight.unpack(), other)
    with torch.no_grad():
        assert packed.weight.mul_(2) is packed.weight
    assert torch.equal(packed.weight.unpack(), other * 2)


def test_unpacking_gives_the_weight_back(modules):
    plain, packed = modules
    unpack(packed)
    assert type(packed.weight) is nn.Parameter
    assert torch.equal(packed.weight, plain.weight)
    assert not packed._state_dict_hooks
    unpack(plain)  # nothing happens to one that isn't packed
    assert type(plain.weight) is nn.Parameter


def test_which_modules_can_be_packed():
    half = nn.Linear(32, 32, dtype=torch.bfloat16)
    assert not can_be_packed(half)  # it is trained
    assert can_be_packed(half.requires_grad_(False))
    assert not can_be_packed(nn.Linear(32, 32).requires_grad_(False))
    assert not can_be_packed(nn.Linear(32, 32, dtype=torch.bfloat16, device="meta").requires_grad_(False))
    pack(half, LargeMemory())
    assert not can_be_packed(half)
