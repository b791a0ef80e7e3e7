"""The Triton kernels forward against float64, in triton's interpreter: run by tests/kernels/test_triton.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraplex.kernels.triton.work import LARGE_TILE_TOKENS, SMALL_TILE_TOKENS, SlotFactors, cut_work, make_work
from tests.examples import examples
from tests.kernels.triton_cases import DTYPES, Case, make_case


def run(case: Case, block_tokens: int = SMALL_TILE_TOKENS, **changed: Tensor) -> list[Tensor]:
    from loraplex.kernels.triton.gated import gated_lora_triton

    ys = [y.clone() for y in case.ys]
    factors = SlotFactors(case.table(), case.scalings, case.max_rank, False)
    work = make_work(case.rows, block_tokens, case.x.device)
    gated_lora_triton(ys, case.x, factors, range(len(ys)), work, changed.get("gates", case.gates))
    return ys


MIXED = [(0, 1, 0), (1, 5, 1), (1, 5, 2), (6, 12, 3), (5, 6, 4), (3, 3, 0)]  # linked, of rank 0, and empty


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 48), (37, 50), (5, 3), (130, 1)])
def test_mixed_segments_equal_float64(dtype, num_in, num_out):
    case = make_case([4, 7, 32, 1, 0], MIXED, num_tokens=13, num_in=num_in, outs=[num_out], dtype=dtype)
    assert case.excess(run(case)) <= 1


@pytest.mark.parametrize("rank", [1, 2, 13, 16, 17, 64, 65, 128])
def test_every_rank_equals_float64(rank):
    case = make_case([rank, 3], [(0, 3, 0), (3, 4, 1)], num_tokens=4, num_in=40, outs=[33])
    assert case.excess(run(case)) <= 1


@pytest.mark.parametrize("gates", ["dense", "one-hot", "of modules"])
@pytest.mark.parametrize("block_tokens", [SMALL_TILE_TOKENS, LARGE_TILE_TOKENS])
def test_projections_of_one_input_share_their_launches(gates, block_tokens):
    """q, k and v of different widths and ranks; a slot may adapt some of them only."""
    ranks = [[4, 8, 2], [16, 0, 1], [0, 0, 20]]
    spans = [(0, 20, 0), (0, 20, 1), (20, 21, 2), (22, 40, 1)]
    case = make_case(ranks, spans, num_tokens=40, num_in=48, outs=[64, 16, 24], gates=gates)
    assert case.excess(run(case, block_tokens)) <= 1


def test_more_projections_than_a_launch_takes():
    case = make_case([4, 2], [(0, 2, 0), (2, 3, 1)], num_tokens=3, num_in=32, outs=[16, 8, 24, 32, 5])
    assert case.excess(run(case)) <= 1


def test_features_cut_into_parts_equal_float64():
    """Decoding cuts many features into parts, here of 768 and 432 of them."""
    case = make_case([8, 3], [(0, 1, 0), (1, 2, 1)], num_tokens=2, num_in=1200, outs=[20])
    assert case.excess(run(case)) <= 1


def test_tokens_without_adapters_keep_their_bits():
    case = make_case([8, 0], [(2, 4, 0), (4, 5, 1)], num_tokens=6, num_in=32, outs=[24], dtype=torch.bfloat16)
    case.ys[0][4, :3] = -0.0  # y + 0 would make it 0
    (result,) = run(case)
    untouched = [0, 1, 4, 5]
    assert torch.equal(result[untouched].view(torch.int16), case.ys[0][untouched].view(torch.int16))
    assert not torch.equal(result[2:4], case.ys[0][2:4])


def test_an_overflowing_row_does_not_reach_its_neighbours():
    case = make_case([8, 8], [(0, 1, 0), (1, 2, 1), (2, 3, 0)], num_tokens=3, num_in=32, outs=[24])
    (expected,) = run(case)
    case.x[0] = float("inf")
    assert torch.equal(run(case)[0][1:], expected[1:])


def test_a_row_has_the_same_bits_whatever_its_neighbours_use():
    alone = make_case([8, 5, 12], [(2, 3, 0)], num_tokens=4, num_in=600, outs=[40])
    beside = make_case([8, 5, 12], [(0, 2, 2), (2, 3, 0), (3, 4, 1)], num_tokens=4, num_in=600, outs=[40])
    for name in ("x", "ys", "lora_a", "lora_b", "scalings"):
        object.__setattr__(beside, name, getattr(alone, name))
    gates = beside.gates.clone()
    gates[2] = alone.gates[0]
    assert torch.equal(run(beside, gates=gates)[0][2], run(alone)[0][2])


def test_the_error_of_wrong_gates_is_far_above_that_of_rounding():
    """The comparison sees a kernel that shifts gates by a row, drops them, or mixes up projections."""
    case = make_case([4, 7], [(0, 4, 0), (4, 8, 1)], num_tokens=8, num_in=32, outs=[16, 24], gates="of modules")
    assert case.excess(run(case)) <= 1
    for wrong in (case.gates.roll(1, dims=1), torch.ones_like(case.gates), case.gates.flip(0)):
        assert case.excess(run(case, gates=wrong.contiguous())) > 1000


@st.composite
def cases(draw):
    ranks = draw(st.lists(st.integers(0, 40), min_size=4, max_size=4).filter(any))
    num_tokens = draw(st.integers(1, 30))
    spans = []
    for slot in draw(st.permutations(range(4))):
        start = draw(st.integers(0, num_tokens - 1))
        spans.append((start, draw(st.integers(start, num_tokens)), slot))
    outs = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    gates = draw(st.sampled_from(["dense", "one-hot", "of modules"]))
    return make_case(ranks, spans, num_tokens=num_tokens, num_in=draw(st.integers(1, 70)), outs=outs, gates=gates)


@examples(8)
@given(case=cases(), block_tokens=st.sampled_from([SMALL_TILE_TOKENS, LARGE_TILE_TOKENS]))
def test_random_batches_equal_float64(case, block_tokens):
    assert case.excess(run(case, block_tokens)) <= 1


@given(
    segments=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 5)), max_size=8),
    block_tokens=st.sampled_from([16, 64]),
)
def test_every_token_of_every_segment_is_in_one_entry(segments, block_tokens):
    rows, first = [], 0
    for start, stop, slot in segments:
        rows.append((start, max(start, stop), slot, first))
        first += max(start, stop) - start
    tiles, entries = cut_work(rows, block_tokens)
    seen = sorted((start + i, slot, row + i) for start, count, slot, row in entries for i in range(count))
    assert seen == sorted((start + i, slot, row + i) for start, stop, slot, row in rows for i in range(stop - start))
    tokens = [start + i for start, count, _, _ in tiles for i in range(count)]
    assert len(tokens) == len(set(tokens))  # no two programs write one token
    assert all(0 < count <= block_tokens for _, count, _, _ in tiles)
    for start, count, first_entry, num_entries in tiles:
        assert {entry[:2] for entry in entries[first_entry : first_entry + num_entries]} == {(start, count)}
