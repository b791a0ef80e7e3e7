import dataclasses
import json
import math
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraplex.adapters import atomic_dir as atomic_folder
from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft import writer as peft_write
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import AdapterExistsError, AdapterFormatError, ConfigError, OutputError, UnsupportedAdapterError

FILES = ["adapter_config.json", "adapter_model.safetensors"]


def random_adapter(**settings: object) -> Adapter:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ("q_proj", "embed"), **settings})  # type: ignore[arg-type]
    linear = LoraWeights(
        kind="linear",
        lora_a=torch.randn(4, 16),
        lora_b=torch.randn(4, 24),
        scaling=config.scaling_of("layers.0.q_proj"),
        magnitude=torch.rand(24) if config.use_dora else None,
    )
    embedding = LoraWeights(
        kind="embedding",
        lora_a=torch.randn(4, 50),
        lora_b=torch.randn(4, 16),
        scaling=config.scaling_of("embed"),
        magnitude=torch.rand(16) if config.use_dora else None,
    )
    return Adapter(config=config, layers={"layers.0.q_proj": linear, "embed": embedding})


def with_layer(adapter: Adapter, **changes: object) -> Adapter:
    """The adapter with a changed q_proj."""
    changed = dataclasses.replace(adapter.layers["layers.0.q_proj"], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(adapter, layers={**adapter.layers, "layers.0.q_proj": changed})


def assert_equal(left: Adapter, right: Adapter) -> None:
    assert left.config == right.config
    assert left.layers.keys() == right.layers.keys()
    for path, weights in left.layers.items():
        other = right.layers[path]
        assert (weights.kind, weights.scaling) == (other.kind, other.scaling)
        assert weights.lora_a.equal(other.lora_a)
        assert weights.lora_b.equal(other.lora_b)
        assert weights.lora_a.dtype == other.lora_a.dtype
        if weights.magnitude is not None:
            assert other.magnitude is not None
            assert weights.magnitude.equal(other.magnitude)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True, "use_rslora": True},
        {"exclude_modules": ("k_proj",), "lora_dropout": 0.1, "lora_alpha": 2.5, "task_type": "CAUSAL_LM"},
        {
            "layers_to_transform": (0, 2),
            "layers_pattern": ("layers", "h"),
            "target_modules": ("q_proj", "embed"),
        },
        {"target_modules": r".*q_proj|embed", "exclude_modules": r"layers\.1\..*"},
        {"alpha_pattern": {r"layers\.0\..*": 3.0, "q_proj": 1.0}, "rank_pattern": {"z": 2, "a": 3}},
    ],
)
def test_adapter_reads_back_as_it_was_written(tmp_path: Path, settings: dict[str, object]) -> None:
    adapter = random_adapter(**settings)
    if "layers_to_transform" in settings:  # a full path is adapted in any case, `embed` is one
        assert adapter.config.layers_pattern == ("layers", "h")
    write_adapter(adapter, tmp_path / "new" / "adapter")
    folder = tmp_path / "new" / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert_equal(read_adapter(folder), adapter)


def test_order_of_patterns_is_kept(tmp_path: Path) -> None:
    """The first match counts, so sorting the keys (as PEFT does) could change ranks."""
    adapter = random_adapter(rank_pattern={"q_proj": 4, ".*": 4, "a": 9})
    write_adapter(adapter, tmp_path / "adapter")
    assert list(read_adapter(tmp_path / "adapter").config.rank_pattern) == ["q_proj", ".*", "a"]


def test_dtype_casts_the_factors_but_not_the_magnitude(tmp_path: Path) -> None:
    adapter = random_adapter(use_dora=True)
    write_adapter(adapter, tmp_path / "adapter", dtype=torch.bfloat16)
    weights = read_adapter(tmp_path / "adapter").layers["embed"]
    original = adapter.layers["embed"]
    assert weights.lora_a.equal(original.lora_a.bfloat16())
    assert weights.lora_b.equal(original.lora_b.bfloat16())
    assert weights.magnitude is not None
    assert original.magnitude is not None
    assert weights.magnitude.equal(original.magnitude)


def test_views_of_one_tensor_and_trainable_tensors_are_written(tmp_path: Path) -> None:
    stacked = torch.randn(8, 16, requires_grad=True)
    adapter = with_layer(random_adapter(), lora_a=stacked[::2], lora_b=torch.randn(24, 4).t())
    write_adapter(adapter, tmp_path / "adapter")
    weights = read_adapter(tmp_path / "adapter").layers["layers.0.q_proj"]
    assert weights.lora_a.equal(stacked[::2])


def test_weights_file_may_be_read_by_whoever_may_read_the_configuration(tmp_path: Path) -> None:
    write_adapter(random_adapter(), tmp_path / "adapter")
    modes = {stat.S_IMODE((tmp_path / "adapter" / file).stat().st_mode) for file in FILES}
    assert len(modes) == 1


def test_existing_folder_is_replaced_only_on_demand(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    old, new = random_adapter(), random_adapter()
    write_adapter(old, folder)
    (folder / "README.md").write_text("of the old one")
    with pytest.raises(AdapterExistsError, match="overwrite=True"):
        write_adapter(new, folder)
    assert_equal(read_adapter(folder), old)
    write_adapter(new, folder, overwrite=True)
    assert_equal(read_adapter(folder), new)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    work = tmp_path / "thesis.tex"
    work.write_text("years of work")
    with pytest.raises(AdapterExistsError, match=r"thesis\.tex"):
        write_adapter(random_adapter(), tmp_path, overwrite=True)
    with pytest.raises(AdapterExistsError, match=r"thesis\.tex"):
        write_adapter(random_adapter(), work, overwrite=True)
    assert work.read_text() == "years of work"


def test_failed_write_leaves_the_old_folder_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    old = random_adapter()
    write_adapter(old, folder)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(peft_write, "save_file", full_disk)
    for destination in (folder, tmp_path / "another"):
        with pytest.raises(OutputError, match="no space left"):
            write_adapter(random_adapter(), destination, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert_equal(read_adapter(folder), old)


def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    old = random_adapter()
    write_adapter(old, folder)
    rename = Path.rename

    def failing_rename(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("the disk fell over")
        return rename(self, target)

    monkeypatch.setattr(atomic_folder, "exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(OutputError, match="fell over"):
        write_adapter(random_adapter(), folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert_equal(read_adapter(folder), old)


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (random_adapter(target_modules=None), UnsupportedAdapterError, "target_modules is None"),
        (random_adapter(target_modules=("q_proj",)), AdapterFormatError, "doesn't target 'embed'"),
        (random_adapter(target_modules="all-linear"), AdapterFormatError, "doesn't target 'embed'"),
        (Adapter(config=random_adapter().config, layers={}), AdapterFormatError, "no weights"),
        (with_layer(random_adapter(), scaling=0.7), AdapterFormatError, "LoRA scaling is 0.7"),
        (with_layer(random_adapter(), lora_a=torch.randn(5, 16)), AdapterFormatError, "lora_a has rank 5"),
        (with_layer(random_adapter(), magnitude=torch.rand(24)), AdapterFormatError, "use_dora is False"),
        (with_layer(random_adapter(), lora_b=torch.full((4, 24), math.nan)), AdapterFormatError, "96 NaN"),
    ],
)
def test_adapter_that_could_not_be_read_back_is_not_written(
    tmp_path: Path, adapter: Adapter, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_adapter(adapter, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_dtype_that_overflows_or_is_no_float_is_refused(tmp_path: Path) -> None:
    large = with_layer(random_adapter(), lora_a=torch.full((4, 16), 1e6))
    with pytest.raises(AdapterFormatError, match=r"64 infinite weights of 64 \(torch\.float16\)"):
        write_adapter(large, tmp_path / "adapter", dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"dtype is torch\.int8"):
        write_adapter(large, tmp_path / "adapter", dtype=torch.int8)
    assert list(tmp_path.iterdir()) == []


def test_file_has_pefts_names_and_orientation(tmp_path: Path) -> None:
    adapter = random_adapter()
    write_adapter(adapter, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "base_model.model.layers.0.q_proj.lora_A.weight": (4, 16),
        "base_model.model.layers.0.q_proj.lora_B.weight": (24, 4),
        "base_model.model.embed.lora_embedding_A": (4, 50),
        "base_model.model.embed.lora_embedding_B": (16, 4),
    }
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["target_modules"] == ["q_proj", "embed"]
