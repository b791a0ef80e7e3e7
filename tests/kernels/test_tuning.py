"""What is measured about linear products, what follows from it, and how it is kept."""

import io
import json
import math
import time

import pytest
import torch
from rich.console import Console

from loraplex.cli.tune import product_tables
from loraplex.kernels import tuning
from loraplex.kernels.native import native_available
from loraplex.kernels.packed_weight import has_fast_packed_product
from loraplex.kernels.product_times import TOKENS, LinearShape, measure_products
from loraplex.kernels.tuning import ALL_TOKENS, ProductChoice, choices, choose, measured_once, tune, tuning_file

pytestmark = pytest.mark.needs("compiler")

SHAPE = LinearShape(512, 256, torch.bfloat16)
SMALL = LinearShape(64, 64, torch.bfloat16)


def times(**rates: float) -> dict:
    """Of products that take 1 / rate for a token, and torch's 8 for any number up to 64."""
    made = {product: [tokens / rate for tokens in TOKENS] for product, rate in rates.items()}
    return made | {"torch": [max(8.0, tokens / 8) for tokens in TOKENS]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    assert native_available()
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path))


def test_the_fastest_is_chosen():
    assert choose(times(compiled=1.0)) == ProductChoice(is_packed=False, max_compiled_tokens=8)
    assert choose(times(compiled=9.0)) == ProductChoice(is_packed=False, max_compiled_tokens=ALL_TOKENS)
    assert choose(times(compiled=0.1)) == ProductChoice(is_packed=False, max_compiled_tokens=0)
    assert choose(times(compiled=1.0, packed=9.0)) == ProductChoice(is_packed=True, max_compiled_tokens=ALL_TOKENS)
    slow_alone = times(compiled=1.0, packed=9.0)
    slow_alone["packed"][0] = 1.2  # times of one and the same product differ by as much
    assert choose(slow_alone).is_packed
    slow_alone["packed"][0] = 1.3
    assert not choose(slow_alone).is_packed
    assert not choose(times(compiled=9.0, packed=8.9)).is_packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_product_is_measured(dtype):
    found = measure_products(SHAPE._replace(dtype=dtype))
    assert {"compiled", "torch"} <= set(found)
    assert ("packed" in found) == (dtype == torch.bfloat16)
    for seconds in found.values():
        assert len(seconds) == len(TOKENS)
        assert all(0 < time < 60 for time in seconds)


def test_times_are_kept(monkeypatch):
    measured = []
    monkeypatch.setattr(tuning, "measure_products", lambda shape: measured.append(shape) or times(compiled=1.0))
    monkeypatch.setattr(tuning, "undisturbed", lambda measure: (measure(), True))
    assert tune([SHAPE, SHAPE]) == {SHAPE: times(compiled=1.0)}
    assert choices([SHAPE])[SHAPE].max_compiled_tokens == 8
    assert measured == [SHAPE]
    tune([SHAPE], anew=True)
    assert measured == [SHAPE, SHAPE]
    assert set(json.loads(tuning_file().read_text())["times"]) == {"256 to 512 bfloat16"}


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"times": 3}', '{"times": {"256 to 512 bfloat16": {}}, "numbers": {}}']
)
def test_a_damaged_file_is_measured_again(content, monkeypatch):
    monkeypatch.setattr(tuning, "measure_products", lambda shape: times(compiled=1.0))
    monkeypatch.setattr(tuning, "undisturbed", lambda measure: (measure(), True))
    tuning_file().parent.mkdir(parents=True)
    tuning_file().write_text(content)
    assert tune([SHAPE])[SHAPE] == times(compiled=1.0)
    assert json.loads(tuning_file().read_text())["times"]


def test_times_that_are_no_times_are_measured_again(monkeypatch):
    monkeypatch.setattr(tuning, "undisturbed", lambda measure: (measure(), True))
    for wrong in (math.inf, 0.0, -1.0):
        monkeypatch.setattr(
            tuning, "measure_products", lambda shape, wrong=wrong: times(compiled=1.0) | {"packed": [wrong] * 10}
        )
        tune([SHAPE], anew=True)
        monkeypatch.setattr(tuning, "measure_products", lambda shape: times(compiled=1.0))
        assert tune([SHAPE]) == {SHAPE: times(compiled=1.0)}


def test_nothing_is_kept_while_others_work(monkeypatch):
    monkeypatch.setattr(tuning, "measure_products", lambda shape: times(compiled=1.0))
    monkeypatch.setattr(tuning, "undisturbed", lambda measure: (measure(), False))
    assert tune([SHAPE]) == {}
    assert choices([SHAPE])[SHAPE] == ProductChoice(has_fast_packed_product(), ALL_TOKENS)
    assert measured_once("tokens", lambda: 3, 256) == 256
    assert not tuning_file().exists()


def test_what_one_thread_computes_alone_is_no_load_of_others(monkeypatch):
    """On a machine of many processors, too: the measure must not depend on how many threads there are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)

    def compute() -> int:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        return 7

    assert any(tuning.undisturbed(compute) == (7, True) for _ in range(20))  # others may work here now and then
    assert tuning.undisturbed(lambda: time.sleep(0.05)) == (None, False)


def test_small_weights_are_not_measured():
    assert choices([SMALL])[SMALL] == ProductChoice(has_fast_packed_product(), ALL_TOKENS)
    assert not choices([SMALL._replace(dtype=torch.float32)])[SMALL._replace(dtype=torch.float32)].is_packed
    assert not tuning_file().exists()


def test_numbers_are_kept_until_they_are_forgotten(monkeypatch):
    monkeypatch.setattr(tuning, "undisturbed", lambda measure: (measure(), True))
    assert measured_once("tokens", lambda: 512, 256) == 512
    assert measured_once("tokens", lambda: 1, 256) == 512
    tuning.forget_numbers()
    assert measured_once("tokens", lambda: 1, 256) == 1


def test_other_threads_have_another_file():
    before = tuning_file()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert tuning_file() != before
    finally:
        torch.set_num_threads(threads)


def test_the_table_fits_a_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(product_tables({LinearShape(32000, 2048, torch.bfloat16): times(compiled=1e-6, packed=1e-3)}))
    text = console.export_text()
    assert "2048 to 32000 bfloat16: torch" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
