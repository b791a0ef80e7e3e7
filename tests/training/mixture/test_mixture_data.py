"""Mixing of sources: shares, epochs, held-out records; and what is refused."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraplex.errors import ConfigError, DatasetError
from loraplex.training import DataSource, MixtureTrainConfig
from loraplex.training.core.config import compose
from loraplex.training.mixture.data import MixtureData, records_per_epoch
from loraplex.training.mixture.sources import as_sources
from tests.training.mixture.tiny_mixture import tiny_config, tiny_data, tiny_sources
from tests.training.tiny_jobs import records


def taken(data: MixtureData, epoch: int) -> Counter[tuple[int, str]]:
    steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
    return Counter((row.source, row.example.place) for step in steps for row in data.examples_of_step(step))


def test_an_epoch_takes_every_record_once_in_another_order_each_time(tmp_path: Path) -> None:
    data = tiny_data(tiny_sources(tmp_path), tiny_config(tmp_path, epochs=2, eval_fraction=0))
    assert data.num_steps == 2 * 12
    first, second = ([row.example.place for row in data.examples_of_step(step)] for step in (0, data.steps_per_epoch))
    assert taken(data, 0) == taken(data, 1)
    assert set(taken(data, 0).values()) == {1}
    assert len(taken(data, 0)) == 72
    assert first != second


def test_shares_say_how_many_records_a_source_gives_and_small_ones_are_repeated_evenly(tmp_path: Path) -> None:
    shares = (1.0, 0.5, 2.5)
    sources = [replace(source, share=share) for source, share in zip(tiny_sources(tmp_path), shares, strict=True)]
    data = tiny_data(sources, tiny_config(tmp_path, epochs=4, eval_fraction=0))
    assert list(data.per_epoch) == [18, 9, 45]
    total: Counter[tuple[int, str]] = Counter()
    for epoch in range(4):
        by_source = Counter(source for source, _ in taken(data, epoch).elements())
        assert by_source == {0: 18, 1: 9, 2: 45}
        total += taken(data, epoch)
    # 4 epochs take 72, 36 and 180 records of 24 each: 3, 1 to 2, and 7 to 8 times every one.
    times = [{count for (source, _), count in total.items() if source == number} for number in range(3)]
    assert times == [{3}, {1, 2}, {7, 8}]


def test_records_per_epoch_rounds_to_the_whole() -> None:
    assert records_per_epoch([10, 20], [None, None]) == [10, 20]
    assert records_per_epoch([5, 5, 5], [1.0, 1.0, 2.0]) == [4, 4, 7]
    assert sum(records_per_epoch([7, 9, 11], [0.3, 0.3, 0.4])) == 27
    assert records_per_epoch([10, 10], [1.0, 1e6]) == [1, 20]


def test_every_source_is_split_and_held_out_records_are_not_trained_on(tmp_path: Path) -> None:
    data = tiny_data(tiny_sources(tmp_path), tiny_config(tmp_path, epochs=1, eval_fraction=0.25, eval_records=4))
    assert Counter(row.source for row in data.held_out) == {0: 4, 1: 4, 2: 4}
    assert [len(part) for part in data.train] == [18, 18, 18]
    held = {row.example.place for row in data.held_out}
    assert held.isdisjoint(place for _, place in taken(data, 0))


def test_eval_data_goes_by_the_names_of_its_sources(tmp_path: Path) -> None:
    extra = [DataSource(name="text", data=records("text", 5, 9)), DataSource(name="new", data=records("prompt", 3, 9))]
    data = tiny_data(tiny_sources(tmp_path), tiny_config(tmp_path, eval_data=extra))
    assert list(data.names) == ["messages", "prompt", "text", "new"]
    assert Counter(row.source for row in data.held_out) == {2: 5, 3: 3}
    assert [len(part) for part in data.train] == [24, 24, 24]


def test_records_in_memory_equal_those_of_a_file(tmp_path: Path) -> None:
    (source, *_) = tiny_sources(tmp_path)
    config = tiny_config(tmp_path, eval_fraction=0)
    from_file = tiny_data([source], config)
    in_memory = tiny_data([DataSource(name="memory", data=records("messages", 24, 0))], config)
    assert [e.ids for e in from_file.train[0]] == [e.ids for e in in_memory.train[0]]
    assert in_memory.train[0][3].place == "memory:3"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"data is \[\]; give a list"),
        ("file.jsonl", "data is 'file.jsonl'; give a list"),
        (["a.jsonl", "a.jsonl"], "several sources called 'a.jsonl'"),
        ([DataSource(name="a", data="x", share=1), DataSource(name="b", data="y")], r"shares for \['a'\] only"),
    ],
)
def test_refuses_sources_that_can_not_be_mixed(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_sources(data)


def test_refuses_records_that_are_none(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(DatasetError, match="data source 'a' has no records"):
        tiny_data([DataSource(name="a", data=[])], config)
    with pytest.raises(DatasetError, match="a:1 has the keys"):
        tiny_data([DataSource(name="a", data=[{"text": "abc"}, {"question": "abc"}])], config)
    with pytest.raises(DatasetError, match="too few to hold out"):
        tiny_data([DataSource(name="a", data=[{"text": "abc"}])], config)
    with pytest.raises(ConfigError, match="share is 0; it must be a number above 0"):
        DataSource(name="a", data="x", share=0)
    with pytest.raises(ConfigError, match="warmup_steps is 10, but there are only 10 steps"):
        tiny_data(tiny_sources(tmp_path), tiny_config(tmp_path, warmup_steps=10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 3, "epochs": 2}, "max_steps is 3 and epochs is 2; set exactly one"),
        ({}, "max_steps is None and epochs is None"),
        ({"max_steps": 3, "layout": "zip"}, r"layout is 'zip'; choose one of \['peft', 'xlora'\]"),
        ({"max_steps": 3, "schedule": "square"}, "schedule is 'square'"),
        ({"max_steps": 3, "learning_rate": 0}, "learning_rate is 0; it must be a number above 0"),
        ({"max_steps": 3, "expert_dropout": 1}, "expert_dropout is 1; it must be a number at least 0 and below 1"),
        ({"max_steps": 3, "sparsity_weight": -1.0}, "sparsity_weight is -1.0"),
        ({"max_steps": 3, "hidden_cache_bytes": -1}, "hidden_cache_bytes is -1"),
        ({"max_steps": 3, "patience": 2, "eval_fraction": 0}, "patience is 2, but there is nothing to evaluate"),
        ({"max_steps": True}, "max_steps is True"),
        ({"max_steps": 3, "resume": 1}, "resume is 1; it must be True or False"),
    ],
)
def test_refuses_options_that_contradict_or_make_no_sense(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(MixtureTrainConfig, {"output": tmp_path} | options, "mixture")


def test_refuses_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        compose(MixtureTrainConfig, {"output": tmp_path / "out", "max_steps": 1}, "mixture")
