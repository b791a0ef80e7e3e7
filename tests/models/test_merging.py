"""Merging adapters into a base model: what is refused, what is written, and what stays as it was."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.adapters.peft.record import write_record
from loraplex.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    BaseModelError,
    BaseModelMismatchError,
    ConfigError,
    LoraplexError,
    OutputError,
    RequestError,
    UnsupportedAdapterError,
)
from loraplex.models.checkpoints.int8_base import quantize_base
from loraplex.models.checkpoints.loading import load_base_model
from loraplex.models.convert import merged_folder
from loraplex.models.convert.merged_folder import MergeRecord, write_merged_folder
from loraplex.models.convert.merging import merge_into, read_members, save_merged
from loraplex.residual.format import write_residual
from loraplex.residual.modules import BaseFingerprint, SteeringVector
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

TARGETS = linear_targets("llama")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write_adapter(folder: Path, seed: int = 0, **options: Any) -> Path:
    targets = options.pop("targets", TARGETS)
    return random_peft_adapter(tiny_model("llama"), folder, targets=targets, seed=seed, options=options)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def refused(tmp_path: Path, error: type[LoraplexError], *words: str) -> Iterator[None]:
    """The block raises this error, and no file is another afterwards."""
    before = contents(tmp_path)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert contents(tmp_path) == before


# What is refused


def write_mixture(folder: Path) -> Path:
    with MultiLoraModel(tiny_model("llama")) as model:
        for seed, name in enumerate(("x", "y")):
            model.load_adapter(name, write_adapter(folder.parent / name, seed))
        model.create_mixture("mixture", ["x", "y"], XLoraConfig())
        model.save_mixture("mixture", folder)
    return folder


def write_steering(folder: Path) -> Path:
    identity = BaseFingerprint(architecture="LlamaForCausalLM", hidden_size=64, vocab_size=128, num_heads=(4, 4))
    write_residual(SteeringVector(vectors={0: torch.ones(64)}, base=identity), folder)
    return folder


def write_control_vector(folder: Path) -> Path:
    file = folder.with_suffix(".gguf")
    file.write_bytes(b"GGUF")
    return file


def write_alora(folder: Path) -> Path:
    return write_adapter(folder, alora_invocation_tokens=[5], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (write_mixture, ["'b'", "a mixture", "every token"]),
        (write_steering, ["'b'", "a residual"]),
        (write_control_vector, ["'b'", "a control vector"]),
        (write_alora, ["'b'", "alora_invocation_tokens", "invocation"]),
        (lambda folder: write_adapter(folder, modules_to_save=["lm_head"]), ["modules_to_save"]),
    ],
)
def test_what_no_weights_can_do_is_refused_by_name(
    tmp_path: Path, base: Path, write: Callable[[Path], Path], words: list[str]
) -> None:
    adapters = {"a": write_adapter(tmp_path / "a"), "b": write(tmp_path / "b")}
    with refused(tmp_path, UnsupportedAdapterError, *words):
        save_merged(base, "a+b:0.5", tmp_path / "merged", adapters)


def test_quantized_bases_are_refused(tmp_path: Path, base: Path) -> None:
    adapters = {"a": write_adapter(tmp_path / "a")}
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps(settings))
    with refused(tmp_path, BaseModelError, "quantization_config", "original"):
        save_merged(base, "a", tmp_path / "merged", adapters)


def test_gguf_files_are_refused(tmp_path: Path) -> None:
    adapters = {"a": write_adapter(tmp_path / "a")}
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with refused(tmp_path, BaseModelError, "GGUF", "original"):
        save_merged(tmp_path / "base.gguf", "a", tmp_path / "merged", adapters)


def test_weights_in_8_bits_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama", dtype=torch.bfloat16).requires_grad_(False)
    members = read_members(base, (("a", 1.0),), {"a": write_adapter(tmp_path / "a")})
    quantize_base(base)
    with pytest.raises(BaseModelError, match="8 bits"):
        merge_into(base, members)


def test_modules_that_compute_more_than_their_weight_are_refused(tmp_path: Path) -> None:
    class Plain(nn.Linear):
        pass

    class Clipped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.clamp(-0.1, 0.1))

    base = tiny_model("llama").requires_grad_(False)
    members = read_members(base, (("a", 1.0),), {"a": write_adapter(tmp_path / "a")})
    base.model.layers[0].mlp.up_proj.__class__ = Plain
    merge_into(base, members)
    base.model.layers[1].mlp.up_proj.__class__ = Clipped
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.up_proj.*Clipped"):
        merge_into(base, members)
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())


def test_weights_that_an_encoder_decoder_shares_are_refused(tmp_path: Path) -> None:
    model = tiny_model("t5")
    model.save_pretrained(tmp_path / "base")
    adapters = {"a": random_peft_adapter(model, tmp_path / "a", targets=["shared"])}
    with refused(tmp_path, BaseModelError, "'shared'", "shares its weight"):
        save_merged(tmp_path / "base", "a", tmp_path / "merged", adapters)


def test_merged_weights_that_the_dtype_cannot_hold_are_refused(tmp_path: Path, base: Path) -> None:
    adapters = {"a": write_adapter(tmp_path / "a")}
    with refused(tmp_path, UnsupportedAdapterError, "_proj", "float16", "bfloat16"):
        save_merged(base, "a:1e6", tmp_path / "merged", adapters, dtype="float16")


def test_adapters_of_another_base_are_refused(tmp_path: Path, base: Path) -> None:
    other = random_peft_adapter(tiny_model("gpt2"), tmp_path / "a", targets=linear_targets("gpt2"))
    with refused(tmp_path, BaseModelMismatchError, "c_attn"):
        save_merged(base, "a", tmp_path / "merged", {"a": other})


@pytest.mark.parametrize(
    ("link", "options", "error"),
    [
        ("a+c", {}, AdapterNotFoundError),
        (None, {}, RequestError),
        ("a", {"dtype": "int4"}, ConfigError),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_loaded(
    tmp_path: Path, link: str | None, options: dict[str, Any], error: type[LoraplexError]
) -> None:
    adapters = {"a": write_adapter(tmp_path / "a")}
    with refused(tmp_path, error):
        save_merged(tmp_path / "no base", link, tmp_path / "merged", adapters, **options)


# What is written


def test_the_folder_has_model_settings_tokenizer_and_record(tmp_path: Path, base: Path) -> None:
    for name, text in {
        "tokenizer.json": '{"any": 1}',
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "notes.txt": "not of the model",
        "training_args.bin": "pickle",
    }.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    adapters = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")}
    before = contents(tmp_path)
    save_merged(base, "a:0.5+b:0.25", tmp_path / "merged", adapters)
    found = contents(tmp_path / "merged")
    copied = ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"]
    assert {name: found[name] for name in copied} == {name: contents(base)[name] for name in copied}
    written = {"config.json", "generation_config.json", "model.safetensors", "merged.json"}
    assert found.keys() == {*copied, *written}
    record = json.loads((tmp_path / "merged" / "merged.json").read_text())
    assert record["base"] == "base"
    assert (record["link"], record["adapters"]) == ([["a", 0.5], ["b", 0.25]], {"a": "a", "b": "b"})
    modes = {path.stat().st_mode for path in (tmp_path / "merged").iterdir() if path.is_file()}
    assert len(modes) == 1
    # The base and the adapters are as they were, though the base's weights in memory were changed.
    assert {name: value for name, value in contents(tmp_path).items() if not name.startswith("merged/")} == before


def test_tokenizer_files_of_a_hub_id_come_from_its_snapshot(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "tokenizer.json").write_text("{}")
    asked = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(base)

    monkeypatch.setattr(merged_folder, "snapshot_download", snapshot_download)
    record = MergeRecord(base="owner/name", link=(("a", 1.0),), adapters={"a": "a"})
    write_merged_folder(tiny_model("llama"), "owner/name", tmp_path / "merged", record)
    ((repository, patterns),) = asked
    assert repository == "owner/name"
    assert not any(fnmatch(name, pattern) for name in ("model.safetensors", "x.bin", "x.py") for pattern in patterns)
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"

    def unreachable(repository: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(merged_folder, "snapshot_download", unreachable)
    with refused(tmp_path, BaseModelError, "owner/name", "no network"):
        write_merged_folder(tiny_model("llama"), "owner/name", tmp_path / "other", record)


def test_large_models_are_written_in_shards(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = {"a": write_adapter(tmp_path / "a")}
    save_merged(base, "a", tmp_path / "one", adapters)
    monkeypatch.setattr(merged_folder, "_SHARD_BYTES", "100KB")
    save_merged(base, "a", tmp_path / "many", adapters)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    one, many = (load_base_model(tmp_path / name)[0].state_dict() for name in ("one", "many"))
    assert all(torch.equal(weight, many[name]) for name, weight in one.items())


def test_end_tokens_of_adapters_end_the_merged_models_answers(tmp_path: Path, base: Path) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = 3
    model.save_pretrained(base)
    adapters = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")}
    write_record(adapters["b"], (9, 3))
    save_merged(base, "a+b", tmp_path / "both", adapters)
    save_merged(base, "a", tmp_path / "one", {"a": adapters["a"]})
    assert load_base_model(tmp_path / "both")[0].generation_config.eos_token_id == [3, 9]
    assert load_base_model(tmp_path / "one")[0].generation_config.eos_token_id == 3


def test_weights_are_changed_where_they_are(tmp_path: Path) -> None:
    base = tiny_model("llama").requires_grad_(False)
    members = read_members(base, (("a", 1.0),), {"a": write_adapter(tmp_path / "a")})
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in base.state_dict().items()}
    merge_into(base, members)
    for name, weight in base.state_dict().items():
        place, values = before[name]
        assert weight.data_ptr() == place
        assert torch.equal(weight, values) is not any(f".{target}." in name for target in TARGETS), name
    assert {type(module) for module in base.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


# What stands at the goal


def test_an_existing_folder_is_replaced_only_if_it_is_a_merged_model(tmp_path: Path, base: Path) -> None:
    adapters = {"a": write_adapter(tmp_path / "a")}
    merged = tmp_path / "merged"
    save_merged(base, "a", merged, adapters)
    with refused(tmp_path, AdapterExistsError, "overwrite"):
        save_merged(base, "a:2", merged, adapters)
    before = contents(merged)
    save_merged(base, "a:2", merged, adapters, overwrite=True)
    assert contents(merged)["model.safetensors"] != before["model.safetensors"]
    (merged / "notes.txt").write_text("mine")
    with refused(tmp_path, AdapterExistsError, "notes.txt"):
        save_merged(base, "a:2", merged, adapters, overwrite=True)
    (merged / "notes.txt").unlink()
    (merged / "merged.json").unlink()
    with refused(tmp_path, AdapterExistsError, "merged.json"):
        save_merged(base, "a:2", merged, adapters, overwrite=True)


def test_the_base_is_never_replaced(tmp_path: Path, base: Path) -> None:
    adapters = {"a": write_adapter(tmp_path / "a")}
    first = tmp_path / "first"
    save_merged(base, "a", first, adapters)
    (tmp_path / "alias").symlink_to(first)
    with refused(tmp_path, AdapterExistsError, "made of"):
        save_merged(first, "a", tmp_path / "alias", adapters, overwrite=True)


@pytest.mark.parametrize("error", [OSError("no space left"), ValueError("bad settings")])
def test_a_write_that_fails_leaves_the_old_model(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    adapters = {"a": write_adapter(tmp_path / "a")}
    save_merged(base, "a", tmp_path / "merged", adapters)

    def fail(self: object, folder: Path, **options: object) -> None:
        (Path(folder) / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with refused(tmp_path, OutputError if isinstance(error, OSError) else BaseModelError, str(error)):
        save_merged(base, "a:2", tmp_path / "merged", adapters, overwrite=True)
