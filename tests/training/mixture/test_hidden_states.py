"""The scaling pass's hidden states: computed once, within a budget, and equal to those of the two passes."""

from pathlib import Path

import pytest
import torch

from loraplex import XLoraConfig
from loraplex.training import train_mixture
from loraplex.training.forward.batch import RowBatch, TrainingRow, make_batch
from loraplex.training.mixture.data import Sourced
from tests.parity.oracle import assert_close
from tests.training.mixture.tiny_mixture import NAME, tiny_config, tiny_data, tiny_losses, tiny_mixture, tiny_sources


def batch_of(rows: list[Sourced]) -> RowBatch:
    return make_batch([TrainingRow(row.source, 0, row.example) for row in rows], {}, torch.device("cpu"))


@pytest.mark.parametrize("pass_value", [0.0, 0.5, None])
def test_kept_states_equal_those_computed_anew_and_those_of_the_two_passes(
    tmp_path: Path, pass_value: float | None
) -> None:
    model = tiny_mixture(tmp_path, XLoraConfig(scaling_pass_value=pass_value, layerwise_scalings=True))
    config = tiny_config(tmp_path / "out")
    data = tiny_data(tiny_sources(tmp_path), config)
    state, hidden, _ = tiny_losses(model, data, config)
    batch = batch_of(data.examples_of_step(0))
    kept, anew = hidden.of(batch), hidden.compute(batch.input_ids)
    for row, training_row in enumerate(batch.rows):
        ids = torch.tensor([training_row.example.inputs])
        length = ids.shape[1]
        assert_close(kept[row, :length], anew[row, :length], "kept and computed anew")
        with torch.no_grad():
            _, (reports,) = model(ids, adapters=[NAME], return_scalings=True)
            scalings = state.head(kept[row, :length])
        assert_close(scalings, reports[0].values, "scalings of both passes")


def test_each_text_goes_through_the_scaling_pass_once(tmp_path: Path) -> None:
    model = tiny_mixture(tmp_path)
    config = tiny_config(tmp_path / "out", epochs=3)
    sources = tiny_sources(tmp_path)
    data = tiny_data([*sources, *tiny_sources_again(tmp_path)], config)
    _, hidden, losses = tiny_losses(model, data, config)
    texts = {example.inputs for example in data.needed()}
    assert len(texts) < len(data.needed()), "no text occurs twice"
    for step in range(data.num_steps):
        losses.accumulate_gradients(data.examples_of_step(step), 1.0, losses.no_sums(), step, 0)
    losses.evaluate(data.held_out)
    assert hidden.num_computed == len(texts)


def tiny_sources_again(folder: Path) -> list[Path]:
    """The same texts under other file names: they are known by their tokens."""
    (folder / "again.jsonl").write_bytes((folder / "messages.jsonl").read_bytes())
    return [folder / "again.jsonl"]


@pytest.mark.parametrize("budget", [0, 100_000])
def test_a_small_budget_is_kept_and_changes_nothing_but_time(tmp_path: Path, budget: int) -> None:
    sources = tiny_sources(tmp_path)
    whole = train_mixture(tiny_mixture(tmp_path), NAME, sources, tiny_config(tmp_path / "whole"))
    config = tiny_config(tmp_path / "small", hidden_cache_bytes=budget)
    small = train_mixture(tiny_mixture(tmp_path), NAME, sources, config)
    assert small.train_losses == pytest.approx(whole.train_losses, rel=1e-5)
    _, hidden, _ = tiny_losses(tiny_mixture(tmp_path), tiny_data(sources, config), config)
    assert budget * 0.9 <= hidden.num_bytes <= budget


def test_nothing_is_kept_where_experts_in_training_take_part_in_the_scaling_pass(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "out")
    data = tiny_data(tiny_sources(tmp_path), config)
    for pass_value, kept in ((0.0, True), (0.5, False)):
        model = tiny_mixture(tmp_path, XLoraConfig(use_trainable_adapters=True, scaling_pass_value=pass_value))
        _, hidden, _ = tiny_losses(model, data, config)
        assert (hidden.num_bytes > 0) == kept


def test_a_short_run_computes_only_the_texts_that_it_takes(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "out", max_steps=2, eval_fraction=0)
    data = tiny_data(tiny_sources(tmp_path), config)
    assert len(data.needed()) == 2 * config.steps.records_per_step < sum(map(len, data.train))
