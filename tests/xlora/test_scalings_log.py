"""The scalings log: on and off, buckets, bounds, and its file."""

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraplex.errors import ConfigError, ScalingsError, ScalingsFileError
from loraplex.xlora.scalings.log import ScalingsLog
from loraplex.xlora.scalings.row_scalings import RowScalings
from tests.xlora.rows import EXPERTS, scalings_row


def enabled_log(*num_tokens: int, max_tokens: int | None = None) -> ScalingsLog:
    log = ScalingsLog(max_tokens=max_tokens)
    log.enable()
    log.record([scalings_row(count, seed=seed) for seed, count in enumerate(num_tokens)])
    return log


def assert_same(rows: list[RowScalings], others: list[RowScalings]) -> None:
    for row, other in zip(rows, others, strict=True):
        names = (row.mixture, row.experts, row.layers, row.token_ids)
        assert names == (other.mixture, other.experts, other.layers, other.token_ids)
        assert torch.equal(row.values, other.values)


def test_records_only_while_enabled_and_keeps_entries_when_disabled() -> None:
    log = ScalingsLog()
    log.record([scalings_row(2)])
    assert (len(log), log.is_enabled) == (0, False)
    log.enable()
    log.record([scalings_row(3), scalings_row(4)])
    log.disable()
    log.record([scalings_row(5)])
    assert [row.num_tokens for row in log.entries()] == [3, 4]
    log.enable()
    log.clear()
    assert (len(log), log.num_tokens, log.is_enabled) == (0, 0, True)


def test_entries_stay_as_they_were_recorded() -> None:
    log = enabled_log()
    row = scalings_row(3)
    before = row.values.clone()
    log.record([row])
    row.values.zero_()
    log.entries().clear()
    assert torch.equal(log.entries()[0].values, before)


def test_buckets_hold_positions_and_values_of_equally_long_entries() -> None:
    log = enabled_log(3, 5, 3)
    buckets = log.bucketed()
    assert {count: positions for count, (positions, _) in buckets.items()} == {3: [0, 2], 5: [1]}
    for positions, values in buckets.values():
        for position, value in zip(positions, values, strict=True):
            assert torch.equal(value, log.entries()[position].values)


def test_oldest_entries_make_room_and_are_counted() -> None:
    log = enabled_log(4, 3, 2, max_tokens=6)
    assert [row.num_tokens for row in log.entries()] == [3, 2]
    assert (log.num_tokens, log.num_dropped) == (5, 1)
    log.record([scalings_row(7)])  # longer than the log
    assert (len(log), log.num_tokens, log.num_dropped) == (0, 0, 4)
    log.clear()
    assert log.num_dropped == 0


def test_bound_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        ScalingsLog(max_tokens=0)


def test_flushed_log_loads_with_the_same_entries(tmp_path: Path) -> None:
    log = enabled_log(3, 5)
    log.record([scalings_row(2, experts=EXPERTS[:2])])
    entries = log.entries()
    assert log.flush(tmp_path / "logs" / "scalings.safetensors") == 3
    assert (len(log), log.num_tokens, log.is_enabled) == (0, 0, True)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["scalings.safetensors"]
    loaded = ScalingsLog.load(tmp_path / "logs" / "scalings.safetensors")
    assert (loaded.num_tokens, loaded.is_enabled) == (10, False)
    assert_same(loaded.entries(), entries)


def test_rows_that_share_memory_are_written(tmp_path: Path) -> None:
    log = enabled_log()
    shared = torch.rand(4, 1, 3).expand(4, 14, 3)  # one prediction for all LoRA layers
    log.record([scalings_row(4, values=shared), scalings_row(4, values=shared)])
    log.flush(tmp_path / "log.safetensors")
    for row in ScalingsLog.load(tmp_path / "log.safetensors").entries():
        assert torch.equal(row.values, shared)


def test_empty_log_does_not_overwrite_the_last_file(tmp_path: Path) -> None:
    log = enabled_log(3)
    log.flush(tmp_path / "log.safetensors")
    with pytest.raises(ScalingsError, match="empty"):
        log.flush(tmp_path / "log.safetensors")
    assert len(ScalingsLog.load(tmp_path / "log.safetensors")) == 1


def test_entries_stay_when_the_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    log = enabled_log(3)
    with pytest.raises(ScalingsFileError, match="can't be written"):
        log.flush(tmp_path / "file" / "log.safetensors")
    assert len(log) == 1


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    with pytest.raises(ScalingsFileError, match=r"missing\.safetensors"):
        ScalingsLog.load(tmp_path / "missing.safetensors")
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ScalingsFileError, match="can be read"):
        ScalingsLog.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ScalingsFileError, match="can be read"):
        ScalingsLog.load(path)
    with pytest.raises(ScalingsFileError, match="not known to be of loraplex"):
        enabled_log(3).flush(path)
    path.unlink()
    enabled_log(3).flush(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ScalingsFileError, match="can be read"):
        ScalingsLog.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"rows": [1]}, "IndexError"),
        ({"rows": [0, 0]}, "1.token_ids"),
        ({"rows": [0], "sources": [{"mixture": "m", "experts": ["a"], "layers": ["b"]}]}, "expected .tokens"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    row = scalings_row(2)
    source = {"mixture": row.mixture, "experts": row.experts, "layers": row.layers}
    content = {"version": 1, "sources": [source], "rows": [0], **change}
    tensors = {"0.values": row.values, "0.token_ids": torch.tensor(row.token_ids)}
    save_file(tensors, tmp_path / "log.safetensors", metadata={"loraplex_scalings": json.dumps(content)})
    with pytest.raises(ScalingsFileError, match=message):
        ScalingsLog.load(tmp_path / "log.safetensors")


def test_threads_lose_and_repeat_no_entry(tmp_path: Path) -> None:
    log = enabled_log()
    flushed: list[int] = []

    def record() -> None:
        for _ in range(50):
            log.record([scalings_row(1), scalings_row(2)])

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if len(log):
            path = tmp_path / f"{len(flushed)}.safetensors"
            flushed.append(log.flush(path))
            assert len(ScalingsLog.load(path)) == flushed[-1]
    assert sum(flushed) + len(log) == 4 * 50 * 2
    assert log.num_tokens == sum(row.num_tokens for row in log.entries())
