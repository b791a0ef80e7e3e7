"""The file beside an adapter that tells what its prompts look like."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraplex import MultiLoraModel, SpectrConfig, StoreConfig, XLoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.adapters.prompt_centroid import CENTROID_FILE, PromptCentroid, read_centroid, write_centroid
from loraplex.errors import AdapterFormatError, BaseModelMismatchError, OutputError
from tests.tiny_models import HIDDEN_SIZE, linear_targets, random_peft_adapter, tiny_model

NO_PROMPTS = {"loraplex_prompt_centroid": '{"version": 1, "num_prompts": 0}'}
METADATA = {"loraplex_prompt_centroid": '{"version": 1, "num_prompts": 7}'}


def centroid(size: int = HIDDEN_SIZE) -> PromptCentroid:
    draw = torch.Generator().manual_seed(1)
    return PromptCentroid(
        mean=torch.randn(size, generator=draw), background=torch.randn(size, generator=draw), num_prompts=7
    )


def test_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_centroid(tmp_path) is None
    write_centroid(centroid(), tmp_path)
    write_centroid(centroid(), tmp_path)  # replaces its own file
    found = read_centroid(tmp_path)
    assert found is not None
    assert found.num_prompts == 7
    assert torch.equal(found.mean, centroid().mean)
    assert torch.equal(found.background, centroid().background)
    (tmp_path / CENTROID_FILE).write_text("somebody's")
    with pytest.raises(OutputError, match="not known to be of loraplex"):
        write_centroid(centroid(), tmp_path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"mean": torch.ones(4)}, METADATA, "holds"),
        ({"mean": torch.ones(4), "background": torch.zeros(5)}, METADATA, "of one size"),
        ({"mean": torch.ones(4, 1), "background": torch.zeros(4, 1)}, METADATA, "float32 vectors"),
        ({"mean": torch.ones(4).half(), "background": torch.zeros(4).half()}, METADATA, "float32 vectors"),
        ({"mean": torch.ones(4), "background": torch.zeros(4)}, {}, "metadata"),
        (
            {"mean": torch.ones(4), "background": torch.zeros(4)},
            NO_PROMPTS,
            "metadata",
        ),
        ({"mean": torch.full((4,), float("nan")), "background": torch.zeros(4)}, METADATA, "not finite"),
        ({"mean": torch.ones(4), "background": torch.ones(4)}, METADATA, "same vector"),
        ({"mean": torch.ones(2**20 + 1), "background": torch.zeros(2**20 + 1)}, METADATA, "at most 1048576"),
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], message: str
) -> None:
    save_file(tensors, tmp_path / CENTROID_FILE, metadata=metadata)
    with pytest.raises(AdapterFormatError, match=message):
        read_centroid(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_peft_adapter(tiny_model("llama"), tmp_path / "a", targets=linear_targets("llama"))


def test_loading_an_adapter_takes_it_or_refuses_and_changes_nothing(folder: Path) -> None:
    model = MultiLoraModel(tiny_model("llama"))
    write_centroid(centroid(), folder)
    model.load_adapter("a", folder)
    assert model.registry.auto.names() == ["a"]
    write_centroid(centroid(3), folder)
    with pytest.raises(BaseModelMismatchError, match="size 3"):
        model.load_adapter("a", folder, replace=True)
    (folder / CENTROID_FILE).write_bytes(b"damaged")
    with pytest.raises(AdapterFormatError):
        model.load_adapter("b", folder)
    assert model.names() == model.registry.auto.names() == ["a"]


def test_an_adapter_is_read_back_though_its_centroid_is_new(folder: Path, tmp_path: Path) -> None:
    other = random_peft_adapter(tiny_model("llama"), tmp_path / "b", targets=linear_targets("llama"), seed=2)
    probe = MultiLoraModel(tiny_model("llama"))
    probe.load_adapter("a", folder)
    (state,) = probe.adapters()
    model = MultiLoraModel(tiny_model("llama"), store=StoreConfig(num_slots=1, host_bytes=state.num_bytes))
    model.load_adapter("a", folder)
    model.load_adapter("b", other)  # there is room for one
    write_centroid(centroid(), folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids, adapters=["a"]).logits, probe(ids, adapters=["a"]).logits)


def test_an_adapter_that_is_written_anew_loses_it(tmp_path: Path) -> None:
    folder = random_peft_adapter(tiny_model("llama"), tmp_path / "peft", targets=linear_targets("llama"))
    adapter = read_adapter(folder)
    write_adapter(adapter, tmp_path / "a")
    write_centroid(centroid(), tmp_path / "a")
    write_adapter(adapter, tmp_path / "a", overwrite=True)
    assert read_centroid(tmp_path / "a") is None


@pytest.mark.parametrize("config", [XLoraConfig(), SpectrConfig()], ids=["xlora", "spectr"])
def test_a_mixture_has_one_in_its_folder_and_can_be_saved_over_it(
    config: XLoraConfig | SpectrConfig, folder: Path, tmp_path: Path
) -> None:
    model = MultiLoraModel(tiny_model("llama"))
    model.load_adapter("a", folder)
    model.create_mixture("mix", ["a"], config)
    model.save_mixture("mix", tmp_path / "mix")
    write_centroid(centroid(), tmp_path / "mix")
    model.load_mixture("again", tmp_path / "mix", experts={"a": None})
    assert model.registry.auto.names() == ["again"]
    model.save_mixture("mix", tmp_path / "mix", overwrite=True)
    assert read_centroid(tmp_path / "mix") is None
