"""Every kernel against a float64 reference, over ranks, sizes, links and gates."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.store.slots import Slots
from loraplex.kernels.native import gated_linear_native, gated_lora_native
from loraplex.kernels.reference import gated_lora
from loraplex.kernels.segmented import gated_lora_segmented
from loraplex.kernels.segments import LoraSegment
from loraplex.kernels.stacked import gated_lora_stacked
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.segments import Segment
from loraplex.routing.weight_provider import SlotWeightProvider
from tests.examples import examples
from tests.kernels.rounding import Sizes, excess, output_sizes

NUM_SLOTS = 5


def make_plan(num_in, num_out, ranks, segments, num_tokens, dtype=torch.float32):
    slots = Slots(len(ranks), ["module"], torch.device("cpu"))
    for slot, rank in enumerate(ranks):
        if rank == 0:  # an adapter that does not adapt this module
            slots.put(slot, PreparedAdapter(layers={}))
            continue
        weights = SlotWeights(
            lora_a=(torch.randn(rank, num_in) / num_in**0.5).to(dtype),
            lora_b=torch.randn(rank, num_out).to(dtype),
            scaling=0.5 + slot,
        )
        slots.put(slot, PreparedAdapter(layers={0: weights}))
    return RoutingPlan(segments, num_tokens, SlotWeightProvider(slots))


def run_kernel(name, plan, y, x):
    if name == "native":
        return gated_lora_native(y, x, *plan.bank.native_table(), 0, plan.rows, plan.gates.of_module(0))
    if name == "segmented":
        return gated_lora_segmented(y, x, plan.lora_segments(0))
    return gated_lora_stacked(y, x, plan.stack(0))


def lora_segments(plan):
    """The plan's segments with their factors, LoRA scaling in the gates."""
    return [
        LoraSegment(segment.start, segment.stop, w.lora_a, w.lora_b, segment.gate * w.scaling)
        for segment, w in plan.weights_of(0)
    ]


def float64_result(plan, y, x):
    """The reference kernel, fed with each token's slots and gates in float64, ranks padded with zeros."""
    weights = {segment.slot: w for segment, w in plan.weights_of(0)}
    rank = max(w.lora_a.shape[0] for w in weights.values())
    lora_a = torch.zeros(max(weights) + 1, rank, x.shape[1], dtype=torch.float64)
    lora_b = torch.zeros(max(weights) + 1, rank, y.shape[1], dtype=torch.float64)
    for slot, w in weights.items():
        lora_a[slot, : w.lora_a.shape[0]] = w.lora_a
        lora_b[slot, : w.lora_b.shape[0]] = w.lora_b
    pairs = plan.weights_of(0)
    slots = torch.zeros(len(x), len(pairs), dtype=torch.int64)
    gates = torch.zeros(len(x), len(pairs), dtype=torch.float64)
    for j, (segment, w) in enumerate(pairs):
        slots[segment.start : segment.stop, j] = segment.slot
        gates[segment.start : segment.stop, j] = segment.gate * w.scaling
    return gated_lora(y.double(), x.double(), lora_a, lora_b, slots, gates)


def assert_right(result, plan, y, x):
    assert excess(result, float64_result(plan, y, x), output_sizes(y, x, lora_segments(plan))) <= 1


needs_compiler = pytest.mark.needs("compiler")
KERNELS = [pytest.param("native", marks=needs_compiler), "segmented", "stacked"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 64), (576, 192), (37, 50), (5, 3), (128, 1000)])
def test_kernel_equals_float64_reference(kernel, dtype, num_in, num_out):
    segments = [
        Segment(0, 1, 0, 1.0),
        Segment(1, 5, 1, 0.3),
        Segment(1, 5, 2, torch.randn(4)),  # linked with slot 1, a gate for each token
        Segment(6, 12, 3, -1.0),
        Segment(5, 6, 4, 1.0),
    ]
    plan = make_plan(num_in, num_out, [4, 7, 32, 1, 0], segments, 13, dtype)
    x, y = torch.randn(13, num_in).to(dtype), torch.randn(13, num_out).to(dtype)
    assert_right(run_kernel(kernel, plan, y.clone(), x), plan, y, x)


@st.composite
def batches(draw):
    ranks = draw(st.lists(st.integers(0, 20), min_size=NUM_SLOTS, max_size=NUM_SLOTS).filter(any))
    num_tokens = draw(st.integers(1, 80))
    segments = []
    for slot in draw(st.permutations([slot for slot in range(NUM_SLOTS) if ranks[slot]])):
        start = draw(st.integers(0, num_tokens - 1))
        segments.append(Segment(start, draw(st.integers(start + 1, num_tokens)), slot, draw(st.floats(-2, 2))))
    return ranks, num_tokens, segments, draw(st.integers(1, 40)), draw(st.integers(1, 40))


@pytest.mark.parametrize("kernel", KERNELS)
@examples(40)
@given(batch=batches())
def test_kernel_equals_reference_on_random_batches(kernel, batch):
    ranks, num_tokens, segments, num_in, num_out = batch
    torch.manual_seed(0)
    plan = make_plan(num_in, num_out, ranks, segments, num_tokens)
    x, y = torch.randn(num_tokens, num_in), torch.randn(num_tokens, num_out)
    assert_right(run_kernel(kernel, plan, y.clone(), x), plan, y, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gate_factor_or_input_is_far_more_than_rounding(dtype):
    """The comparison can fail: a neighbour's gate, a lost rank row, and inputs off by a percent or three."""
    segments = [Segment(0, 4, 0, torch.tensor([0.5, 1.0, -0.7, 2.0])), Segment(4, 6, 1, 1.0)]
    plan = make_plan(64, 48, [8, 5], segments, 6, dtype)
    x, y = torch.randn(6, 64).to(dtype), torch.randn(6, 48).to(dtype)
    expected, sizes = float64_result(plan, y, x), output_sizes(y, x, lora_segments(plan))
    first, second = lora_segments(plan)
    wrong = [
        [first._replace(gates=first.gates.roll(1)), second],
        [first._replace(lora_a=first.lora_a[1:], lora_b=first.lora_b[1:]), second],
        [first, second._replace(start=5)],
    ]
    for of_one in wrong:
        assert excess(gated_lora_segmented(y.clone(), x, of_one), expected, sizes) > 3
    off = 1.01 if dtype == torch.float32 else 1.1
    assert excess(run_kernel("segmented", plan, y.clone(), x * off), expected, sizes) > 1
    assert_right(run_kernel("segmented", plan, y.clone(), x), plan, y, x)


@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_outside_every_segment_keep_their_exact_bits(kernel):
    plan = make_plan(64, 48, [8], [Segment(2, 4, 0, 1.0)], 6, torch.bfloat16)
    x, y = torch.randn(6, 64).bfloat16(), torch.randn(6, 48).bfloat16()
    result = run_kernel(kernel, plan, y.clone(), x)
    assert torch.equal(result[[0, 1, 4, 5]], y[[0, 1, 4, 5]])
    assert not torch.equal(result[2:4], y[2:4])


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_overflowing_row_does_not_reach_its_neighbours(kernel):
    plan = make_plan(64, 48, [8, 8], [Segment(0, 1, 0, 1.0), Segment(1, 2, 1, 1.0)], 2)
    x, y = torch.randn(2, 64), torch.randn(2, 48)
    expected = run_kernel(kernel, plan, y.clone(), x)
    x[0] = float("inf")
    assert torch.equal(run_kernel(kernel, plan, y.clone(), x)[1], expected[1])


@needs_compiler
def test_native_result_of_a_token_has_the_same_bits_in_any_batch():
    x, y = torch.randn(9, 64), torch.randn(9, 48)
    alone = make_plan(64, 48, [8, 5], [Segment(0, 1, 0, 0.7)], 1)
    together = RoutingPlan([Segment(0, 8, 1, 1.0), Segment(8, 9, 0, 0.7)], 9, alone.bank)
    one = run_kernel("native", alone, y[8:].clone(), x[8:].clone())
    assert torch.equal(run_kernel("native", together, y.clone(), x)[8:], one)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4, 8, 13, 32])
def test_native_result_of_a_long_segments_token_has_the_same_bits_alone(dtype, rank):
    x, y = torch.randn(71, 96).to(dtype), torch.randn(71, 200).to(dtype)
    gates = torch.randn(70)
    gates[[5, 30, 31]] = 0  # closed: these tokens keep their bits
    plan = make_plan(96, 200, [rank], [Segment(1, 71, 0, gates)], 71, dtype)
    together = run_kernel("native", plan, y.clone(), x)
    assert torch.equal(together[[0, 6, 31, 32]], y[[0, 6, 31, 32]])
    for token in (1, 4, 5, 7, 40, 70):
        alone = RoutingPlan([Segment(0, 1, 0, gates[token - 1 : token])], 1, plan.bank)
        one = run_kernel("native", alone, y[token : token + 1].clone(), x[token : token + 1])
        assert torch.equal(together[token], one[0])


@needs_compiler
def test_neighbours_of_one_slot_are_one_segment_of_the_compiled_kernel():
    """Their gates stay their own, and so do all results."""
    segments = [Segment(0, 3, 1, 0.5), Segment(3, 4, 1, torch.tensor([2.0])), Segment(5, 6, 1, 1.0), Segment(0, 6, 0)]
    plan = make_plan(40, 48, [4, 8], segments, 6)
    assert plan.rows.tolist() == [[0, 4, 1, 0], [5, 6, 1, 4], [0, 6, 0, 5]]
    x, y = torch.randn(6, 40), torch.randn(6, 48)
    assert_right(run_kernel("native", plan, y.clone(), x), plan, y, x)


def test_segmented_gradients_pass_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    a = [torch.randn(r, 5, dtype=torch.float64, requires_grad=True) for r in (2, 3)]
    b = [torch.randn(r, 4, dtype=torch.float64, requires_grad=True) for r in (2, 3)]
    gates = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def run(y, x, a0, b0, a1, b1, gates):
        segments = [LoraSegment(0, 4, a0, b0, 0.5), LoraSegment(2, 5, a1, b1, gates)]
        return gated_lora_segmented(y * 1.0, x, segments)

    assert torch.autograd.gradcheck(run, (y, x, a[0], b[0], a[1], b[1], gates))


def test_dropout_of_a_segment_depends_only_on_its_own_generator():
    x, a, b = torch.randn(8, 16), torch.randn(4, 16), torch.randn(4, 8)

    def run(neighbour_seed):
        generators = [torch.Generator().manual_seed(seed) for seed in (neighbour_seed, 7)]
        segments = [
            LoraSegment(0, 4, a, b, 1.0, 0.5, generators[0]),
            LoraSegment(4, 8, a, b, 1.0, 0.5, generators[1]),
        ]
        return gated_lora_segmented(torch.zeros(8, 8), x, segments)

    one, other = run(1), run(2)
    assert torch.equal(one[4:], other[4:])
    assert not torch.equal(one[:4], other[:4])


@needs_compiler
@pytest.mark.parametrize("problem", ["outside the batch", "dtype"])
def test_native_refuses_what_it_can_not_run(problem):
    dtype = torch.float16 if problem == "dtype" else torch.float32
    stop = 3 if problem == "outside the batch" else 2
    plan = make_plan(16, 16, [2], [Segment(0, stop, 0, 1.0)], 2, dtype)
    with pytest.raises(RuntimeError, match=problem):
        run_kernel("native", plan, torch.zeros(2, 16, dtype=dtype), torch.zeros(2, 16, dtype=dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 64), (576, 192), (37, 50), (5, 3), (33, 1000)])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 7, 9, 32])
def test_native_linear_equals_float64_with_and_without_adapters(dtype, num_in, num_out, num_tokens):
    plan = make_plan(
        num_in, num_out, [4, 7], [Segment(0, 1, 0, 0.5), Segment(0, num_tokens, 1, 1.0)], num_tokens, dtype
    )
    x, weight = torch.randn(num_tokens, num_in).to(dtype), (torch.randn(num_out, num_in) / num_in**0.5).to(dtype)
    bias = torch.randn(num_out).to(dtype)
    product = x.double() @ weight.double().t() + bias.double()
    size_of_product = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    with_adapters = float64_result(plan, product, x), lora_segments(plan)
    for rows, (expected, segments) in ((plan.rows[:0], (product, [])), (plan.rows, with_adapters)):
        y = gated_linear_native(x, weight, bias, *plan.table, 0, rows, plan.gates.of_module(0))
        sizes = output_sizes(size_of_product, x, segments).terms, output_sizes(product, x, segments).kept
        assert excess(y, expected, Sizes(*sizes)) <= 1


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_linear_gives_a_token_the_same_bits_in_any_batch(dtype):
    plan = make_plan(96, 80, [4], [Segment(0, 1, 0, 1.0)], 1, dtype)
    x, weight = torch.randn(15, 96).to(dtype), torch.randn(80, 96).to(dtype)
    together = gated_linear_native(x, weight, None, *plan.table, 0, plan.rows[:0], plan.gates.of_module(0))
    for first in range(15):
        for count in (1, 2, 3, 5):
            part = x[first : first + count].contiguous()
            alone = gated_linear_native(part, weight, None, *plan.table, 0, plan.rows[:0], plan.gates.of_module(0))
            assert torch.equal(alone, together[first : first + count])


@needs_compiler
@pytest.mark.parametrize("problem", ["features", "dtype", "contiguous"])
def test_native_linear_refuses_what_it_can_not_run(problem):
    plan = make_plan(16, 8, [2], [Segment(0, 1, 0, 1.0)], 1)
    x, weight = torch.zeros(2, 16), torch.zeros(8, 17 if problem == "features" else 16)
    x = x.half() if problem == "dtype" else x
    weight = torch.zeros(16, 8).t() if problem == "contiguous" else weight
    with pytest.raises(RuntimeError, match=problem):
        gated_linear_native(x, weight, None, *plan.table, 0, plan.rows, plan.gates.of_module(0))
