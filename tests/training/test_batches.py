"""How rows become padded batches."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from loraplex.routing.segments import Segment, join_for_training
from loraplex.training.data.examples import Example
from loraplex.training.forward.batch import RowSpan, TrainingRow, cut_rows, cut_sizes, make_batch, shared_prefix_lengths


def test_only_what_rows_compute_alike_is_a_shared_prefix() -> None:
    def row(job: int, ids: list[int], first_answer: int, first_adapted: int = 0, **options: Any) -> TrainingRow:
        example = Example(tuple(ids), (first_answer,), "here", first_adapted=first_adapted)
        return TrainingRow(job, job, example, **options)

    rows = [row(0, [1, 2, 3, 4, 5], 4), row(0, [1, 2, 3, 9, 5], 4), row(1, [1, 2, 3], 2), row(1, [1, 2, 4], 2)]
    assert shared_prefix_lengths(rows) == {(0, 1.0): 3, (1, 1.0): 1}
    assert shared_prefix_lengths([row(0, [1, 2, 3, 4], 3, has_dropout=True)] * 2) == {(0, 1.0): 0}
    assert shared_prefix_lengths([row(0, [1, 2, 3, 4], 3, first_adapted=1)] * 2) == {(0, 1.0): 1}
    # Rows of one gate before the user's turn begin alike, up to that turn.
    rows = [row(0, [1, 2, 3, 4, 5], 4, gate_before_user=gate) for gate in (1.0, 0.0, 1.0, 0.0)]
    rows = [one._replace(example=replace(one.example, num_before_user=2)) for one in rows]
    assert shared_prefix_lengths(rows) == {(0, 1.0): 3, (0, 0.0): 2}


def test_segments_of_a_slot_are_joined_with_a_gate_for_each_token() -> None:
    cpu = torch.device("cpu")
    one, other = Segment(0, 4, 1), Segment(4, 8, 1)
    assert join_for_training([one, other], cpu) == [Segment(0, 8, 1)]
    (joined,) = join_for_training([one._replace(gate=0.5), Segment(6, 8, 1), Segment(8, 9, 1, 0.25)], cpu)
    assert joined[:3] == (0, 9, 1)
    assert isinstance(joined.gate, torch.Tensor)
    assert torch.equal(joined.gate, torch.tensor([0.5] * 4 + [0] * 2 + [1] * 2 + [0.25]))
    # A long gap, another slot's tokens in between, the same tokens twice, and gates that are no numbers.
    assert join_for_training([one, Segment(9, 12, 1)], cpu) == [one, Segment(9, 12, 1)]
    assert join_for_training([one, Segment(0, 4, 2), other, Segment(4, 8, 2)], cpu) == [
        Segment(0, 8, 1),
        Segment(0, 8, 2),
    ]
    assert join_for_training([one, one], cpu) == [one, one]
    own = [Segment(0, 4, 1, torch.ones(4)), other]
    assert join_for_training(own, cpu) == own


def all_cuts(lengths: list[int]) -> list[list[int]]:
    """Every way to cut the lengths into groups of neighbours, as sizes."""
    gaps = range(1, len(lengths))
    chosen = [cuts for count in range(len(lengths)) for cuts in itertools.combinations(gaps, count)]
    return [[b - a for a, b in itertools.pairwise([0, *cuts, len(lengths)])] for cuts in chosen]


def cost(lengths: list[int], sizes: list[int], forward_cost: int) -> int:
    firsts = itertools.accumulate([0, *sizes[:-1]])
    return sum(size * lengths[first] + forward_cost for first, size in zip(firsts, sizes, strict=True))


@pytest.mark.parametrize("forward_cost", [0, 7, 30])
@pytest.mark.parametrize("max_tokens", [10, 40, 200])
def test_rows_are_cut_at_least_cost_within_the_limit(max_tokens: int, forward_cost: int) -> None:
    lengths = [25, 24, 20, 11, 10, 10, 4, 3, 3]
    sizes = cut_sizes(lengths, max_tokens, forward_cost)
    firsts = list(itertools.accumulate([0, *sizes[:-1]]))
    assert sum(sizes) == len(lengths)

    def fits(sizes: list[int]) -> bool:
        firsts = itertools.accumulate([0, *sizes[:-1]])
        return all(n == 1 or n * lengths[f] <= max_tokens for n, f in zip(sizes, firsts, strict=True))

    assert fits(sizes), firsts
    assert cost(lengths, sizes, forward_cost) == min(
        cost(lengths, s, forward_cost) for s in all_cuts(lengths) if fits(s)
    )


def test_a_batch_holds_what_follows_the_prefixes_with_rows_of_a_job_together() -> None:
    rows = [
        TrainingRow(1, 1, Example((1, 2, 3, 4, 5), (3, 4), "here")),
        TrainingRow(0, 0, Example((7, 8, 9), (2,), "here")),
        TrainingRow(1, 1, Example((1, 2, 6, 4), (3,), "here")),
    ]
    ((first, second, third),) = cut_rows(rows, {(1, 1.0): 2}, 100, 10)
    assert [row.job for row in (first, second, third)] == [0, 1, 1]
    batch = make_batch([first, second, third], {(0, 1.0): 0, (1, 1.0): 2}, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[7, 8], [3, 4], [6, 0]]
    assert batch.position_ids is not None
    assert batch.attention_mask is not None
    assert batch.position_ids.tolist() == [[0, 1], [2, 3], [2, 2]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    outputs = list(zip(batch.output_rows.tolist(), batch.output_positions.tolist(), strict=True))
    assert outputs == [(0, 1), (1, 0), (1, 1), (2, 0)]
    assert batch.targets.tolist() == [9, 4, 5, 4]
    assert batch.jobs.tolist() == [0, 1, 1, 1]
    assert batch.spans == [RowSpan(0, 0, None, [1]), RowSpan(1, 0, None, [0, 1]), RowSpan(1, 0, None, [0])]
