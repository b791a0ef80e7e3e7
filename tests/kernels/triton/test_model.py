"""Whole models on the Triton kernels, in triton's interpreter: see tests/kernels/test_triton.py."""

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.worker.cuda_graphs import run_again
from loraplex.kernels.dispatch import choose_kernel, choose_training_kernel, native_runs
from tests.engine.engines import answer, assert_same, make_model, prompts, write_adapters

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultiLoraModel:
    return make_model("llama", write_adapters("llama", tmp_path_factory.mktemp("llama")))


def test_the_interpreter_takes_the_place_of_the_compiled_kernel():
    assert choose_kernel(CPU, torch.float32, 1, has_table=True) == "triton"
    assert choose_training_kernel(CPU, torch.float32, has_dropout=False) == "triton"
    assert choose_training_kernel(CPU, torch.float32, has_dropout=True) == "segmented"
    assert choose_kernel(CPU, torch.float64, 1, has_table=True) == "stacked"
    assert not native_runs(CPU, torch.float32)


def test_rows_of_all_kinds_share_a_batch(model, monkeypatch):
    """Logits of a mixed batch are those of each row alone on the torch kernels; q, k and v share their launches."""
    choices = [None, "0", "1", "0:0.5+2:0.7", "science"]
    ids = torch.randint(7, 100, (len(choices), 6), generator=torch.Generator().manual_seed(0))
    from loraplex.kernels.triton import gated

    launched = []
    run = gated.gated_lora_triton
    monkeypatch.setattr(gated, "gated_lora_triton", lambda ys, *args: launched.append(len(ys)) or run(ys, *args))
    with torch.no_grad():
        for _ in range(2):  # the first sees which modules share their input
            launched.clear()
            logits = model(ids, adapters=choices).logits
        assert {1, 2, 3} <= set(launched)
        use_torch_kernels(monkeypatch)
        launched.clear()
        expected = model(ids, adapters=choices).logits
        assert not launched
    assert torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))


def test_recorded_steps_answer_as_generate_does(model, monkeypatch):
    asked = prompts((5,), ("0", "science"))
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine:
        engine._runner.use_graphs(run_again)
        results = engine.generate([p.request(max_tokens=3 + i) for i, p in enumerate(asked)])
        assert engine._runner.graphs.num_replayed >= 2
    use_torch_kernels(monkeypatch)
    for i, (prompted, result) in enumerate(zip(asked, results, strict=True)):
        assert_same(model, prompted, result, answer(model, prompted, 3 + i))


def use_torch_kernels(monkeypatch):
    monkeypatch.setattr("loraplex.routing.plan.choose_kernel", lambda *args, **kwargs: "segmented")
    monkeypatch.setattr("loraplex.routing.plan.triton_runs", lambda *args: False)


def test_gradients_of_an_adapter_in_training_are_those_of_the_torch_kernel(model, monkeypatch):
    from loraplex.adapters.store.slot_weights import SlotWeights
    from loraplex.layers.lora_layer import add_adapters
    from loraplex.routing.plan import RoutingPlan
    from loraplex.routing.segments import Segment
    from loraplex.training.forward.batch import TrainingSlot, TrainingWeightProvider

    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(4, 12, requires_grad=True)
    bank = TrainingWeightProvider([TrainingSlot(layers={0: SlotWeights(lora_a=a, lora_b=b, scaling=0.5)})])
    x, y = torch.randn(1, 6, 16).bfloat16(), torch.randn(1, 6, 12).bfloat16()

    def grads():
        plan = RoutingPlan([Segment(1, 5, 0)], 6, bank)
        out = add_adapters(0, y.clone(), x, plan, bias=None)
        return torch.autograd.grad(out.float().square().sum(), [a, b])

    ours = grads()
    monkeypatch.setattr("loraplex.kernels.dispatch.triton_runs", lambda *args: False)
    for mine, theirs in zip(ours, grads(), strict=True):
        assert (mine - theirs).abs().max() <= 2e-2 * theirs.abs().max()
