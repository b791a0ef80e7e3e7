"""Two workers, gloo, CPU: sharded and fully sharded LoRA layers against PEFT."""

import pytest

from tests.vllm.worlds import CHOICES, difference, engine, prompts


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fully_sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_workers_equal_peft(world, fully_sharded, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    rows = list(zip(CHOICES, prompts(len(CHOICES)), strict=True))
    settings = {"tensor_parallel_size": 2, "fully_sharded_loras": fully_sharded, "distributed_executor_backend": "mp"}
    with engine(world, {"mixtures": True}, **settings, max_loras=16, max_cpu_loras=16) as llm:
        found = difference(llm, world, rows, 6)
    assert found.is_none, found
