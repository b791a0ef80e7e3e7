"""Arrivals, popular names and prompts have the distributions that they are said to have."""

import json
import mmap
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from loraplex.bench.measures import alternate, medians, percentiles, resident_bytes
from loraplex.bench.workload import file_prompts, poisson_times, random_prompts, uniform_names, zipf_names
from tests.parts import skip_here


def test_poisson_arrivals_have_the_rate_and_exponential_gaps():
    times = poisson_times(20.0, 500.0, random.Random(0))
    assert len(times) / 500 == pytest.approx(20, rel=0.03)
    assert 0 < times[0] < times[-1] < 500
    gaps = np.diff([0.0, *times])
    assert gaps.min() > 0
    assert np.mean(gaps > 0.05) == pytest.approx(np.exp(-1), abs=0.02)  # the mean gap
    assert np.std(gaps) == pytest.approx(0.05, rel=0.05)


def test_arrivals_follow_from_the_seed():
    assert poisson_times(5, 10, random.Random(3)) == poisson_times(5, 10, random.Random(3))
    assert poisson_times(5, 10, random.Random(3)) != poisson_times(5, 10, random.Random(4))


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_popularity_follows_zipfs_law(exponent):
    names = [f"adapter{i}" for i in range(10)]
    draw, source = random.Random(0), zipf_names(names, exponent, seed=1)
    counts = [count for _, count in Counter(source(draw) for _ in range(20_000)).most_common()]
    expected = np.array([(k + 1) ** -exponent for k in range(10)])
    np.testing.assert_allclose(np.array(counts) / 20_000, expected / expected.sum(), atol=0.015)


def test_the_popular_names_are_drawn_not_the_first_ones():
    names = [f"adapter{i}" for i in range(50)]
    tops = {
        Counter(map(zipf_names(names, 2.0, seed), [random.Random(0)] * 200)).most_common(1)[0][0] for seed in range(5)
    }
    assert len(tops) > 1
    assert {uniform_names(names[:3])(random.Random(seed)) for seed in range(30)} == set(names[:3])


def test_random_prompts_have_the_length_and_no_special_tokens():
    source = random_prompts(128, 9)
    drawn = [source(random.Random(seed)) for seed in range(50)]
    assert {len(prompt) for prompt in drawn} == {9}
    assert min(map(min, drawn)) >= 16
    assert max(map(max, drawn)) < 128


class Words:
    """A tokenizer that knows words and a template of one word."""

    chat_template = "answer:"

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        return " ".join([turn["content"] for turn in turns] + ["answer:"])

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [1] * add_special_tokens + [len(word) for word in text.split()]}


def test_prompts_of_files_are_the_questions_without_their_answers(tmp_path):
    chat = {"messages": [{"role": "user", "content": "aa b"}, {"role": "assistant", "content": "secret-answer"}]}
    open_end = {"messages": [*chat["messages"], {"role": "user", "content": "eeeee"}]}  # ends with a question
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n" + json.dumps(open_end) + "\n")
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "ccc dddd", "completion": "secret-answer"}) + "\n")
    source = file_prompts(Words(), [tmp_path / "chat.jsonl", tmp_path / "plain.jsonl"])  # type: ignore[arg-type]
    assert {tuple(source(random.Random(seed))) for seed in range(40)} == {(2, 1, 7), (2, 1, 13, 5, 7), (1, 3, 4)}


def test_percentiles_are_numpys():
    values = random.Random(0).sample(range(1000), 101)
    assert percentiles(values, (50, 99)) == {"p50": np.percentile(values, 50), "p99": np.percentile(values, 99)}
    assert all(np.isnan(value) for value in percentiles([]).values())


def test_sides_take_turns_after_a_warm_up():
    order: list[str] = []
    figures = alternate({side: lambda side=side: order.append(side) or float(len(order)) for side in "ab"}, rounds=2)
    assert order == ["a", "b"] * 3
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert medians(figures) == {"a": 4.0, "b": 5.0}


def test_rounds_end_where_there_is_no_time_for_another(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("loraplex.bench.measures.time.monotonic", lambda: clock[0])

    def run() -> float:
        clock[0] += 1
        return clock[0]

    for seconds, rounds in ((0.5, 1), (6, 2), (7, 2), (100, 4)):  # a warm-up and a round take two seconds each
        clock[0] = 0.0
        assert len(alternate({"a": run, "b": run}, rounds=4, seconds=seconds)["b"]) == rounds, seconds


def test_resident_memory_grows_with_what_is_held():
    before = resident_bytes()
    if before is None:
        skip_here("the memory of a process, which Linux tells")
    held = np.ones(2**25)  # 256 MiB: more than what earlier tests have left that the system takes back meanwhile
    assert 2**27 < resident_bytes() - before < 2**29
    del held


def test_shared_memory_is_the_process_s_own_and_pages_of_a_file_are_not():
    before = resident_bytes()
    if before is None:
        skip_here("the memory of a process, which Linux tells")
    with mmap.mmap(-1, 2**28) as held:
        held.write(b"1" * 2**28)
        assert 2**27 < resident_bytes() - before < 2**29
    before = resident_bytes()
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # hundreds of MiB that lie on a disk
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert len(mapped) > 2**27
        assert mapped.find(random.randbytes(32)) == -1  # to its end
        assert resident_bytes() - before < 2**27
