"""The Triton kernels as they are compiled for a GPU, against float64 on it."""

import random

import pytest
import torch

from loraplex.kernels.segmented import gated_lora_segmented
from loraplex.kernels.triton.work import LARGE_TILE_TOKENS, SMALL_TILE_TOKENS, SlotFactors, make_work
from tests.kernels.rounding import gradient_sizes, worst_excess
from tests.kernels.test_native_router import RULES
from tests.kernels.triton.test_router import OUTS, TOKENS, Bank, assert_near, inputs, make_plan
from tests.kernels.triton.test_router import run as run_routed
from tests.kernels.triton_cases import DTYPES, Case, make_case

pytestmark = pytest.mark.gpu
RANKS = (1, 2, 7, 16, 33, 64, 100, 128)


def random_case(seed: int, dtype: torch.dtype, gates: str, *, wide: bool = False) -> Case:
    draw = random.Random(seed)
    num_tokens, num_in = draw.randint(1, 300), 4096 if wide else draw.randint(1, 700)
    spans = []
    for slot in range(6):
        start, stop = sorted(draw.randint(0, num_tokens) for _ in range(2))
        spans.append((start, stop, slot))
    return make_case(
        [draw.choice(RANKS) for _ in range(6)],
        spans,
        num_tokens=num_tokens,
        num_in=num_in,
        outs=[4096, 1024, 1024] if wide else [draw.randint(1, 700) for _ in range(draw.randint(1, 3))],
        dtype=dtype,
        device="cuda",
        gates=gates,
        seed=seed,
    )


def run(case: Case, block_tokens: int, *, aligned: bool) -> list[torch.Tensor]:
    from loraplex.kernels.triton.gated import gated_lora_triton

    ys = [y.clone() for y in case.ys]
    factors = SlotFactors(case.table(), case.scalings, case.max_rank, aligned)
    gated_lora_triton(
        ys, case.x, factors, range(len(ys)), make_work(case.rows, block_tokens, case.x.device), case.gates
    )
    return ys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", ["dense", "one-hot", "of modules"])
@pytest.mark.parametrize("seed", range(10))
def test_random_segments_equal_float64(dtype, gates, seed):
    case = random_case(seed, dtype, gates)
    for block_tokens in (SMALL_TILE_TOKENS, LARGE_TILE_TOKENS):
        for aligned in (False, True):  # torch aligns what it allocates on a device
            assert case.excess(run(case, block_tokens, aligned=aligned)) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_projections_of_a_large_model_equal_float64(dtype):
    case = random_case(3, dtype, "dense", wide=True)
    assert case.excess(run(case, SMALL_TILE_TOKENS, aligned=True)) <= 1


def test_decoding_64_adapters_equals_float64_and_rows_keep_their_bits_alone():
    spans = [(i, i + 1, i) for i in range(64)]
    case = make_case(
        [16] * 64, spans, num_tokens=64, num_in=4096, outs=[4096], dtype=torch.bfloat16, device="cuda", gates="dense"
    )
    (together,) = run(case, SMALL_TILE_TOKENS, aligned=True)
    assert case.excess([together]) <= 1
    for i in (0, 31, 63):
        alone = Case(
            x=case.x, ys=case.ys, lora_a=case.lora_a, lora_b=case.lora_b, scalings=case.scalings,
            spans=[(i, i + 1, i)], gates=case.gates[i : i + 1],
        )  # fmt: skip
        assert torch.equal(run(alone, SMALL_TILE_TOKENS, aligned=True)[0][i], together[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_gradients_equal_float64(dtype, seed):
    from loraplex.kernels.triton.autograd import gated_lora_triton_grad

    case = random_case(seed, dtype, "dense")

    def gradients(precision, kernel):
        x = case.x.detach().to(precision).requires_grad_()
        segments = [
            [
                s._replace(
                    lora_a=s.lora_a.detach().to(precision).requires_grad_(),
                    lora_b=s.lora_b.detach().to(precision).requires_grad_(),
                    gates=s.gates.detach().to(torch.promote_types(precision, torch.float32)).requires_grad_(),
                )
                for s in of_one
                if s.start < s.stop
            ]
            for of_one in case.segments()
        ]
        ys = [y.to(precision) for y in case.ys]
        outs = kernel([y * 1.0 for y in ys], x, segments)
        weights = [torch.linspace(-1, 1, o.numel(), device=o.device).bfloat16().to(o.dtype).view_as(o) for o in outs]
        loss = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
        leaves = [x, *(t for of_one in segments for s in of_one for t in (s.lora_a, s.lora_b, s.gates))]
        sizes = gradient_sizes(ys, x, segments, weights, leaves) if precision == torch.float64 else None
        return list(torch.autograd.grad(loss, leaves)), sizes

    def torch_kernel(ys, x, segments):
        return [gated_lora_segmented(y, x, of_one) for y, of_one in zip(ys, segments, strict=True)]

    (ours, _), (expected, sizes) = gradients(dtype, gated_lora_triton_grad), gradients(torch.float64, torch_kernel)
    assert worst_excess(ours, expected, sizes) <= 1


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_routers_between_the_products_give_what_torch_gives(rule):
    """Gates by torch on the same device, products in float64."""
    bank, x = Bank(torch.float32, device="cuda"), inputs(TOKENS, torch.float32).cuda()
    plan = make_plan(bank, RULES[rule])
    for module, found in enumerate(run_routed(plan, x, range(3))):
        plan.route(module, x)
        expected = torch.zeros(len(x), OUTS[module], dtype=torch.float64, device="cuda")
        for segment, weights in plan.weights_of(module):
            part = slice(segment.start, segment.stop)
            gates = torch.as_tensor(plan.gates.of_segment(segment, module)).double().cuda()
            u = x[part].double() @ weights.lora_a.double().t()
            expected[part] += gates.expand(len(u))[:, None] * weights.scaling * (u @ weights.lora_b.double())
        assert_near(found, expected)
