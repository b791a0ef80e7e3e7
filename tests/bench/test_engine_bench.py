"""The engine's benchmarks on a tiny model: what they report is what was done."""

import pytest

from loraplex.bench.decode import SIDES, DecodeBench, run_decode
from loraplex.bench.load import LoadBench, run_load, run_stream
from loraplex.bench.prefix import PrefixBench, run_prefix
from loraplex.bench.random_adapters import load_model
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import ConfigError

TINY = {"model": "tiny", "dtype": "float32"}


def test_every_side_decodes():
    result = run_decode(DecodeBench(**TINY, rows=2, prompt_tokens=4, new_tokens=33))
    assert list(result["tokens_per_s"]) == list(SIDES)
    assert all(speed > 0 for speed in result["tokens_per_s"].values())


def test_later_requests_wait_less_where_a_long_prefix_is_shared():
    result = run_prefix(PrefixBench(**TINY, prefix_tokens=200, requests=4, rounds=3))
    assert result["later_of_first"] == result["later"] / result["first"]
    assert result["later"] < result["first"]


def test_load_reports_both_streams():
    bench = LoadBench(
        **TINY, adapters=10, resident=2, host_adapters=3, seconds=1, rounds=2, prompt_tokens=4, new_tokens=3
    )
    told: list[str] = []
    results = run_load(bench, told.append)
    assert results["resident"]["requests"] == results["zipf"]["requests"] > 0
    assert len(told) == 1 + 2 * 3, "the capacity, and both streams, in each of two turns"
    for side in ("resident", "zipf"):
        assert 0 < results[side]["first_token_s"]["p50"] <= results[side]["first_token_s"]["p99"]
        assert results[side]["first_token_s"]["p50"] < results[side]["request_s"]["p50"]
        assert len(results[side]["turn_p99_s"]) == len(results["turn_capacities"]) == 2
        assert min(results[side]["turn_p99_s"]) > 0


def test_stream_counts_every_request_and_waits_for_late_ones():
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    arrivals = [(at, Request([5, 6, 7], sampling=sampling)) for at in (0.0, 0.0, 0.2)]
    with Engine(load_model("tiny", "float32"), EngineConfig(max_length=50)) as engine:
        stream = run_stream(engine, arrivals)
    assert (stream.num_tokens, len(stream.first_token_s), len(stream.request_s)) == (12, 3, 3)
    assert stream.seconds > 0.2
    assert all(wait < 0.2 for wait in stream.first_token_s[-1:]), "the wait begins when the request arrives"


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: DecodeBench(sides=("fast",)), "sides"),
        (lambda: DecodeBench(rows=0), "rows"),
        (lambda: DecodeBench(new_tokens=1), "new_tokens"),
        (lambda: PrefixBench(requests=1), "requests"),
        (lambda: LoadBench(resident=50), "resident"),
        (lambda: LoadBench(share=0), "share"),
        (lambda: LoadBench(host_adapters=0), "host_adapters"),
    ],
)
def test_workloads_that_make_no_sense_are_refused(make, option):
    with pytest.raises(ConfigError, match=option):
        make()
