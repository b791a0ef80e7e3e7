"""No batch with mixtures takes a CUDA graph of the whole model, and others keep theirs: vLLM's choosers, on a CPU."""

from types import SimpleNamespace

import pytest

DECODE = {"num_tokens": 4, "uniform_decode": True, "has_lora": True, "num_active_loras": 1}  # a batch of first runners


def dispatcher():
    """The first model runner's, with graphs for decoding and piecewise ones, as on a GPU."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.NONE,
        max_cudagraph_capture_size=8,
        cudagraph_capture_sizes=[1, 2, 4, 8],
        compile_sizes=None,
        cudagraph_specialize_lora=True,
    )
    config = SimpleNamespace(
        compilation_config=compilation,
        num_speculative_tokens=0,
        lora_config=SimpleNamespace(specialize_active_lora=False, max_loras=2),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
    )
    chooser = CudagraphDispatcher(config)
    chooser.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)
    return chooser


def manager(**properties):
    import torch

    return SimpleNamespace(device=torch.device("cuda"), **properties)


def test_first_runner_gives_batches_with_mixtures_piecewise_graphs():
    from vllm.config import CUDAGraphMode

    from loraplex.vllm_plugin.cuda_graphs import keep_mixtures_out_of_full_graphs

    chooser, gates = dispatcher(), SimpleNamespace(is_waiting=False)
    keep_mixtures_out_of_full_graphs(SimpleNamespace(cudagraph_dispatcher=chooser), manager(gates=gates))
    assert chooser.dispatch(**DECODE)[0] == CUDAGraphMode.FULL
    gates.is_waiting = True
    assert chooser.dispatch(**DECODE)[0] == CUDAGraphMode.PIECEWISE
    assert chooser.dispatch(**DECODE, invalid_modes={CUDAGraphMode.PIECEWISE})[0] == CUDAGraphMode.NONE
    gates.is_waiting = False
    assert chooser.dispatch(**DECODE)[0] == CUDAGraphMode.FULL


def graph_manager():
    """The second model runner's, with a graph of the whole model before a piecewise one for batches of 4 tokens."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

    graphs = object.__new__(CudaGraphManager)
    graphs._graphs_captured, graphs._lora_dispatch_map = True, {}
    whole = BatchExecutionDescriptor(CUDAGraphMode.FULL, 4, 4, uniform_token_count=1, num_active_loras=1)
    pieces = BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, 4, None, num_active_loras=1)
    graphs._candidates = {(4, 1): [whole, pieces]}
    return graphs


def test_second_runner_gives_batches_with_mixtures_piecewise_graphs():
    """It chooses before it sets the batch's adapters: what it has looked up for the batch counts."""
    from vllm.config import CUDAGraphMode

    from loraplex.vllm_plugin.cuda_graphs import keep_mixtures_out_of_full_graphs

    active = []
    lora_state = SimpleNamespace(get_activate_loras=lambda req_ids: active)
    runner = SimpleNamespace(lora_state=lora_state, cudagraph_manager=None)

    def initialize_kv_cache(config):
        runner.cudagraph_manager = graph_manager()

    runner.initialize_kv_cache = initialize_kv_cache
    keep_mixtures_out_of_full_graphs(runner, manager(may_be_gated=lambda lora_id: lora_id == 7))
    runner.initialize_kv_cache(None)

    def mode():
        runner.lora_state.get_activate_loras(["request"])
        return runner.cudagraph_manager.dispatch(4, 4, 1, 1).cg_mode

    for lora_id, expected in ((1, CUDAGraphMode.FULL), (7, CUDAGraphMode.PIECEWISE), (1, CUDAGraphMode.FULL)):
        active[:] = [SimpleNamespace(lora_int_id=lora_id)]
        assert mode() == expected
    assert len(runner.cudagraph_manager._candidates[4, 1]) == 2  # its own list is left as it was


def test_graph_manager_that_moved_is_named():
    from loraplex.errors import CompatibilityError
    from loraplex.vllm_plugin.cuda_graphs import restrict_graph_manager

    with pytest.raises(CompatibilityError, match="_candidates"):
        restrict_graph_manager(SimpleNamespace(dispatch=None), lambda: True)


def test_adapters_that_are_not_loaded_yet_may_be_gated():
    from loraplex.vllm_plugin.link_loader import LinkedLora
    from loraplex.vllm_plugin.model_manager import LinkModelManager

    loaded = {1: object(), 2: LinkedLora(2, 4, {}, (), None, None), 3: LinkedLora(3, 4, {}, ("a mixture",), None, None)}
    slots = SimpleNamespace(_registered_adapters=SimpleNamespace(cache=loaded))
    assert [LinkModelManager.may_be_gated(slots, lora_id) for lora_id in (1, 2, 3, 4)] == [False, False, True, True]
