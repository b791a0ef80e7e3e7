"""Scalings of one row: their means against float64 by hand, and what is refused."""

import math

import pytest
import torch

from loraplex.errors import ScalingsError
from loraplex.xlora.scalings.layer_grid import layer_grid
from loraplex.xlora.scalings.row_scalings import RowScalings, mean_over_tokens
from tests.xlora.rows import EXPERTS, LAYERS, PROJECTIONS, scalings_row


def test_means_equal_sums_by_hand() -> None:
    row = scalings_row(5)
    by_expert = [0.0] * 3
    for token in range(5):
        for layer in range(len(LAYERS)):
            for expert in range(3):
                by_expert[expert] += float(row.values[token, layer, expert]) / (5 * len(LAYERS))
    assert row.mean_by_expert().tolist() == pytest.approx(by_expert, abs=1e-6)
    by_layer = [sum(float(row.values[token, 4, 1]) for token in range(5)) / 5]
    assert row.mean_by_layer()[4, 1].tolist() == pytest.approx(by_layer[0], abs=1e-6)
    assert row.mean_by_layer().shape == (len(LAYERS), 3)
    by_token = sum(float(row.values[2, layer, 0]) for layer in range(len(LAYERS))) / len(LAYERS)
    assert float(row.mean_by_token()[2, 0]) == pytest.approx(by_token, abs=1e-6)
    assert row.num_tokens == 5


def test_blocks_are_means_over_their_layers_and_modules_outside_stand_alone() -> None:
    row = scalings_row(5)
    blocks = row.by_block()
    assert blocks.labels == ("embed_tokens", "0", "1", "2", "3", "lm_head")
    assert blocks.values.shape == (5, 6, 3)
    torch.testing.assert_close(blocks.values[:, 0], row.values[:, 0])
    torch.testing.assert_close(blocks.values[:, 3], (row.values[:, 7] + row.values[:, 8] + row.values[:, 9]) / 3)
    torch.testing.assert_close(blocks.values[:, 5], row.values[:, 13])


def test_blocks_of_two_towers_are_kept_apart() -> None:
    layers = ("vision.layers.0.q_proj", "text.layers.0.q_proj", "text.layers.1.q_proj")
    blocks = scalings_row(2, layers=layers).by_block()
    assert blocks.labels == ("vision.layers.0", "text.layers.0", "1")


def test_strongest_expert_has_the_largest_mean_over_layers() -> None:
    values = torch.zeros(2, 2, 3)
    values[0, :, 1], values[1, 0, 0], values[1, 1, 2] = 0.5, 0.4, 0.9
    row = scalings_row(2, layers=LAYERS[:2], values=values)
    assert row.strongest().tolist() == [1, 2]


def test_entropy_is_in_nats_and_averaged_over_layers() -> None:
    values = torch.tensor([[[1.0, 0, 0], [1, 0, 0]], [[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]]])
    row = scalings_row(2, layers=LAYERS[:2], values=values)
    assert row.entropy().tolist() == pytest.approx([0, (math.log(3) + math.log(2)) / 2], abs=1e-6)
    assert row.max_entropy == pytest.approx(math.log(3))


@pytest.mark.parametrize("values", [torch.full((2, 2, 3), 0.9), torch.tensor([[[1.5, -0.5, 0.0]] * 2] * 2)])
def test_scalings_that_are_no_distribution_have_no_entropy(values: torch.Tensor) -> None:
    with pytest.raises(ScalingsError, match="enable_softmax=True"):
        scalings_row(2, layers=LAYERS[:2], values=values).entropy()


def test_long_rows_weigh_more_in_a_mean_over_rows() -> None:
    short, long = scalings_row(1, seed=1), scalings_row(9, seed=2)
    expected = torch.cat([short.values, long.values]).double().mean(dim=0)
    torch.testing.assert_close(mean_over_tokens([short, long]).double(), expected, atol=1e-6, rtol=0)


def test_rows_of_other_experts_or_none_have_no_common_mean() -> None:
    with pytest.raises(ScalingsError, match="'protein', 'materials'\\]"):
        mean_over_tokens([scalings_row(), scalings_row(experts=EXPERTS[:2])])
    with pytest.raises(ScalingsError, match="at least one row"):
        mean_over_tokens([])


def test_layer_grid_has_every_layer_in_its_cell() -> None:
    means = scalings_row().mean_by_layer()  # [lora_layers, experts]
    without = [i for i, path in enumerate(LAYERS) if path != "model.layers.2.self_attn.o_proj"]
    grid = layer_grid([LAYERS[i] for i in without], means[without])
    assert grid.projections == tuple(name.partition(".")[2] for name in PROJECTIONS)
    assert grid.blocks == ("embed_tokens", "0", "1", "2", "3", "lm_head")
    torch.testing.assert_close(grid.values[2, 4], means[LAYERS.index("model.layers.3.mlp.down_proj")])
    assert torch.equal(grid.values[:, 0], means[:1].expand(3, -1))
    assert grid.values.isnan().sum() == 3  # the experts of the module that is not adapted
    assert grid.values[1, 3].isnan().all()
    torch.testing.assert_close(grid.means[3], (means[7] + means[9]) / 2)


def test_values_need_no_gradient_and_are_not_copied() -> None:
    values = torch.rand(5, len(LAYERS), 3, requires_grad=True)
    row = scalings_row(5, values=values)
    assert not row.values.requires_grad
    assert row.values.data_ptr() == values.data_ptr()


@pytest.mark.parametrize("shape", [(4, 14, 3), (5, 13, 3), (5, 14, 2), (1, 5, 14, 3), (14, 3)])
def test_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ScalingsError, match=r"\[5, 14, 3\]"):
        scalings_row(5, values=torch.zeros(shape))


def test_empty_scalings_are_refused() -> None:
    with pytest.raises(ScalingsError, match="each at least 1"):
        RowScalings(mixture="m", experts=EXPERTS, layers=LAYERS, token_ids=(), values=torch.zeros(0, 14, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    values = torch.zeros(5, 14, 3)
    values[2, 3, 1] = value
    with pytest.raises(ScalingsError, match="1 values that are not finite"):
        scalings_row(5, values=values)


def test_half_precision_is_refused() -> None:
    with pytest.raises(ScalingsError, match="bfloat16"):
        scalings_row(5, values=torch.zeros(5, 14, 3, dtype=torch.bfloat16))
