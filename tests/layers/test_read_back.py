"""An adapter that is read again from a known file: the same weights, to the bit, or an error that names the file."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex import MultiLoraModel
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.store import StoreConfig
from loraplex.errors import AdapterChangedError, AdapterFormatError
from loraplex.layers.prepare import prepare_adapter
from loraplex.layers.reload import ReadBack
from tests.tiny_models import embedding_target, linear_targets, random_peft_adapter, tiny_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write(
    folder: Path, dtype: torch.dtype = torch.float32, *, rank: int = 4, embedding: bool = False, **options: object
) -> Path:
    targets = (*linear_targets("llama"), *([embedding_target("llama")] if embedding else []))
    random_peft_adapter(tiny_model("llama"), folder, targets=targets, r=rank, seed=3, options=options)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    return folder


def prepared(folder: Path, dtype: torch.dtype) -> PreparedAdapter:
    model = MultiLoraModel(tiny_model("llama")).adaptable
    return prepare_adapter(read_adapter(folder), model.modules, model.module_index, dtype)


def assert_equal(ours: PreparedAdapter, theirs: PreparedAdapter) -> None:
    assert list(ours.layers) == list(theirs.layers)
    assert (ours.invocation, ours.num_bytes) == (theirs.invocation, theirs.num_bytes)
    for index, weights in ours.layers.items():
        expected = theirs.layers[index]
        assert weights.lora_a.is_contiguous()
        assert weights.lora_b.is_contiguous()
        assert weights.lora_a.data_ptr() % 64 == 0
        assert weights.lora_a.dtype == expected.lora_a.dtype
        assert torch.equal(weights.lora_a, expected.lora_a)
        assert torch.equal(weights.lora_b, expected.lora_b)
        assert weights.scaling == expected.scaling


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file_dtype", DTYPES)
def test_same_bits_as_the_first_time(
    tmp_path: Path, file_dtype: torch.dtype, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr("loraplex.layers.reload.native_runs", lambda *args: False)
    first = prepared(write(tmp_path / "a", file_dtype, rank=5, embedding=True), dtype)
    assert first.read_back is not None
    assert_equal(first.read_back(), first)
    assert_equal(first.read_back(), first)  # the memory it was read into is used again, the adapter's isn't


def test_the_tokens_that_invoke_an_adapter_are_kept(tmp_path: Path) -> None:
    first = prepared(write(tmp_path / "a", alora_invocation_tokens=[3, 4]), torch.float32)
    assert first.read_back is not None
    assert first.read_back().invocation == (3, 4)


def test_what_takes_more_than_copying_is_read_the_general_way(tmp_path: Path) -> None:
    assert prepared(write(tmp_path / "dora", use_dora=True), torch.float32).read_back is None
    folder = write(tmp_path / "mixed")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: tensors[name].half()}, folder / "adapter_model.safetensors")
    assert prepared(folder, torch.float32).read_back is None


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    folder = write(tmp_path / "a")
    first = prepared(folder, torch.float32)
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] if change < 0 else content + b"\0")
    assert first.read_back is not None
    with pytest.raises(AdapterFormatError, match=f"adapter_model.safetensors is not {len(content)} bytes long"):
        first.read_back()


def make_model(tmp_path: Path) -> MultiLoraModel:
    """A model with two adapters and host memory for one."""
    folders = [write(tmp_path / name) for name in ("a", "b")]
    size = prepared(folders[0], torch.float32).num_bytes
    model = MultiLoraModel(tiny_model("llama"), store=StoreConfig(host_bytes=size, num_slots=1))
    for folder in folders:
        model.load_adapter(folder.name, folder)
    return model


def test_a_store_reads_back_this_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = make_model(tmp_path), []
    read = ReadBack.__call__
    monkeypatch.setattr(ReadBack, "__call__", lambda self: reads.append(self.file.parent.name) or read(self))
    ids = torch.tensor([[1, 2, 3]])
    seen = [model(ids, adapters=[name]).logits for name in "abab"]
    assert reads == ["a", "b", "a", "b"]
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_files_that_change_while_they_are_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path)
    version = model.store.version("a")
    assert isinstance(version.read_back, ReadBack)
    read = dataclasses.replace(version.read_back)

    def slowly() -> PreparedAdapter:
        made = read()
        (tmp_path / "a" / "adapter_config.json").write_text("{}")
        return made

    version.read_back = slowly
    with pytest.raises(AdapterChangedError, match="changed since it was loaded"):
        model(torch.tensor([[1, 2, 3]]), adapters=["a"])
