"""Two workers, gloo, CPU: sharded and fully sharded LoRA layers against PEFT; residuals, steering and captures."""

import pytest

from tests.vllm.residual_worlds import add_residuals
from tests.vllm.test_steered_attention import args_of_rows, check
from tests.vllm.worlds import CHOICES, difference, engine, make_world, prompts


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fully_sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_workers_equal_peft(world, fully_sharded, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    rows = list(zip(CHOICES, prompts(len(CHOICES)), strict=True))
    settings = {"tensor_parallel_size": 2, "fully_sharded_loras": fully_sharded, "distributed_executor_backend": "mp"}
    with engine(world, {"mixtures": True}, **settings, max_loras=16, max_cpu_loras=16) as llm:
        found = difference(llm, world, rows, 6)
    assert found.is_none, found


@pytest.mark.timeout(900)
def test_residuals_of_two_workers_equal_loraplexs_own(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    world = make_world(tmp_path)
    model = add_residuals(world)
    choices = [
        "linked:0.5+linked_late",
        "linked+heard+protein",
        "block",
        "ia3:0.5+protein",
        "after",
        None,
        "protein",
        None,
    ]
    rows = list(zip(choices, prompts(len(choices)), strict=True))
    extras = [None] * 4 + [args_of_rows()[i] for i in (3, 2, 7, 5)]
    settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_loras": 8}
    with engine(world, {"linked": 2, "attention": True}, **settings) as llm:
        check(model, llm, rows, extras)
