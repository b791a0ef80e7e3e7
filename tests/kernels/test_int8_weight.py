"""8-bit weights: products are right and the same in every way of computing them, and all else sees their values."""

import copy
import io

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from loraplex.kernels.int8_weight import COLUMN, Int8Weight, can_be_int8, hold_int8, is_int8
from loraplex.kernels.native import native_available
from loraplex.kernels.packed_weight import packed_linear
from loraplex.kernels.segments import LoraSegment
from loraplex.large_memory import LargeMemory
from tests.kernels.rounding import Sizes, excess, output_sizes

pytestmark = pytest.mark.needs("compiler")

PLAIN, VECTORS, TILES, EMULATED = range(4)  # of tiles.h
GROUPS = (COLUMN, 32, 64, 96, 128, 256)
SHAPES = [(1, 1), (16, 32), (17, 33), (37, 576), (96, 2500), (130, 2600)]  # tiles, whole and not; slices of the depth
COUNTS = (*range(1, 6), 15, 16, 17, 31, 32, 33, 48, 64, 65, 255, 256, 257, 300)
EMULATED_COUNTS = (1, 16, 19, 33, 70)  # which takes its time
TOKEN_BITS = 14  # of a token's largest value, below which the others are rounded


@pytest.fixture(autouse=True)
def _kernel():
    assert native_available()
    torch.manual_seed(0)


def ways() -> list[int]:
    """Those that this machine can compute; all have an emulation or plain code."""
    return sorted({PLAIN, EMULATED, *range(torch.ops.loraplex.int8_tiling() + 1)})


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def as_integers(x: Tensor) -> Tensor:
    """What the kernel makes of tokens: multiples of a power of two."""
    exponents = x.double().abs().amax(-1, keepdim=True).clamp_min(2.0**-97).log2().floor()
    unit = torch.exp2(exponents - TOKEN_BITS)
    return (x.double() / unit).round() * unit


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_and_scales_are_kept(shape, group):
    values = torch.randint(-128, 128, shape, dtype=torch.int8)
    scales = torch.rand(shape[0], 1 if group == COLUMN else -(-shape[1] // group)).half().float()
    found = Int8Weight.from_values(values, scales, group).values_and_scales()
    assert torch.equal(found[0], values)
    assert torch.equal(found[1], scales)


@pytest.mark.parametrize("group", GROUPS)
def test_quantized_to_the_nearest(group):
    weight = random(70, 300)
    weight[3] = 0
    held = Int8Weight.of(weight, group)
    scales = held.values_and_scales()[1]
    steps = scales if group == COLUMN else scales.repeat_interleave(group, 1)[:, :300]
    error = (held.to_values(torch.float64) - weight.double()).abs()
    # float16 scales may be rounded down, so that the largest value is a little more than 127 of them
    assert bool((error <= steps * (0.5001 if group == COLUMN else 0.57) + 1e-12).all())
    assert torch.equal(held.to_values(torch.float32).bfloat16(), held.unpack())
    assert not held.unpack()[3].any()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_right_and_the_same_alone_and_in_every_way(shape, group, with_bias):
    weight, x = Int8Weight.of(random(*shape), group), random(max(COUNTS), shape[1])
    bias = random(shape[0]) if with_bias else None
    dequantized = weight.to_values(torch.float64)
    offset = torch.zeros(shape[0]).double() if bias is None else bias.double()
    expected = as_integers(x) @ dequantized.t() + offset
    terms = x.double().abs() @ dequantized.abs().t() + offset.abs()
    for float_sums in (True, False):
        results = []
        for way in ways():
            for count in EMULATED_COUNTS if way == EMULATED else COUNTS:
                results.append(packed_linear(x[:count], weight, bias, float_sums=float_sums, tiling=way))
        whole = max(results, key=len)
        assert whole.dtype == (torch.float32 if float_sums else torch.bfloat16)
        assert excess(whole, expected, Sizes(terms, expected.abs())) <= 1
        for result in results:
            assert torch.equal(result, whole[: len(result)])


def test_tokens_keep_their_bits_down_to_a_part_of_the_largest():
    x = random(20, 256)
    are_large = x.abs() >= x.abs().amax(-1, keepdim=True) / 64
    assert torch.equal(as_integers(x)[are_large], x.double()[are_large])
    weight = Int8Weight.of(torch.eye(256).bfloat16())  # its only integers are 127
    y = packed_linear(x, weight, None, float_sums=True)
    assert bool(((y.double() - x.double()).abs() <= x.double().abs().amax(-1, keepdim=True) * 2.0**-15 * 1.01).all())


@pytest.mark.parametrize("group", [COLUMN, 32, 128])
def test_large_values_and_those_that_are_no_numbers(group):
    weight, x = Int8Weight.of(random(64, 128), group), random(40, 128)
    x[3] *= 1e30
    x[4] *= 1e-36
    x[7] = 0
    x[5, 7] = float("inf")
    x[6, 7] = float("nan")
    for way in ways():
        y = packed_linear(x, weight, None, float_sums=True, tiling=way)
        expected = as_integers(x.nan_to_num(0, 0)) @ weight.to_values(torch.float64).t()
        finite = [row for row in range(40) if row not in (5, 6)]
        assert torch.allclose(y[finite].double(), expected[finite], rtol=1e-4, atol=1e-33)
        assert torch.isnan(y[[5, 6]]).all()
        assert not y[7].any()


@pytest.mark.parametrize("group", [COLUMN, 32, 128])
def test_adapters_are_right_however_many_threads_share_them(group):
    (out, width), counts, ranks = (80, 256), (1, 70, 1, 33, 1, 2), (9, 3, 64, 16, 1, 8)
    x, weight = random(sum(counts), width), Int8Weight.of(random(out, width), group)
    factors = [(random(rank, width), random(rank, out)) for rank in ranks]
    table = torch.tensor([[(a.data_ptr(), b.data_ptr(), len(a))] for a, b in factors])
    stops = torch.tensor(counts).cumsum(0).tolist()
    rows = [
        (stop - count, stop, slot, stop - count) for slot, (count, stop) in enumerate(zip(counts, stops, strict=True))
    ]
    gates = torch.rand(sum(counts))
    loras = [
        LoraSegment(start, stop, a, b, 0.5 * gates[start:stop])
        for (start, stop, _, _), (a, b) in zip(rows, factors, strict=True)
    ]
    dequantized = weight.to_values(torch.float64)
    expected = as_integers(x) @ dequantized.t()
    sizes = Sizes(
        output_sizes(x.double().abs() @ dequantized.abs().t(), x, loras).terms, output_sizes(expected, x, loras).kept
    )
    for s in loras:
        hidden = s.gates[:, None].double() * (x[s.start : s.stop].double() @ s.lora_a.double().t())
        expected[s.start : s.stop] += hidden @ s.lora_b.double()
    adapters = (table, torch.full((len(ranks), 1), 0.5), 0, torch.tensor(rows), gates, ())
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 5):
            torch.set_num_threads(num_threads)
            results.append(packed_linear(x, weight, None, adapters))
    finally:
        torch.set_num_threads(before)
    assert excess(results[0], expected, sizes) <= 1
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.fixture
def modules():
    """One in 8 bits, and a plain one with its values."""
    held = nn.Linear(70, 50, dtype=torch.bfloat16).requires_grad_(False)
    hold_int8(held, LargeMemory())
    assert is_int8(held)
    plain = nn.Linear(70, 50, dtype=torch.bfloat16).requires_grad_(False)
    plain.weight.copy_(held.weight.unpack())
    plain.bias.copy_(held.bias)
    return plain, held


def test_a_module_runs_on_its_values(modules):
    plain, held = modules
    x = random(3, 5, 70)
    assert torch.allclose(held(x), plain(x), rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="dtype"):
        held(x.float())
    with pytest.raises(RuntimeError, match="shape"):
        held(random(3, 71))


def test_gradients_flow_through_it(modules):
    x, grad = random(4, 70), random(4, 50)
    found = []
    for module in modules:
        leaf = x.clone().requires_grad_()
        module(leaf).backward(grad)
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_all_else_sees_its_values(modules):
    plain, held = modules
    assert torch.equal(held.weight, plain.weight)
    assert torch.equal(held.weight[3:7], plain.weight[3:7])
    assert torch.equal(held.weight.float() * 2, plain.weight.float() * 2)
    assert torch.equal(functional.embedding(torch.tensor([1, 4]), held.weight), plain.weight[[1, 4]])


def test_a_copy_is_in_8_bits_too(modules):
    plain, held = modules
    other = copy.deepcopy(held)
    assert is_int8(other)
    held.weight.zero_()
    assert torch.equal(other.weight, plain.weight)


def test_files_have_its_values(modules):
    plain, held = modules
    state = held.state_dict()
    assert type(state["weight"]) is Tensor
    assert torch.equal(load(save(state))["weight"], plain.weight)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["weight"], plain.weight)


def test_what_is_written_to_it_is_quantized(modules):
    _, held = modules
    other = random(50, 70)
    held.load_state_dict({"weight": other, "bias": random(50)})
    assert is_int8(held)
    assert torch.equal(held.weight.unpack(), Int8Weight.of(other).unpack())


def test_a_weight_with_more_inputs_than_a_sum_holds_has_groups():
    assert Int8Weight.of(torch.ones(1, 2**16)).group == COLUMN
    wide = Int8Weight.of(torch.ones(1, 2**16 + 1))
    assert wide.group > 0
    y = packed_linear(torch.ones(1, 2**16 + 1).bfloat16(), wide, None, float_sums=True)
    assert abs(y.item() / (2**16 + 1) - 1) < 1e-3
    whole = Int8Weight.from_values(torch.full((1, 2**16), -128, dtype=torch.int8), torch.ones(1, 1), COLUMN)
    for value in (1.9921875, -1.9921875):  # the largest and the smallest digits
        for way in ways():
            y = packed_linear(torch.full((1, 2**16), value).bfloat16(), whole, None, float_sums=True, tiling=way)
            assert y.item() == -128 * value * 2**16


def test_which_modules_can_be_held_in_8_bits():
    class Other(nn.Linear):
        pass

    assert can_be_int8(nn.Linear(32, 32))
    assert not can_be_int8(Other(32, 32))
    assert not can_be_int8(nn.Embedding(32, 32))
    held = nn.Linear(32, 32)
    hold_int8(held, LargeMemory())
    assert not can_be_int8(held)
