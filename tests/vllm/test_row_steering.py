"""A request's steering on each worker's heads is what its whole steering gives these heads, for any number of keys."""

import pytest
import torch

from loraplex.residual import Steering
from loraplex.residual.steering import key_shares, log_strengths
from loraplex.vllm_plugin import row_steering
from loraplex.vllm_plugin.row_steering import RowSteering

NUM_HEADS = 8
FACTORS = (
    Steering(spans=((2, 5), (9, 12)), strength=3.0),
    Steering(spans=((4, 8),), strength=0, heads=(1, 6), layers=(1,)),
)
SHARES = (Steering(spans=((3, 6),), share=0.4), Steering(spans=((0, 2),), share=0.2, heads=(2, 5), layers=(1,)))


@pytest.mark.parametrize("num_keys", [1, 7, 12, 40])
@pytest.mark.parametrize("heads", [slice(0, 8), slice(0, 4), slice(4, 8)])
def test_each_worker_has_its_part_of_the_whole(heads, num_keys):
    row = RowSteering((*FACTORS, *SHARES), NUM_HEADS, heads)
    for layer in (0, 1, 0):
        factors = [one for one in FACTORS if one.reaches(layer)]
        whole = log_strengths([(0, factors, 0)], 1, NUM_HEADS, 0, num_keys, torch.device("cpu"))
        own = row.log_strength(layer, num_keys)
        assert own.expand(1, heads.stop - heads.start, -1).equal(whole[:, heads])
        weights = torch.rand(NUM_HEADS, 3, num_keys).softmax(dim=-1)
        expected, own = weights.clone(), weights[heads].clone()
        for share in key_shares([(0, [one for one in SHARES if one.reaches(layer)], 0)], 0, num_keys, weights.device):
            expected *= share.factors(expected)
        for share in row.shares(layer, num_keys):
            own *= share.factors(own)
        torch.testing.assert_close(own, expected[heads])


def test_nothing_is_done_at_layers_without_steering():
    row = RowSteering((Steering(spans=((0, 3),), strength=2.0, layers=(1,)), Steering(spans=((0, 3),))), 4, slice(0, 4))
    assert not row.reaches(0)
    assert row.reaches(1)
    assert row.log_strength(0, 5) is None
    assert row.shares(1, 5) == []


def test_strengths_are_made_once_and_not_in_every_step(monkeypatch):
    """256 spans of a long prompt in every layer of every step would hold up all other requests."""
    made = []
    monkeypatch.setattr(row_steering, "log_strengths", lambda *args: made.append(1) or log_strengths(*args))
    row = RowSteering(tuple(Steering(spans=((i, i + 1),), strength=2.0) for i in range(256)), 4, slice(0, 4))
    for num_keys in range(300, 310):
        for layer in range(30):
            assert row.log_strength(layer, num_keys).shape == (1, 1, num_keys)
    assert len(made) == 1
