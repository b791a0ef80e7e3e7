"""Linking adapters into one: what is refused, and what is written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.linking import modules
from loraplex.adapters.linking.adapter import link_adapters
from loraplex.adapters.linking.combination import Combination
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.record import write_record
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import (
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    BaseModelMismatchError,
    ConfigError,
    LinkSyntaxError,
    LoraplexError,
    RequestError,
    TooLargeError,
    UnsupportedAdapterError,
)
from loraplex.models.convert.linking import save_linked
from tests.adapters.folders import LAYER, lora_pair, two_modules, write_folder

MAGNITUDES = {f"{LAYER}.{name}.lora_magnitude_vector": torch.rand(24) for name in ("q_proj", "v_proj")}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: write_folder(tmp_path / name) for name in "ab"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "mean"}, ["'mean'", "'ties_svd'"]),
        ({"method": "ties"}, ["'ties'", "density"]),
        ({"method": "ties", "density": 0}, ["density is 0", "above 0"]),
        ({"method": "dare_ties", "density": float("nan")}, ["density is nan"]),
        ({"method": "linear", "density": 0.5}, ["density is 0.5", "'linear'"]),
        ({"method": "cat", "rank": 4}, ["rank is 4", "'cat'"]),
        ({"method": "svd", "rank": 0}, ["rank is 0"]),
        ({"method": "svd", "majority_sign": "total"}, ["majority_sign", "'svd'"]),
        ({"method": "ties", "density": 0.5, "majority_sign": "most"}, ["'most'", "'frequency'"]),
        ({"method": "cat", "seed": -1}, ["seed is -1"]),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Combination(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        ({"use_dora": True}, {**two_modules(), **MAGNITUDES}, ["'b'", "use_dora", "loraplex merge"]),
        ({"alora_invocation_tokens": [5]}, two_modules(), ["'b'", "alora_invocation_tokens"]),
        ({"modules_to_save": ["lm_head"]}, two_modules(), ["modules_to_save"]),
        ({"lora_bias": True}, two_modules(), ["lora_bias"]),
    ],
)
def test_what_one_plain_lora_cannot_be_is_refused_by_name(
    tmp_path: Path, folders: dict[str, Path], settings: dict[str, Any], tensors: dict[str, Any], words: list[str]
) -> None:
    write_folder(folders["b"], settings, tensors)
    assert_refused(tmp_path, folders, UnsupportedAdapterError, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "XLORA"}, ["'b'", "a mixture"]),
        (None, ["'b'", "a residual"]),
    ],
)
def test_mixtures_and_residuals_are_refused_by_name(
    tmp_path: Path, folders: dict[str, Path], settings: dict[str, Any] | None, words: list[str]
) -> None:
    if settings is None:
        (folders["b"] / "residual_config.json").write_text("{}")
    else:
        write_folder(folders["b"], settings)
    assert_refused(tmp_path, folders, UnsupportedAdapterError, words)


def test_parts_of_an_adapter_that_nobody_knows_are_refused_by_name() -> None:
    """Whatever an adapter may carry one day: it is not left out."""

    @dataclass(frozen=True, kw_only=True)
    class WithBias(LoraWeights):
        bias: torch.Tensor | None = None

    @dataclass(frozen=True, kw_only=True)
    class WithRows(Adapter):
        token_rows: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def adapter(bias: torch.Tensor | None = None, **rows: torch.Tensor) -> Adapter:
        factors = {"lora_a": torch.ones(8, 4), "lora_b": torch.ones(8, 6)}
        layers = {"m": WithBias(kind="linear", scaling=1.0, bias=bias, **factors)}
        return WithRows(config=LoraConfig(target_modules=("m",)), layers=layers, token_rows=rows)

    assert link_adapters([("a", 1.0, adapter())]).layers.keys() == {"m"}
    for whole, name in ((adapter(bias=torch.ones(6)), "'bias'"), (adapter(embed=torch.ones(2)), "'token_rows'")):
        with pytest.raises(UnsupportedAdapterError, match=name):
            link_adapters([("a", 1.0, whole)])


def test_adapters_of_different_bases_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    write_folder(folders["b"], {"base_model_name_or_path": "tiny/other"})
    assert_refused(tmp_path, folders, BaseModelMismatchError, ["'tiny/llama'", "'tiny/other'"])
    write_folder(folders["b"], tensors=lora_pair(f"{LAYER}.q_proj", out_features=8) | lora_pair(f"{LAYER}.v_proj"))
    assert_refused(tmp_path, folders, BaseModelMismatchError, ["q_proj", "out_features=8", "out_features=24"])


def test_an_adapter_that_does_not_say_its_base_is_taken(tmp_path: Path, folders: dict[str, Path]) -> None:
    write_folder(folders["a"], {"base_model_name_or_path": None})
    linked = save_linked("a+b", tmp_path / "linked", folders)
    assert linked.config.base_model_name_or_path == "tiny/llama"


def test_different_ranks_are_refused_where_factors_are_added(tmp_path: Path, folders: dict[str, Path]) -> None:
    pairs = {name: lora_pair(f"{LAYER}.{name}", rank=2) for name in ("q_proj", "v_proj")}
    write_folder(folders["b"], {"r": 2}, pairs["q_proj"] | pairs["v_proj"])
    assert_refused(
        tmp_path, folders, ConfigError, ["'linear'", "q_proj", "[4, 2]", "'cat'"], Combination(method="linear")
    )


def test_pruning_one_adapter_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="for several adapters"):
        save_linked("a", tmp_path / "linked", {"a": folders["a"]}, Combination(method="ties", density=0.5))


def test_updates_too_large_to_be_formed_are_refused(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "MAX_UPDATE_VALUES", 2 * 16 * 24 - 1)
    save_linked("a+b", tmp_path / "svd", folders, Combination(method="svd"))
    words = ["q_proj", "16 -> 24", "'svd'"]
    assert_refused(tmp_path, folders, TooLargeError, words, Combination(method="ties_svd", density=0.5))


def test_a_rank_that_no_base_would_take_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    pairs = {name: lora_pair(f"{LAYER}.{name}", rank=600) for name in ("q_proj", "v_proj")}
    for folder in folders.values():
        write_folder(folder, {"r": 600}, pairs["q_proj"] | pairs["v_proj"])
    assert_refused(tmp_path, folders, AdapterFormatError, ["1200", "q_proj"])
    assert (
        save_linked("a+b", tmp_path / "svd", folders, Combination(method="svd"))
        .layers["model.layers.0.self_attn.q_proj"]
        .rank
        == 16
    )


@pytest.mark.parametrize(
    ("link", "error"),
    [
        ("a+", LinkSyntaxError),
        ("a+a", LinkSyntaxError),
        ("a", RequestError),  # b is not in it
        ("a+b+c", AdapterNotFoundError),
        (None, RequestError),
    ],
)
def test_wrong_links_are_refused(
    tmp_path: Path, folders: dict[str, Path], link: str | None, error: type[LoraplexError]
) -> None:
    with pytest.raises(error):
        save_linked(link, tmp_path / "linked", folders)
    assert not (tmp_path / "linked").exists()


def test_a_folder_that_is_there_is_replaced_only_on_request(tmp_path: Path, folders: dict[str, Path]) -> None:
    save_linked("a+b", tmp_path / "linked", folders)
    before = (tmp_path / "linked" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterExistsError):
        save_linked("a+b:2", tmp_path / "linked", folders)
    assert (tmp_path / "linked" / "adapter_model.safetensors").read_bytes() == before
    save_linked("a+b:2", tmp_path / "linked", folders, overwrite=True)
    assert (tmp_path / "linked" / "adapter_model.safetensors").read_bytes() != before
    (tmp_path / "linked" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterExistsError, match="notes"):
        save_linked("a+b", tmp_path / "linked", folders, overwrite=True)


def test_settings_name_exactly_the_modules_and_their_ranks(tmp_path: Path) -> None:
    deeper = "base_model.model.model.layers.1.self_attn"
    write_folder(tmp_path / "a", tensors=two_modules())
    targets = {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]}
    write_folder(tmp_path / "b", targets, lora_pair(f"{LAYER}.q_proj") | lora_pair(f"{deeper}.k_proj"))
    save_linked("a+b", tmp_path / "linked", {name: tmp_path / name for name in "ab"})
    settings = json.loads((tmp_path / "linked" / "adapter_config.json").read_text())
    paths = [f"model.layers.{layer}.self_attn.{name}" for layer, name in ((0, "q_proj"), (0, "v_proj"), (1, "k_proj"))]
    assert settings["target_modules"] == paths
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (4, 4, False)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {"q_proj": 8}
    assert {path: weights.rank for path, weights in read_adapter(tmp_path / "linked").layers.items()} == dict(
        zip(paths, (8, 4, 4), strict=True)
    )


def test_modules_of_one_name_with_several_ranks_keep_theirs(tmp_path: Path) -> None:
    paths = ["layers.0.q_proj", "model.layers.0.q_proj", "layers.1.q_proj"]  # the first is the end of the second
    pairs = {path: lora_pair(f"base_model.model.{path}") for path in paths}
    targets = {"target_modules": ["q_proj"]}
    write_folder(tmp_path / "a", targets, pairs[paths[0]] | pairs[paths[1]] | pairs[paths[2]])
    write_folder(tmp_path / "b", {"target_modules": paths[:1]}, lora_pair(f"base_model.model.{paths[0]}"))
    save_linked("a+b", tmp_path / "linked", {name: tmp_path / name for name in "ab"})
    ranks = {path: weights.rank for path, weights in read_adapter(tmp_path / "linked").layers.items()}
    assert ranks == dict(zip(paths, (8, 4, 4), strict=True))


def test_shared_settings_are_kept(tmp_path: Path, folders: dict[str, Path]) -> None:
    linked = save_linked("a+b", tmp_path / "linked", folders)
    assert linked.config.target_modules == ("q_proj", "v_proj")


def test_end_tokens_of_all_end_answers(tmp_path: Path, folders: dict[str, Path]) -> None:
    for name, tokens in (("a", (2, 5)), ("b", (5, 9))):
        write_record(folders[name], tokens)
    save_linked("b+a", tmp_path / "linked", folders)
    assert read_adapter(tmp_path / "linked").end_tokens == (5, 9, 2)


def test_sixteen_bit_adapters_are_added_in_float32(tmp_path: Path) -> None:
    tensors = {name: {key: value.bfloat16() for key, value in two_modules().items()} for name in "ab"}
    folders = {name: write_folder(tmp_path / name, tensors=tensors[name]) for name in "ab"}
    weights = save_linked("a:0.7+b:0.3", tmp_path / "linked", folders).layers["model.layers.0.self_attn.q_proj"]
    assert weights.lora_a.dtype == torch.float32
    key = f"{LAYER}.q_proj.lora_A.weight"
    assert torch.equal(weights.lora_a[:4], (tensors["a"][key].double() * (0.7 * 2)).float())  # rounded once
    assert not torch.equal(weights.lora_a, weights.lora_a.bfloat16().float())
    save_linked("a:0.7+b:0.3", tmp_path / "short", folders, dtype=torch.bfloat16)
    assert read_adapter(tmp_path / "short").layers["model.layers.0.self_attn.q_proj"].lora_a.dtype == torch.bfloat16


def test_the_seed_decides_what_dare_leaves_out(tmp_path: Path, folders: dict[str, Path]) -> None:
    def run(name: str, seed: int) -> torch.Tensor:
        combination = Combination(method="dare_linear", density=0.5, seed=seed)
        linked = save_linked("a+b", tmp_path / name, folders, combination)
        return torch.cat([weights.lora_a for weights in linked.layers.values()])

    assert torch.equal(run("first", 3), run("again", 3))
    assert not torch.equal(run("once more", 3), run("other", 4))


def assert_refused(
    tmp_path: Path,
    folders: dict[str, Path],
    error: type[LoraplexError],
    words: list[str],
    combination: Combination | None = None,
) -> None:
    with pytest.raises(error) as caught:
        save_linked("a+b", tmp_path / "linked", folders, combination)
    assert type(caught.value) is error
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "linked").exists()
