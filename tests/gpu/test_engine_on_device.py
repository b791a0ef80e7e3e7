"""The engine on a GPU: with CUDA graphs, without, and on a CPU, the same answers; adapters come and go meanwhile."""

import pytest
import torch

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.kernels.dispatch import choose_kernel
from tests.engine.engines import answer, assert_same, prompts, write_adapters
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.gpu
CHOICES = (None, "0", "2", "0:0.5+2:0.7", "alora", "science", "1", "science+0:0.3", "0", None)


def make(device: str, folders, dtype=torch.float32) -> MultiLoraModel:
    model = MultiLoraModel(tiny_model("llama", dtype=dtype).to(device))
    for name, folder in folders.items():
        model.load_adapter(name, folder)
    model.create_mixture("science", ["0", "2"], XLoraConfig(layerwise_scalings=True, xlora_depth=2, xlora_size=16))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_adapters("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products on a GPU may be rounded to TF32, which changes close choices."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_answers_are_those_of_the_cpu(folders, cuda_graphs):
    on_cpu, on_gpu = make("cpu", folders), make("cuda", folders)
    asked = prompts((5, 9, 14), CHOICES)
    lengths = [4 + 3 * (i % 4) for i in range(len(asked))]
    config = EngineConfig(cache_bytes=2**22, max_running=6, cuda_graphs=cuda_graphs)
    with Engine(on_gpu, config) as engine:
        results = engine.generate([p.request(max_tokens=n) for p, n in zip(asked, lengths, strict=True)])
        graphs = engine._runner.graphs
        assert (graphs is not None) is cuda_graphs
        if graphs is not None:
            assert graphs._broken is None
            assert graphs.num_replayed > graphs.num_recorded > 0
    for prompted, result, n in zip(asked, results, lengths, strict=True):
        assert_same(on_cpu, prompted, result, answer(on_cpu, prompted, n))


def test_an_adapter_that_is_replaced_while_graphs_run_is_the_new_one(folders):
    on_cpu, on_gpu = make("cpu", folders), make("cuda", folders)
    (prompted,) = prompts((6,), ("0",))
    with Engine(on_gpu, EngineConfig(cache_bytes=2**22)) as engine:
        for source in ("0", "2", "0"):
            on_gpu.load_adapter("0", folders[source], replace=True)
            on_cpu.load_adapter("0", folders[source], replace=True)
            (result,) = engine.generate([prompted.request(max_tokens=6)])
            assert_same(on_cpu, prompted, result, answer(on_cpu, prompted, 6))


def test_forward_and_generate_run_on_the_triton_kernels(folders):
    assert choose_kernel(torch.device("cuda"), torch.bfloat16, 1, has_table=True) == "triton"
    on_cpu, on_gpu = make("cpu", folders), make("cuda", folders)
    choices = [None, "0", "1", "0:0.5+2:0.7", "science"]
    ids = torch.randint(7, 100, (len(choices), 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = on_cpu(ids, adapters=choices).logits
        for _ in range(2):  # the second with q, k and v in one launch
            logits = on_gpu(ids.cuda(), adapters=choices).logits.cpu()
            assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()
