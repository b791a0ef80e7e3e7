"""CUDA graphs: a graph of the whole model runs no Python, so no batch with a mixture may take one.

Piecewise graphs hold the layers between attentions; the gate operator in them reads static buffers. Both passes replay
them. Batches without mixtures keep full graphs. Should one run a batch with mixtures all the same,
`BatchGates.check_gated` stops it before a token is sampled. Written from reading vLLM 0.32; not run on a GPU.
"""

import functools
from typing import Any

from vllm.config import CUDAGraphMode

from loraplex.vllm_plugin.compat import require_attributes
from loraplex.vllm_plugin.model_manager import LinkModelManager


def keep_mixtures_out_of_full_graphs(runner: Any, manager: LinkModelManager) -> None:
    """Change how a runner chooses the graph of a batch; on a CPU there is none to choose."""
    if manager.device.type == "cpu":
        return
    if hasattr(runner, "cudagraph_dispatcher"):  # the first model runner: it knows the batch's adapters by then
        _restrict_dispatcher(runner.cudagraph_dispatcher, manager)
        return
    require_attributes(runner, ("lora_state", "initialize_kv_cache"))
    _restrict_second_runner(runner, manager)


def _restrict_dispatcher(dispatcher: Any, manager: LinkModelManager) -> None:
    dispatch = dispatcher.dispatch

    @functools.wraps(dispatch)
    def restricted(*args: Any, **kwargs: Any) -> Any:
        assert manager.gates is not None, "graphs are restricted only where there are gates"
        if manager.gates.is_waiting:
            kwargs["invalid_modes"] = {CUDAGraphMode.FULL, *(kwargs.get("invalid_modes") or ())}
        return dispatch(*args, **kwargs)

    dispatcher.dispatch = restricted


def _restrict_second_runner(runner: Any, manager: LinkModelManager) -> None:
    """The second model runner chooses the graph before it sets the batch's adapters, but looks them up first."""
    get_activate_loras, initialize = runner.lora_state.get_activate_loras, runner.initialize_kv_cache
    may_be_gated = False

    def noting(req_ids: list[str]) -> Any:
        nonlocal may_be_gated
        active = get_activate_loras(req_ids)
        may_be_gated = any(manager.may_be_gated(request.lora_int_id) for request in active)
        return active

    @functools.wraps(initialize)
    def initialized(*args: Any, **kwargs: Any) -> Any:
        result = initialize(*args, **kwargs)
        if runner.cudagraph_manager is not None:
            restrict_graph_manager(runner.cudagraph_manager, lambda: may_be_gated)
        return result

    runner.lora_state.get_activate_loras = noting
    runner.initialize_kv_cache = initialized


def restrict_graph_manager(graphs: Any, is_gated: Any) -> None:
    """Let a graph manager forget its full graphs while it chooses one for a batch with mixtures."""
    require_attributes(graphs, ("_candidates",))
    dispatch = graphs.dispatch

    @functools.wraps(dispatch)
    def restricted(*args: Any, **kwargs: Any) -> Any:
        if not is_gated():
            return dispatch(*args, **kwargs)
        every = graphs._candidates
        graphs._candidates = {
            key: [graph for graph in found if graph.cg_mode != CUDAGraphMode.FULL] for key, found in every.items()
        }
        try:
            return dispatch(*args, **kwargs)
        finally:
            graphs._candidates = every

    graphs.dispatch = restricted
