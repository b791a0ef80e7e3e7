"""Models with adapters of every kind, requests for them, and what `generate` answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex import MultiLoraModel, StoreConfig, XLoraConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.residual.modules import FunctionResidual, ResidualContext
from loraplex.residual.registry import AttentionRequest
from loraplex.routing.adapter_spec import AdapterSpec
from tests.residual.tiny_residuals import random_linked, random_vector
from tests.tiny_models import VOCAB_SIZE, embedding_target, linear_targets, random_peft_adapter, tiny_model

INVOCATION = [5, 6]
# Two answers may differ where the best two logits are this close, of the logits' range.
TIE = 1e-4
CHOICES: tuple[AdapterSpec, ...] = (
    None,
    "0",
    "1",
    "0:0.5+2:0.7",
    "alora",
    "science",
    "second",
    "science+0:0.3",
    "science:0.5+second",
    "2",
)
# With residuals: trained ones of several ranks and layers, vectors, functions, beside LoRAs and mixtures.
LINKED_CHOICES: tuple[AdapterSpec, ...] = (
    "ra",
    "rb:0.5+ra",
    "0+ra:0.5",
    "science+rb+ra",
    "second:0.5+v",
    "v",
    "f",
    "ra+f:0.5+v",
    "alora+rb:-0.5",
)


@dataclass(frozen=True)
class Prompted:
    """A prompt and its adapters."""

    prompt: tuple[int, ...]
    adapters: AdapterSpec

    def request(self, **sampling: object) -> Request:
        return Request(self.prompt, adapters=self.adapters, sampling=SamplingParams(**sampling))

    def asking(self, num_tokens: int, **asked: object) -> Request:
        """The same, with other fields of the request."""
        return Request(self.prompt, adapters=self.adapters, sampling=SamplingParams(max_tokens=num_tokens), **asked)


def write_adapters(name: str, folder: Path) -> dict[str, Path]:
    """Adapters of different ranks and targets, one of them an aLoRA."""
    base, linears = tiny_model(name), linear_targets(name)
    everywhere = [*linears, embedding_target(name), "embed_out" if name == "gpt_neox" else "lm_head"]
    targets = {"0": linears, "1": everywhere, "2": linears[:2]}
    folders = {
        adapter: random_peft_adapter(base, folder / adapter, targets=modules, seed=seed, r=2 + seed)
        for seed, (adapter, modules) in enumerate(targets.items(), 1)
    }
    options = {"alora_invocation_tokens": INVOCATION}
    folders["alora"] = random_peft_adapter(base, folder / "alora", targets=linears, seed=9, options=options)
    return folders


def make_model(name: str, folders: dict[str, Path], *, mixtures: bool = True, **store: int) -> MultiLoraModel:
    """A tiny model with all of them, and a mixture of each kind of scaling pass."""
    model = MultiLoraModel(tiny_model(name), store=StoreConfig(**store))
    for adapter, folder in folders.items():
        model.load_adapter(adapter, folder)
    if not mixtures:
        return model
    model.create_mixture("science", ["0", "1", "2"], XLoraConfig(layerwise_scalings=True, xlora_depth=2, xlora_size=16))
    model.create_mixture("second", ["2", "0"], XLoraConfig(scaling_pass_value=0.5, top_k_lora=1), seed=1)
    return model


def add_residuals(model: MultiLoraModel) -> MultiLoraModel:
    """The same model with the residuals that LINKED_CHOICES name."""
    layers = model.registry.linked.layers
    model.load_residual("ra", random_linked(layers, 1, r=3))
    model.load_residual("rb", random_linked(layers, 2, r=11, at=[1]))
    model.load_residual("v", random_vector(layers, 3))
    model.load_residual("f", FunctionResidual(function=_damped))
    return model


def _damped(hidden: torch.Tensor, attention: torch.Tensor, context: ResidualContext) -> torch.Tensor:
    """Depends on a token's hidden state and on how much it attends to itself."""
    own = attention[:, torch.arange(len(hidden)), context.first_position + torch.arange(len(hidden))]  # [heads, tokens]
    return hidden * own.mean(dim=0).unsqueeze(1)


def prompts(lengths: Sequence[int], choices: Sequence[AdapterSpec] = CHOICES, seed: int = 0) -> list[Prompted]:
    """One random prompt for each choice; an aLoRA's has its invocation in it."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, choice in enumerate(choices):
        prompt = torch.randint(7, VOCAB_SIZE, (lengths[i % len(lengths)],), generator=generator).tolist()
        if choice == "alora" and len(prompt) > 4:
            prompt[len(prompt) // 2 : len(prompt) // 2 + 2] = INVOCATION
        made.append(Prompted(tuple(prompt), choice))
    return made


def answer(
    model: MultiLoraModel, prompted: Prompted, num_tokens: int, attention: AttentionRequest | None = None
) -> tuple[int, ...]:
    """The greedy answer of transformers' generate, alone."""
    ids = torch.tensor([prompted.prompt])
    out = model.generate(
        ids,
        packed=False,
        attention_mask=torch.ones_like(ids),
        adapters=[prompted.adapters],
        attention=attention,
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    return tuple(out[0, ids.shape[1] :].tolist())


def assert_same(
    model: MultiLoraModel,
    prompted: Prompted,
    result: RequestResult,
    expected: tuple[int, ...],
    attention: AttentionRequest | None = None,
) -> None:
    """The tokens are `expected` up to where the two best logits are equal within TIE."""
    assert result.error is None, f"{prompted.adapters}: {result.error}"
    if result.token_ids == expected:
        return
    pairs = zip(result.token_ids, expected, strict=False)
    place = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    assert place is not None, f"{prompted.adapters}: {len(result.token_ids)} tokens instead of {len(expected)}"
    ids = torch.tensor([[*prompted.prompt, *expected[:place]]])
    with torch.no_grad():
        logits = model(ids, adapters=[prompted.adapters], attention=attention).logits[0, -1]
    gap = (logits[expected[place]] - logits[result.token_ids[place]]).abs() / (logits.max() - logits.min())
    assert gap < TIE, f"{prompted.adapters}: token {place} differs, logits apart by {gap:.1e} of their range"


def module_by_module(
    engine: Engine, module: torch.nn.Module, requests: Sequence[Request], calls: list[int]
) -> list[RequestResult]:
    """Answers where somebody's hook wants to see a module of a layer run, so that no layer is in a compiled call."""
    calls.clear()
    handle = module.register_forward_hook(lambda module, args, out: None)
    try:
        results = engine.generate(requests)
    finally:
        handle.remove()
    assert calls == [], "a layer ran in a compiled call"
    return results
