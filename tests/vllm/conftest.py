"""Settings of vLLM, which it reads when it is imported, and what isn't run where it isn't installed."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
# These run without vLLM too: what they test doesn't import it.
WITHOUT = (
    *("test_concatenate", "test_gates", "test_route_ranks", "test_catalog", "test_serve_command"),
    *("test_linked_pass", "test_attention_args", "test_residual_limits", "test_row_steering"),
)

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in the test's own process
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)
if HAS_VLLM:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles small functions of its sampler, a minute each


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    inside = [item for item in items if item.path.parent == Path(__file__).parent and item.path.stem not in WITHOUT]
    if not HAS_VLLM:
        config.hook.pytest_deselected(items=inside)
        items[:] = [item for item in items if item not in set(inside)]
        return
    for item in inside:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))  # an engine starts in half a minute, on a busy machine in more


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Llama with adapters and the mixtures of the grid."""
    from tests.vllm.worlds import grid_world

    return grid_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def register() -> None:
    """What vLLM's entry point does."""
    from loraplex.vllm_plugin.register import register

    register()
