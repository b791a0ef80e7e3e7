"""Mixtures that gate their experts in each layer, beside rows of all other kinds: Arrow against PEFT's, others against
their formulas in float64."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex import (
    ArrowConfig,
    Engine,
    EngineConfig,
    LinearRouterConfig,
    MultiLoraModel,
    Request,
    SamplingParams,
    SpectrConfig,
    StaticRouterConfig,
    XLoraConfig,
)
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import AdapterNotFoundError, ConfigError, MixtureError, UnsupportedAdapterError
from loraplex.models.mixtures import AnyMixture
from loraplex.routers.router import LinearRouter
from tests.hook_oracle import Hook, hooked
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

MODELS = ("llama", "qwen2", "gemma2", "phi3", "gpt2", "gpt_neox")
EXPERTS = ("0", "1", "2", "3")
GENERAL = ("g0", "g1")
IDS = torch.randint(5, 60, (5, 14), generator=torch.Generator().manual_seed(3))
TOLERANCE = 1e-4  # of the logits' range

Score = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], str], Tensor]  # x, As, Bs, path -> [tokens, experts]


def write(name: str, folder: Path, *, r: int | None = None) -> dict[str, Path]:
    base = tiny_model(name)
    return {
        adapter: random_peft_adapter(base, folder / adapter, targets=linear_targets(name), seed=i, r=r or 2 + i)
        for i, adapter in enumerate((*EXPERTS, *GENERAL))
    }


def load(name: str, folders: Mapping[str, Path]) -> MultiLoraModel:
    model = MultiLoraModel(tiny_model(name))
    for adapter, folder in folders.items():
        model.load_adapter(adapter, folder)
    return model


def peft_arrow(name: str, folders: Mapping[str, Path], *, general: bool) -> Any:
    config = peft.tuners.lora.ArrowConfig(top_k=2, router_temperature=0.5, use_gks=general, rng_seed=0)
    return peft.tuners.lora.create_arrow_model(
        tiny_model(name),
        [str(folders[expert]) for expert in EXPERTS],
        config,
        [str(folders[adapter]) for adapter in GENERAL] if general else None,
    ).eval()


def requests_for(choices: Sequence[str | None], sampling: SamplingParams) -> list[Request]:
    return [Request(row, adapters=choice, sampling=sampling) for row, choice in zip(IDS.tolist(), choices, strict=True)]


def assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    difference = float((found - expected).abs().max() / (expected.max() - expected.min()))
    assert difference < TOLERANCE, f"{what}: {difference:.1e} of the range"


@torch.no_grad()
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_arrow_is_pefts_beside_other_rows(name: str, general: bool, tmp_path: Path) -> None:
    folders = write(name, tmp_path, r=4)
    oracle, model = peft_arrow(name, folders, general=general), load(name, folders)
    alone = model(IDS, adapters=[None] * 5).logits
    config = ArrowConfig(top_k=2, temperature=0.5, general_experts=GENERAL if general else ())
    model.create_mixture("arrow", EXPERTS, config)
    together = model(IDS, adapters=[None, "arrow", "1", "arrow", "0:0.5+2"]).logits
    expected = oracle(IDS).logits
    for row in (1, 3):
        assert_near(together[row], expected[row], f"row {row}")
        assert_near(model(IDS[row : row + 1], adapters=["arrow"]).logits[0], expected[row], f"row {row} alone")
    assert torch.equal(together[0], alone[0])
    plain = load(name, folders)
    assert_near(together[2], plain(IDS[2:3], adapters=["1"]).logits[0], "an expert by itself")
    assert_near(together[4], plain(IDS[4:5], adapters=["0:0.5+2"]).logits[0], "linked experts")


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_arrow_answers_as_peft_does_in_generate_and_engine(name: str, tmp_path: Path) -> None:
    folders = write(name, tmp_path, r=4)
    oracle, model = peft_arrow(name, folders, general=False), load(name, folders)
    model.create_mixture("arrow", EXPERTS, ArrowConfig(top_k=2, temperature=0.5))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    expected = [oracle.generate(IDS[r : r + 1], attention_mask=mask[:1], **options)[0, 14:].tolist() for r in range(5)]
    choices = ["arrow", None, "arrow", "0", "arrow"]
    for packed in (True, False):
        found = model.generate(IDS, attention_mask=mask, adapters=choices, packed=packed, **options)[:, 14:].tolist()
        assert [found[row] for row in (0, 2, 4)] == [expected[row] for row in (0, 2, 4)], f"packed={packed}"
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    with Engine(model, EngineConfig(max_step_tokens=8, block_tokens=4)) as engine:  # chunks, and then the prefix cache
        for _ in range(2):
            requests = requests_for(choices, sampling)
            results = engine.generate(requests)
            assert [list(results[row].token_ids) for row in (0, 2, 4)] == [expected[row] for row in (0, 2, 4)]
            assert all(result.error is None for result in results)


# Others, against a loop over tokens' gates in float64


class Loop:
    """A base model in float64 whose modules add the gated experts, one expert after the other."""

    def __init__(self, name: str, folders: Mapping[str, Path], score: Score) -> None:
        self.base = copy.deepcopy(tiny_model(name)).double()
        experts = [read_adapter(folders[expert]) for expert in EXPERTS]
        self._hooks = [(path, self._hook(path, [e.layers[path] for e in experts], score)) for path in experts[0].layers]

    @staticmethod
    def _hook(path: str, weights: Sequence[Any], score: Score) -> Hook:
        a = [each.lora_a.double() for each in weights]
        b = [each.lora_b.double().t() for each in weights]

        def add(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = args[0]
            gates = score(x.reshape(-1, x.shape[-1]), a, b, path).view(*x.shape[:-1], len(a))
            for i, each in enumerate(weights):
                y = y + gates[..., i : i + 1] * (x @ a[i].t() @ b[i].t()) * each.scaling
            return y

        return add

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        with hooked(self.base, self._hooks) as base:
            logits: Tensor = base(ids).logits
        return logits


def spectr_score(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], path: str) -> Tensor:
    scores = torch.stack(
        [torch.linalg.vector_norm(x @ ai.t() @ bi.t(), dim=-1) for ai, bi in zip(a, b, strict=True)], -1
    )
    return keep_three(scores, 0.7)


def keep_three(scores: Tensor, temperature: float) -> Tensor:
    gates = torch.zeros_like(scores)
    for token, row in enumerate(scores):
        best = row.argsort(descending=True)[:3]
        gates[token, best] = torch.softmax(row[best] / temperature, dim=0)
    return gates


def linear_score(mixture: AnyMixture, rule: Callable[[Tensor], Tensor]) -> Score:
    router = mixture.router
    assert isinstance(router, LinearRouter)
    place = {path: router.place[module] for module, path in zip(mixture.modules, mixture.layers, strict=True)}

    def score(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], path: str) -> Tensor:
        i = place[path]
        return torch.stack([rule(row) for row in x @ router.weights[i].double().t() + router.biases[i].double()])

    return score


def top_p(row: Tensor) -> Tensor:
    probabilities, kept, total = torch.softmax(row, dim=0), torch.zeros_like(row), 0.0
    for place in probabilities.argsort(descending=True).tolist():
        if total >= 0.6:
            break
        kept[place] = probabilities[place]
        total += float(probabilities[place])
    return kept / kept.sum()


LINEAR: Mapping[str, tuple[LinearRouterConfig, Callable[[Tensor], Tensor]]] = {
    "softmax": (LinearRouterConfig(temperature=2.0), lambda row: torch.softmax(row / 2, dim=0)),
    "top_k": (LinearRouterConfig(top_k=3), lambda row: keep_three(row[None], 1.0)[0]),
    "top_p": (LinearRouterConfig(top_p=0.6), top_p),
    "sigmoid": (LinearRouterConfig(activation="sigmoid"), torch.sigmoid),
    "shared": (LinearRouterConfig(shared=True), lambda row: torch.softmax(row, dim=0)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_spectr_is_its_formula_with_experts_of_any_rank(name: str, tmp_path: Path) -> None:
    folders = write(name, tmp_path)
    model = load(name, folders)
    model.create_mixture("spectr", EXPERTS, SpectrConfig(top_k=3, temperature=0.7))
    expected = Loop(name, folders, spectr_score).logits(IDS)
    together = model(IDS, adapters=["spectr", None, "spectr", "0", "spectr"]).logits
    for row in (0, 2, 4):
        assert_near(together[row].double(), expected[row], f"row {row}")


@torch.no_grad()
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_router_is_its_formula(kind: str, tmp_path: Path) -> None:
    config, rule = LINEAR[kind]
    folders = write("llama", tmp_path)
    model = load("llama", folders)
    model.create_mixture("linear", EXPERTS, config, seed=5)
    expected = Loop("llama", folders, linear_score(model.mixtures.get("linear"), rule)).logits(IDS)
    together = model(IDS, adapters=["linear", None, "0", "linear", None]).logits
    for row in (0, 3):
        assert_near(together[row].double(), expected[row], f"row {row}")


@torch.no_grad()
def test_static_gates_are_a_link(tmp_path: Path) -> None:
    model = load("llama", write("llama", tmp_path))
    model.create_mixture("static", EXPERTS, StaticRouterConfig(gates=(0.5, 0.0, -0.3, 0.25)))
    expected = model(IDS, adapters=["0:0.5+2:-0.3+3:0.25"] * 5).logits
    assert_near(model(IDS, adapters=["static"] * 5).logits, expected, "static")
    assert_near(
        model(IDS, adapters=["static:2"] * 5).logits, model(IDS, adapters=["0+2:-0.6+3:0.5"] * 5).logits, "twice"
    )


@torch.no_grad()
def test_all_kinds_of_rows_share_a_batch(tmp_path: Path) -> None:
    model = load("llama", write("llama", tmp_path))
    model.create_mixture("spectr", EXPERTS, SpectrConfig())
    model.create_mixture("arrow", ("1", "3"), ArrowConfig())
    model.create_mixture("xlora", EXPERTS, XLoraConfig(layerwise_scalings=True), seed=1)
    choices = ["spectr+arrow:0.5", "xlora", "arrow+0:0.3", None, "xlora:0.5+spectr"]
    together = model(IDS, adapters=choices, use_cache=False).logits
    for row, choice in enumerate(choices):
        alone = model(IDS[row : row + 1], adapters=[choice], use_cache=False).logits[0]
        assert_near(together[row], alone, f"row {row}, {choice}")
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    with Engine(model, EngineConfig()) as engine:
        requests = requests_for(choices, sampling)
        answers = [list(result.token_ids) for result in engine.generate(requests)]
        assert answers == [list(engine.generate([request])[0].token_ids) for request in requests]


def test_what_can_not_be_routed_is_refused(tmp_path: Path) -> None:
    base, targets = tiny_model("llama"), linear_targets("llama")
    model = load("llama", write("llama", tmp_path))
    dora = random_peft_adapter(base, tmp_path / "dora", targets=targets, options={"use_dora": True})
    embedding = random_peft_adapter(base, tmp_path / "embedding", targets=[*targets, "embed_tokens"])
    model.load_adapter("dora", dora)
    model.load_adapter("embedding", embedding)
    names = model.names()
    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        model.create_mixture("m", ("0", "dora"), SpectrConfig())
    with pytest.raises(UnsupportedAdapterError, match="embed_tokens"):
        model.create_mixture("m", ("0", "embedding"), SpectrConfig())
    with pytest.raises(ConfigError, match="2 experts"):
        model.create_mixture("m", ("0", "1", "2"), StaticRouterConfig(gates=(0.5, 0.5)))
    with pytest.raises(AdapterNotFoundError):
        model.create_mixture("m", ("0", "1"), ArrowConfig(general_experts=("unknown",)))
    with pytest.raises(MixtureError, match="different ranks"):
        model.create_mixture("m", ("0", "1"), ArrowConfig(general_experts=GENERAL))
    assert model.names() == names
    model.create_mixture("m", ("0", "1"), SpectrConfig())
    with pytest.raises(MixtureError, match="DoRA"):
        model.load_adapter("0", dora, replace=True)
    with pytest.raises(MixtureError, match="no scaling head"):
        model.configure_mixture("m", top_k_lora=1)


@torch.no_grad()
def test_prototypes_follow_an_expert_that_is_replaced(tmp_path: Path) -> None:
    folders = write("llama", tmp_path, r=4)
    model = load("llama", folders)
    model.create_mixture("arrow", EXPERTS, ArrowConfig(top_k=2, temperature=0.5))
    model(IDS, adapters=["arrow"] * 5)
    other = random_peft_adapter(tiny_model("llama"), tmp_path / "new", targets=linear_targets("llama"), seed=77, r=4)
    model.load_adapter("2", other, replace=True)
    expected = peft_arrow("llama", {**folders, "2": other}, general=False)(IDS).logits
    assert_near(model(IDS, adapters=["arrow"] * 5).logits, expected, "after the replacement")


def test_a_base_with_a_mixture_stays_as_it_was(tmp_path: Path) -> None:
    base: PreTrainedModel = tiny_model("llama")
    before = {path: parameter.clone() for path, parameter in base.named_parameters()}
    with MultiLoraModel(base) as model:
        for adapter, folder in write("llama", tmp_path).items():
            model.load_adapter(adapter, folder)
        model.create_mixture("arrow", EXPERTS, ArrowConfig())
        model(IDS, adapters=["arrow"] * 5)
        model.unload("arrow")
        assert model.names() == sorted((*EXPERTS, *GENERAL))
    assert all(torch.equal(parameter, before[path]) for path, parameter in base.named_parameters())
