"""One adapter made of several: against PEFT's `add_weighted_adapter`, module by module, and against the link itself."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft.tuners.lora.model as peft_lora
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from loraplex import MultiLoraModel
from loraplex.adapters.linking.combination import METHODS, Combination
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.weights import Adapter
from loraplex.models.convert.linking import save_linked
from tests.parity.oracle import PeftOracle, assert_close, padded_batch
from tests.tiny_models import VOCAB_SIZE, embedding_target, linear_targets, random_peft_adapter, tiny_model

SEED = 7
TOLERANCE = 1e-5  # of a module's largest change
# The same rank everywhere, another alpha, and modules that only one has; PEFT goes through them in this order too.
EQUAL_RANKS: Mapping[str, dict[str, Any]] = {
    "a": {"targets": ["q_proj", "v_proj"], "lora_alpha": 6},
    "b": {"targets": ["v_proj"], "lora_alpha": 16, "options": {"alpha_pattern": {r"layers\.0\..*v_proj": 3}}},
}
OTHER_RANKS: Mapping[str, dict[str, Any]] = {
    "a": {"targets": ["q_proj", "v_proj", "embed_tokens"], "r": 3, "options": {"rank_pattern": {"v_proj": 5}}},
    "b": {
        "targets": ["v_proj", "down_proj", "embed_tokens", "lm_head"],
        "r": 8,
        "options": {"use_rslora": True, "alpha_pattern": {"layers.1.mlp.down_proj": 2}},
    },
}


def write_adapters(folder: Path, settings: Mapping[str, dict[str, Any]]) -> dict[str, Path]:
    base = tiny_model("llama")
    return {
        name: random_peft_adapter(base, folder / name, seed=seed, **options)
        for seed, (name, options) in enumerate(settings.items(), start=1)
    }


def options_of(method: str, **options: Any) -> Combination:
    """The method, with a density where it needs one."""
    if method.removesuffix("_svd") not in ("cat", "linear", "svd"):
        options = {"density": 0.6, **options}
    return Combination(method=method, seed=SEED, **options)


def by_peft(
    folders: Mapping[str, Path], weights: Sequence[float], combination: Combination, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """By module path, the update [out, in] of PEFT's linked adapter."""
    model = PeftOracle(tiny_model("llama"), folders).model
    # PEFT draws from torch's own generator, after the new adapter's random start: this is called between the two.
    monkeypatch.setattr(peft_lora, "_freeze_adapter", lambda *_: torch.manual_seed(combination.seed))
    model.add_weighted_adapter(
        list(folders),
        list(weights),
        "linked",
        combination_type=combination.method,
        svd_rank=combination.rank,
        density=combination.density,
        majority_sign_method=combination.majority_sign or "total",
    )
    updates = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, peft_lora.LoraLayer) and "linked" in module.scaling:
            update = module.get_delta_weight("linked").detach()
            updates[path] = update.t() if "linked" in module.lora_embedding_A else update
    return updates


def updates_of(adapter: Adapter) -> dict[str, Tensor]:
    return {
        path: weights.scaling * weights.lora_b.double().t() @ weights.lora_a.double()
        for path, weights in adapter.layers.items()
    }


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, update in expected.items():
        error = (found[path] - update.double()).abs().max().item()
        assert error <= TOLERANCE * update.abs().max().item(), f"{path}: off by {error:.2e}"


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.4)])
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_gives_what_peft_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, weights: tuple[float, float]
) -> None:
    folders = write_adapters(tmp_path, EQUAL_RANKS)
    combination = options_of(method)
    link = list(zip(folders, weights, strict=True))
    save_linked(link, tmp_path / "linked", folders, combination)
    assert_equal(updates_of(read_adapter(tmp_path / "linked")), by_peft(folders, weights, combination, monkeypatch))


@pytest.mark.parametrize("method", ["cat", *(method for method in METHODS if method.endswith("svd"))])
def test_ranks_patterns_embeddings_and_rslora_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    settings = copy.deepcopy(dict(OTHER_RANKS))
    if "dare" in method:  # whose random numbers come in another order of modules
        settings["a"]["targets"], settings["b"]["targets"] = ["q_proj", "v_proj"], ["v_proj"]
    folders = write_adapters(tmp_path, settings)
    combination = options_of(method, **({} if method == "cat" else {"rank": 6}))
    linked = save_linked("a:0.8+b:-1.2", tmp_path / "linked", folders, combination)
    assert_equal(updates_of(linked), by_peft(folders, (0.8, -1.2), combination, monkeypatch))


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("method", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_signs_are_elected_as_by_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, majority_sign: str
) -> None:
    folders = write_adapters(tmp_path, {name: {"targets": ["q_proj", "v_proj"]} for name in "abc"})
    combination = options_of(method, majority_sign=majority_sign)
    linked = save_linked("a:0.5+b:0.3+c:-0.2", tmp_path / "linked", folders, combination)
    assert_equal(updates_of(linked), by_peft(folders, (0.5, 0.3, -0.2), combination, monkeypatch))


def test_the_two_ways_to_elect_signs_differ(tmp_path: Path) -> None:
    folders = write_adapters(tmp_path, {name: {"targets": ["q_proj"]} for name in "abc"})
    found = [
        updates_of(save_linked("a+b+c", tmp_path / sign, folders, options_of("ties", majority_sign=sign)))
        for sign in ("total", "frequency")
    ]
    assert any(not torch.allclose(found[0][path], found[1][path]) for path in found[0])


def test_modules_of_equal_rank_by_pattern_are_added_though_their_adapters_largest_ranks_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"rank_pattern": {"v_proj": 2}}
    folders = write_adapters(tmp_path, {name: {"targets": ["q_proj", "v_proj"], "options": options} for name in "ab"})
    linked = save_linked("a:0.5+b:0.5", tmp_path / "linked", folders, options_of("ties"))
    assert_equal(updates_of(linked), by_peft(folders, (0.5, 0.5), options_of("ties"), monkeypatch))
    assert {path[-6:]: weights.rank for path, weights in linked.layers.items()} == {"q_proj": 4, "v_proj": 2}


def test_first_adapter_with_rslora_is_scaled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT keeps use_rslora of the first adapter with an alpha that is the rank: its result is sqrt(rank) too large."""
    options = {"use_rslora": True}
    folders = write_adapters(tmp_path, {"a": {"targets": ["q_proj"], "options": options}, "b": {"targets": ["q_proj"]}})
    linked = save_linked("a:0.5+b:2", tmp_path / "linked", folders)
    parts = [updates_of(read_adapter(folder)) for folder in folders.values()]
    assert_equal(updates_of(linked), {path: 0.5 * parts[0][path] + 2 * parts[1][path] for path in parts[0]})
    of_peft = by_peft(folders, (0.5, 2), Combination(), monkeypatch)
    assert_equal({path: update * 8**0.5 for path, update in updates_of(linked).items()}, of_peft)


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_one_adapter_with_a_weight_is_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    folders = write_adapters(tmp_path, {"a": EQUAL_RANKS["a"]})
    linked = save_linked("a:-0.3", tmp_path / "linked", folders, options_of(method))
    assert_equal(updates_of(linked), by_peft(folders, (-0.3,), options_of(method), monkeypatch))


def test_svd_of_enough_rank_is_the_link_and_of_less_the_closest_to_it(tmp_path: Path) -> None:
    folders = write_adapters(tmp_path, {name: {"targets": ["q_proj"]} for name in "ab"})
    exact = updates_of(save_linked("a:0.7+b:0.3", tmp_path / "cat", folders))
    whole = updates_of(save_linked("a:0.7+b:0.3", tmp_path / "svd8", folders, options_of("svd", rank=8)))
    assert_equal(whole, exact)
    less = save_linked("a:0.7+b:0.3", tmp_path / "svd3", folders, options_of("svd", rank=3))
    for path, update in updates_of(less).items():
        left_out = torch.linalg.svdvals(exact[path])[3:]
        assert less.layers[path].rank == 3
        assert torch.linalg.norm(update - exact[path]).item() == pytest.approx(left_out.norm().item(), rel=1e-4)


def test_a_cat_folder_is_the_link_for_peft_and_for_loraplex(tmp_path: Path) -> None:
    base = tiny_model("llama")
    targets = [*linear_targets("llama"), embedding_target("llama")]
    folders = write_adapters(
        tmp_path,
        {"a": {"targets": targets, "r": 3}, "b": {"targets": ["q_proj", "lm_head"], "r": 6, "lora_alpha": 5}},
    )
    link = "a:0.7+b:-1.3"
    save_linked(link, tmp_path / "linked", folders)
    ids, mask = padded_batch(2, 9, "left", VOCAB_SIZE)
    with MultiLoraModel(copy.deepcopy(base)) as model:
        for name, folder in {**folders, "linked": tmp_path / "linked"}.items():
            model.load_adapter(name, folder)
        served, linked = model(
            ids.repeat(2, 1), mask.repeat(2, 1), adapters=[link, link, "linked", "linked"]
        ).logits.chunk(2)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "linked")).eval()
    with torch.no_grad():
        of_peft = theirs(input_ids=ids, attention_mask=mask).logits
    assert_close(linked[mask.bool()], served[mask.bool()], "loraplex")
    assert_close(of_peft[mask.bool()], served[mask.bool()], "PEFT")
