"""Norms and gated feed-forward modules as one operator each: what training computes stays the same."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex import EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.engine.engine import Engine
from loraplex.training.forward.checkpointing import checkpointable_layers, checkpointed
from loraplex.training.forward.fused_modules import fused_modules
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.needs("compiler")
# Llama's norms and SiLU, Gemma's 1 + weight and tanh with four norms a layer, norms of heads.
FAMILIES = ["llama", "mistral", "qwen2", "gemma2", "gemma3", "qwen3"]
OTHERS = ["gpt2", "gpt_neox", "phi3"]  # LayerNorm, no gate, or gate and up in one module: they run as they are
IDS = torch.tensor([[5, 9, 2, 7, 1, 4], [3, 8, 6, 2, 9, 1]])


def run(base: PreTrainedModel, *, fused: bool, checkpointing: bool = False) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the input embeddings, through all of the model."""
    embedded = base.get_input_embeddings()(IDS).detach().requires_grad_()
    layers = checkpointable_layers(base) if checkpointing else []
    if fused:
        with fused_modules(base), checkpointed(layers, []):
            logits = base(inputs_embeds=embedded, use_cache=False).logits
            logits.float().square().sum().backward()
    else:
        logits = base(inputs_embeds=embedded, use_cache=False).logits
        logits.float().square().sum().backward()
    assert embedded.grad is not None
    return logits.detach(), embedded.grad


def counts_of(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the compiled operators run, by name, from now on."""
    from loraplex.kernels import native_parts

    counts = dict.fromkeys(("rms_norm", "rms_norm_gradient", "gated_activation", "gated_activation_gradients"), 0)

    def counting(name: str) -> object:
        own = getattr(native_parts, name)

        def count(*args: object) -> object:
            counts[name] += 1
            return own(*args)

        return count

    for name in counts:
        monkeypatch.setattr(native_parts, name, counting(name))
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_modules_own(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(family).requires_grad_(False)
    expected, gradient = run(base, fused=False)
    with fused_modules(base):  # what is tried when modules are found isn't counted
        pass
    counts = counts_of(base, monkeypatch)
    logits, found = run(base, fused=True, checkpointing=checkpointing)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - gradient).norm() <= 1e-5 * gradient.norm()
    layers = base.config.get_text_config().num_hidden_layers
    assert counts["gated_activation_gradients"] == layers
    assert counts["rms_norm_gradient"] >= 2 * layers
    assert counts["gated_activation"] == (2 if checkpointing else 1) * layers


@pytest.mark.parametrize("family", OTHERS)
def test_other_modules_run_as_they_are(family: str) -> None:
    base = tiny_model(family).requires_grad_(False)
    expected, gradient = run(base, fused=False)
    logits, found = run(base, fused=True)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - gradient).norm() <= 1e-5 * gradient.norm()


def test_bfloat16_is_nearer_to_float32_than_the_modules() -> None:
    exact, exact_gradient = run(tiny_model("llama").requires_grad_(False), fused=False)
    base = tiny_model("llama").requires_grad_(False).to(torch.bfloat16)
    (own, own_gradient), (logits, gradient) = run(base, fused=False), run(base, fused=True)
    assert (logits - exact).norm() <= 1.1 * (own - exact).norm()
    assert (gradient - exact_gradient).norm() <= 1.1 * (own_gradient - exact_gradient).norm()


def test_modules_that_an_engine_runs_are_found_too() -> None:
    base = tiny_model("llama").requires_grad_(False)
    model = MultiLoraModel(base)
    model.generate(IDS, max_new_tokens=2)
    found, gradient = run(base, fused=True)
    expected, own = run(tiny_model("llama").requires_grad_(False), fused=True)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, own)


def test_modules_are_given_back_and_other_threads_keep_theirs() -> None:
    base = tiny_model("llama").requires_grad_(False)
    classes = [type(module) for module in base.modules()]
    with fused_modules(base):
        inside = [type(module) for module in base.modules()]
        assert inside != classes
        with fused_modules(base):
            assert [type(module) for module in base.modules()] == inside
    assert [type(module) for module in base.modules()] == classes


def test_engines_come_and_go_in_any_order() -> None:
    base = tiny_model("llama").requires_grad_(False)
    classes = [type(module) for module in base.modules()]
    expected, gradient = run(base, fused=False)
    model = MultiLoraModel(base)
    request = Request([1, 2, 3], sampling=SamplingParams(max_tokens=4))
    with fused_modules(base):
        engine = Engine(model, EngineConfig())
        (answer,) = engine.generate([request])
    logits, found = run(base, fused=True)
    (again,) = engine.generate([request])
    assert again.token_ids == answer.token_ids
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - gradient).norm() <= 1e-5 * gradient.norm()
    engine.close()
    model.close()
    logits, _ = run(base, fused=True)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    plain = [type(module).__name__ for module in base.modules()]
    assert plain == [one.__name__ for one in classes]


def test_weights_in_training_and_modules_with_a_forward_of_their_own_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_model("llama").requires_grad_(False)
    first, second = base.model.layers
    first.input_layernorm.weight.requires_grad_()
    own = second.input_layernorm.forward
    second.input_layernorm.forward = lambda x: own(x)  # as offloading does
    with fused_modules(base):
        counts = counts_of(base, monkeypatch)
        base(input_ids=IDS).logits.sum().backward()
    assert first.input_layernorm.weight.grad is not None
    norms = sum(isinstance(module, nn.Module) and "Norm" in type(module).__name__ for module in base.modules())
    assert counts["rms_norm"] == norms - 2
