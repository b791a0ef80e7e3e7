"""What adapters bring beside factors and can't be served is refused by name, and nothing that is loaded changes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex import EngineConfig, MultiLoraModel, StoreConfig, XLoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import (
    AdapterChangedError,
    AdapterError,
    AdapterFormatError,
    BaseModelMismatchError,
    MixtureError,
    RequestError,
    UnsupportedAdapterError,
)
from tests.parity.content_adapters import base_model, content_adapter, prompts, resized
from tests.server.tiny_server import character_tokenizer
from tests.tiny_models import VOCAB_SIZE

PREFIX = "base_model.model."
HEAD, EMBEDDING = f"{PREFIX}lm_head.weight", f"{PREFIX}model.embed_tokens.weight"
TARGETS = ["q_proj", "v_proj"]


def changed(folder: Path, tensors: dict[str, Tensor | None], **settings: Any) -> Path:
    """A folder with other tensors (None: without them) and settings."""
    own = load_file(folder / "adapter_model.safetensors") | tensors
    save_file({name: t for name, t in own.items() if t is not None}, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> MultiLoraModel:
    model = MultiLoraModel(base_model("llama"))
    model.load_adapter("kept", content_adapter(base_model("llama"), tmp_path / "kept", targets=TARGETS))
    return model


def assert_refused(model: MultiLoraModel, folder: Path, error: type[AdapterError], words: str) -> None:
    ids = prompts(1)
    before = model(ids, adapters=["kept"]).logits
    with pytest.raises(error, match=words):
        model.load_adapter("new", folder)
    assert model.names() == ["kept"]
    assert model(ids, adapters=["kept"]).logits.equal(before)


SAVED = {"modules_to_save": ["lm_head"]}
ROWS = {"trainable_token_indices": [5, 6]}
DELTA = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
REFUSED: list[tuple[dict[str, Any], dict[str, Tensor | None], dict[str, Any], type[AdapterError], str]] = [
    (SAVED, {HEAD: None}, {}, AdapterFormatError, r"modules_to_save is \['lm_head'\], but the file has no 'lm_head"),
    (SAVED, {HEAD: torch.zeros(VOCAB_SIZE, 63)}, {}, BaseModelMismatchError, r"lm_head\.weight' of shape \[128, 63\]"),
    (SAVED, {HEAD: torch.full((VOCAB_SIZE, 64), torch.nan)}, {}, AdapterFormatError, "8192 NaN"),
    (SAVED, {HEAD: torch.zeros(VOCAB_SIZE + 3, 64)}, {}, UnsupportedAdapterError, "different numbers of tokens"),
    ({}, {EMBEDDING: torch.zeros(VOCAB_SIZE + 3, 64)}, {}, UnsupportedAdapterError, "save_embedding_layers=True"),
    (
        {},
        {EMBEDDING: torch.zeros(VOCAB_SIZE + 70_000, 64), HEAD: torch.zeros(VOCAB_SIZE + 70_000, 64)},
        {},
        BaseModelMismatchError,
        "far more tokens",
    ),
    ({}, {f"{PREFIX}score.weight": torch.zeros(2, 64)}, {}, BaseModelMismatchError, "score"),
    ({}, {f"{PREFIX}model.norm.weight": torch.zeros(64)}, {}, UnsupportedAdapterError, "no setting names.*norm"),
    (
        {},
        {f"{PREFIX}model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)},
        {},
        AdapterFormatError,
        "PEFT would drop it",
    ),
    (ROWS, {DELTA: None}, {}, AdapterFormatError, "no trainable_tokens_delta"),
    (ROWS, {}, {"trainable_token_indices": [5]}, BaseModelMismatchError, r"shape \[2, 64\].*has 1 tokens"),
    (ROWS, {}, {"trainable_token_indices": [5, 999]}, BaseModelMismatchError, "names token 999"),
    (ROWS, {}, {"trainable_token_indices": [5, 5]}, AdapterFormatError, "names a token twice"),
    (ROWS, {}, {"trainable_token_indices": [5, -6]}, AdapterFormatError, "must be a list of token ids"),
    (ROWS, {}, {"trainable_token_indices": "5"}, AdapterFormatError, "trainable_token_indices is '5'"),
    ({}, {}, {"bias": "some"}, AdapterFormatError, "bias is 'some'"),
    ({}, {}, {"modules_to_save": ["a(b"]}, AdapterFormatError, "no module's name"),
    ({}, {}, {"lora_bias": True}, AdapterFormatError, "lora_B.bias is missing"),
    (SAVED, {}, {"alora_invocation_tokens": [3, 4]}, UnsupportedAdapterError, "alora_invocation_tokens.*together with"),
]


@pytest.mark.parametrize(("options", "tensors", "settings", "error", "words"), REFUSED, ids=range(len(REFUSED)))
def test_contents_that_cannot_be_served_are_refused_by_name(
    model: MultiLoraModel,
    tmp_path: Path,
    options: dict[str, Any],
    tensors: dict[str, Tensor | None],
    settings: dict[str, Any],
    error: type[AdapterError],
    words: str,
) -> None:
    folder = content_adapter(base_model("llama"), tmp_path / "new", targets=TARGETS, **options)
    assert_refused(model, changed(folder, tensors, **settings), error, words)


def test_dora_over_another_weight_than_the_bases_is_refused(model: MultiLoraModel, tmp_path: Path) -> None:
    other = base_model("llama", seed=1)
    folder = content_adapter(other, tmp_path / "new", targets=["q_proj", "lm_head"], use_dora=True)
    assert_refused(model, folder, UnsupportedAdapterError, "DoRA on 'lm_head' can't be honoured")


def test_token_rows_of_a_tied_layer_with_a_bias_are_refused(tmp_path: Path) -> None:
    base = base_model("llama", tied=True)
    folder = content_adapter(base, tmp_path / "new", targets=TARGETS, **ROWS)
    base.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB_SIZE), requires_grad=False)
    with pytest.raises(UnsupportedAdapterError, match="has a bias, which PEFT leaves out"):
        MultiLoraModel(base).load_adapter("new", folder)


def test_a_module_of_several_names_of_which_peft_changes_one_is_refused(tmp_path: Path) -> None:
    base = base_model("llama")
    folder = content_adapter(base, tmp_path / "new", targets=TARGETS, modules_to_save=["embed_tokens"])
    base.other_name = base.get_input_embeddings()
    model = MultiLoraModel(base)
    with pytest.raises(UnsupportedAdapterError, match=r"'model\.embed_tokens' whole or in rows.*'other_name'"):
        model.load_adapter("new", folder)
    assert model.names() == []


def test_copies_of_the_bases_own_weights_change_nothing(tmp_path: Path) -> None:
    base = base_model("llama")
    options = {"targets": ["q_proj", "embed_tokens", "lm_head"], "seed": 3}
    copied = content_adapter(base, tmp_path / "copied", save_embedding_layers=True, **options)
    plain = content_adapter(base, tmp_path / "plain", save_embedding_layers=False, **options)
    assert len(read_adapter(copied, check_contents=lambda *_: None).replaced) == 2
    model = MultiLoraModel(base)
    ids, logits = prompts(1), []
    for name, folder in (("copied", copied), ("plain", plain)):
        model.load_adapter(name, folder)
        assert not model.store.version(name).changed
        logits.append(model(ids, adapters=[name]).logits)
    assert logits[0].equal(logits[1])


def test_evicted_contents_are_read_back(tmp_path: Path) -> None:
    base, ids = base_model("llama"), prompts(1)
    model = MultiLoraModel(base_model("llama"), store=StoreConfig(num_slots=1, host_bytes=200_000))
    names = ("a", "b", "c")
    for seed, name in enumerate(names):
        options: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
        model.load_adapter(name, content_adapter(base, tmp_path / name, targets=TARGETS, seed=seed, **options))
    first = {name: model(ids, adapters=[name]).logits for name in names}
    assert [state.tier for state in model.adapters()].count("disk") == 1  # 66 KB of changes each, and the budget counts
    for name in names:
        assert model(ids, adapters=[name]).logits.equal(first[name])
    assert min(state.num_bytes for state in model.adapters()) > 2 * VOCAB_SIZE * 64 * 4


def test_experts_bring_factors_alone(model: MultiLoraModel, tmp_path: Path) -> None:
    base = base_model("llama")
    for name in ("saved", "plain"):
        options = SAVED if name == "saved" else {}
        model.load_adapter(name, content_adapter(base, tmp_path / name, targets=TARGETS, **options))
    with pytest.raises(UnsupportedAdapterError, match="'saved' brings its own weights of 'lm_head'"):
        model.create_mixture("mix", ["kept", "saved"], XLoraConfig())
    model.create_mixture("mix", ["kept", "plain"], XLoraConfig())
    with pytest.raises(MixtureError, match=r"the new version brings its own weights of 'lm_head'"):
        model.load_adapter("plain", tmp_path / "saved", replace=True)


def test_readers_that_need_plain_factors_refuse_the_rest(tmp_path: Path) -> None:
    folder = content_adapter(base_model("llama"), tmp_path / "a", targets=TARGETS, **SAVED)
    with pytest.raises(UnsupportedAdapterError, match=r"modules_to_save is \['lm_head'\].*load_adapter"):
        read_adapter(folder)
    adapter = read_adapter(folder, check_contents=lambda *_: None)
    with pytest.raises(UnsupportedAdapterError, match="brings more than factors"):
        write_adapter(adapter, tmp_path / "b")
    model = MultiLoraModel(base_model("llama"))
    model.load_adapter("memory", adapter)
    model.load_adapter("folder", folder)
    ids = prompts(2)
    logits = model(ids[:1].repeat(2, 1), adapters=["memory", "folder"]).logits
    assert logits[0].equal(logits[1])


def test_a_closed_model_has_no_changed_modules_and_says_so(tmp_path: Path) -> None:
    base = base_model("llama")
    model = MultiLoraModel(base)
    options = {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    model.load_adapter("a", content_adapter(base_model("llama"), tmp_path / "a", targets=TARGETS, **options))
    ids, fresh = prompts(1), base_model("llama")
    model.registry.detach()
    with pytest.raises(RequestError, match="the LoRA layers were detached"):
        model(ids, adapters=["a"])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in base.modules())
    assert base(ids).logits.equal(fresh(ids).logits)


# Added tokens


def with_tokens(folder: Path, added: list[str]) -> Path:
    """A folder whose tokenizer has as many tokens as the base model has rows, and these."""
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([f"<filler {i}>" for i in range(VOCAB_SIZE - len(tokenizer))])
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    return folder


def larger_adapter(folder: Path, num_more: int, seed: int = 0) -> Path:
    larger = resized(base_model("llama"), VOCAB_SIZE + num_more)
    return content_adapter(larger, folder, targets=TARGETS, seed=seed, modules_to_save=["embed_tokens", "lm_head"])


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(model: MultiLoraModel, tmp_path: Path) -> None:
    folder = with_tokens(larger_adapter(tmp_path / "new", 1), ["<a>", "<b>"])
    assert_refused(model, folder, BaseModelMismatchError, f"has token {VOCAB_SIZE + 1}, but the embedding has 129 rows")


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer_config.json", "{"), ("tokenizer.json", "{}"), ("tokenizer.json", "x" * (1 << 27))]
)
def test_a_damaged_tokenizer_is_refused(model: MultiLoraModel, tmp_path: Path, file: str, content: str) -> None:
    folder = with_tokens(larger_adapter(tmp_path / "new", 1), ["<a>"])
    (folder / file).write_text(content)
    assert_refused(model, folder, AdapterError, "tokenizer")


def test_a_prompt_read_with_a_replaced_adapters_tokens_is_not_run(tmp_path: Path) -> None:
    model = MultiLoraModel(base_model("llama"))
    model.load_adapter("a", with_tokens(larger_adapter(tmp_path / "a", 2), ["<a>", "<b>"]))
    other = with_tokens(larger_adapter(tmp_path / "b", 2, seed=1), ["<b>", "<a>"])
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    with Engine(model, EngineConfig()) as engine:
        name = engine.add_request(Request((3, VOCAB_SIZE), adapters="a", sampling=sampling))
        model.load_adapter("a", other, replace=True)
        while engine.has_work:
            engine.step()
        result = engine.pop_result(name)
    assert result is not None
    assert isinstance(result.error, AdapterChangedError)
    assert "other tokens" in str(result.error)


def test_links_of_adapters_with_different_tokens_are_refused(tmp_path: Path) -> None:
    model = MultiLoraModel(base_model("llama"))
    model.load_adapter("a", with_tokens(larger_adapter(tmp_path / "a", 1), ["<a>"]))
    model.load_adapter("b", with_tokens(larger_adapter(tmp_path / "b", 1, seed=1), ["<b>"]))
    model.load_adapter("same", with_tokens(larger_adapter(tmp_path / "same", 1, seed=2), ["<a>"]))
    ids = torch.tensor([[3, VOCAB_SIZE, 4]])
    with pytest.raises(RequestError, match="'a' and 'b', whose tokens differ"):
        model(ids, adapters=["a+b"])
    half = model(ids, adapters=["a:0.5+same:0.5"]).logits
    assert half.shape[-1] == VOCAB_SIZE + 1
    assert bool(half.isfinite().all())
    assert model.tokenizer_of("a").convert_tokens_to_ids("<a>") == VOCAB_SIZE
