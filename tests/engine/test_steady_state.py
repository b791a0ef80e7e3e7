"""Long use leaves nothing behind: neither blocks nor leases nor memory."""

import gc

import pytest

from loraplex.bench.measures import resident_bytes
from loraplex.engine.config import EngineConfig
from loraplex.residual.modules import FunctionResidual
from tests.engine.engines import add_residuals, make_model, write_adapters
from tests.engine.test_fuzz import fails, run_traffic

CONFIG = EngineConfig(cache_bytes=100 * 2**13, max_length=150, max_running=8, max_step_tokens=64)


def resident_mib() -> float:
    gc.collect()
    return resident_bytes() / 2**20


@pytest.mark.slow
def test_memory_returns_to_what_it_was_after_thousands_of_requests(tmp_path):
    model = add_residuals(make_model("llama", write_adapters("llama", tmp_path)))
    model.load_residual("fails", FunctionResidual(function=fails))
    run_traffic(model, CONFIG, 500, seed=1)
    before = resident_mib()
    for seed in range(2, 6):
        run_traffic(model, CONFIG, 500, seed=seed)
    assert resident_mib() - before < 20, "memory grew"
