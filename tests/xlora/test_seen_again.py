"""Mixtures on models whose modules see past tokens again, keep another state, or give positions another layout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import RequestError
from loraplex.layers.base.decoder import find_decoder
from tests.architectures.variants import make_model
from tests.hook_oracle import HookOracle
from tests.parity.oracle import assert_close
from tests.tiny_models import random_peft_adapter
from tests.xlora.mixed_model import sharpen

EXPERTS = ("0", "1")
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


class MixtureOracle:
    """A mixture on one row alone, without a cache: a pass of the base model, the head, a pass with the experts."""

    def __init__(self, name: str, model: MultiLoraModel, folders: dict[str, Path]) -> None:
        self.hooks = HookOracle(make_model(name))
        self.mixture = model.mixtures.get("science")
        self.experts = {expert: read_adapter(path) for expert, path in folders.items()}

    def logits(self, ids: Tensor) -> Tensor:  # [tokens] -> [tokens, vocab]
        hidden = find_decoder(self.hooks.base)(input_ids=ids[None], use_cache=False).last_hidden_state
        scalings = self.mixture.head(hidden)[0]  # [tokens, layers, experts]

        def gate(expert: int):
            def of(path: str, x: Tensor) -> Tensor:
                return scalings[:, self.mixture.layers.index(path), expert].view(*x.shape[:-1], 1)

            return of

        adapters = {name: (adapter, gate(i)) for i, (name, adapter) in enumerate(self.experts.items())}
        with self.hooks.adapted(adapters) as base:
            return base(input_ids=ids[None], use_cache=False).logits[0]

    def generate(self, ids: Tensor, num_tokens: int) -> Tensor:
        for _ in range(num_tokens):
            ids = torch.cat([ids, self.logits(ids)[-1:].argmax(dim=-1)])
        return ids


def mixed(name: str, folder: Path, targets: object = "all-linear", **config: object):
    base = make_model(name)
    folders = {
        expert: random_peft_adapter(base, folder / expert, targets=targets, seed=i, r=2 + i)
        for i, expert in enumerate(EXPERTS)
    }
    model = MultiLoraModel(base)
    for expert, path in folders.items():
        model.load_adapter(expert, path)
    model.create_mixture("science", EXPERTS, XLoraConfig(layerwise_scalings=True, **config), seed=1)
    sharpen(model, "science")
    return model, MixtureOracle(name, model, folders)


def prompts(num_rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(20, 110, (num_rows, length), generator=torch.Generator().manual_seed(3))


LATENT = ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_proj"]


@pytest.fixture(scope="module", params=["deepseek_v3", "minicpm3", "longcat_flash", "doge"])
def latent(request, tmp_path_factory):
    targets = [*LATENT, "dt_proj"] if request.param == "doge" else LATENT
    return mixed(request.param, tmp_path_factory.mktemp(request.param), targets)


@pytest.mark.parametrize("draft", [False, True])
@torch.no_grad()
def test_cached_generation_of_latent_attention_equals_whole_passes(latent, draft):
    model, oracle = latent
    assert model.mixtures.cache_use.sees_past
    ids = prompts()
    options = {**OPTIONS, "output_logits": True, "return_dict_in_generate": True, "draft": draft}
    out = model.generate(
        ids, torch.ones_like(ids), adapters=["science", None, "science:0.5+0"], **options, packed=False
    )
    assert torch.equal(out.sequences[0], oracle.generate(ids[0], 5))
    whole = oracle.logits(out.sequences[0])
    for step, logits in enumerate(out.logits):
        assert_close(logits[0], whole[6 + step], f"step {step}")
    assert torch.equal(out.sequences[1:2], oracle.hooks.base.generate(ids[1:2], use_cache=False, **OPTIONS))


@torch.no_grad()
def test_beams_of_latent_attention_keep_their_own_gates(latent):
    model, _ = latent
    ids, rows = prompts(), ["science", None, "science"]
    options = {**OPTIONS, "num_beams": 3}
    cached = model.generate(ids, torch.ones_like(ids), adapters=rows, **options, packed=False)
    assert torch.equal(
        cached, model.generate(ids, torch.ones_like(ids), adapters=rows, use_cache=False, **options, packed=False)
    )


@torch.no_grad()
def test_going_on_from_a_returned_cache_keeps_the_gates(latent):
    model, oracle = latent
    ids, rows = prompts(), ["science", None, "science"]
    out = model(ids[:, :4], adapters=rows, use_cache=True)
    later = model(ids[:, 4:], adapters=rows, past_key_values=out.past_key_values)
    out.past_key_values.crop(-2)
    again = model(ids[:, 5:], adapters=rows, past_key_values=out.past_key_values)
    for row in (0, 2):
        assert_close(later.logits[row], oracle.logits(ids[row])[4:], f"row {row}")
        assert_close(again.logits[row], oracle.logits(ids[row])[5:], f"row {row}, again")


@torch.no_grad()
def test_scaling_pass_with_experts_sees_past_tokens_too(tmp_path):
    model, _ = mixed("deepseek_v3", tmp_path, LATENT, scaling_pass_value=0.5)
    ids, rows = prompts(), ["science", None, "science"]
    cached = model.generate(ids, adapters=rows, **OPTIONS, packed=False)
    assert torch.equal(cached, model.generate(ids, adapters=rows, use_cache=False, **OPTIONS, packed=False))


@pytest.mark.parametrize("name", ["vlm-qwen2_5_vl", "modernbert-decoder"])
@torch.no_grad()
def test_mixtures_where_positions_or_outputs_have_another_form(name, tmp_path):
    model, oracle = mixed(name, tmp_path, ["q_proj", "v_proj", "o_proj"])
    ids = prompts()
    tokens = model.generate(ids, torch.ones_like(ids), adapters=["science", None, "science"], **OPTIONS, packed=False)
    for row in (0, 2):
        assert torch.equal(tokens[row], oracle.generate(ids[row], 5)), f"row {row}"


@pytest.mark.parametrize("name", ["rwkv", "llama4_text"])
@torch.no_grad()
def test_mixture_on_a_model_that_keeps_another_state_is_refused_with_a_cache_and_right_without(name, tmp_path):
    targets = ["key", "value", "output"] if name == "rwkv" else ["q_proj", "v_proj"]
    model, oracle = mixed(name, tmp_path, targets)
    ids, rows = prompts(), ["science", None, "science"]
    with pytest.raises(RequestError, match="use_cache=False"):
        model.generate(ids, adapters=rows, **OPTIONS, packed=False)
    tokens = model.generate(ids, torch.ones_like(ids), adapters=rows, use_cache=False, **OPTIONS, packed=False)
    assert torch.equal(tokens[0], oracle.generate(ids[0], 5))


@torch.no_grad()
def test_images_beside_a_mixture_are_refused(tmp_path):
    model, _ = mixed("vlm-gemma3", tmp_path, r".*language_model.*q_proj")
    ids = prompts(1)
    with pytest.raises(RequestError, match="pixel_values"):
        model(ids, adapters=["science"], pixel_values=torch.zeros(1, 3, 28, 28))
