"""Mixture folders between PEFT and loraplex: what PEFT loses is refused, what loraplex writes PEFT loads."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import AdapterFormatError, AdapterNotFoundError
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.formats.write_folder import write_mixture_folder
from loraplex.xlora.head import ScalingHead
from tests.parity.xlora_oracle import peft_logits, peft_xlora
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, embedding_target, random_peft_adapter, tiny_model

HEAD = "base_model.internal_xlora_classifier."
# Different modules, ranks and scalings; the last one's embedding is the first LoRA layer.
EXPERTS: tuple[dict[str, Any], ...] = (
    {"targets": ["q_proj", "v_proj"]},
    {"targets": ["v_proj", "down_proj"], "r": 2, "options": {"use_rslora": True}},
    {"targets": ["k_proj"], "r": 6},
    {"targets": ["o_proj", embedding_target("llama")], "lora_alpha": 2},
)
DEEP = XLoraConfig(
    xlora_depth=4,
    xlora_size=24,
    layerwise_scalings=True,
    softmax_temperature=0.7,
    top_k_lora=2,
    scaling_pass_value=0.5,
    global_scaling_weight=1.5,
)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model("llama")


def write_experts(base: PreTrainedModel, folder: Path, count: int = len(EXPERTS)) -> dict[str, Path]:
    return {
        f"expert{i}": random_peft_adapter(base, folder / f"expert{i}", seed=i, **EXPERTS[i % len(EXPERTS)])
        for i in range(count)
    }


def head_of(model: peft.PeftModel) -> dict[str, Tensor]:
    """PEFT's trained head under ScalingHead's names."""
    return dict(model.base_model.internal_xlora_classifier.state_dict())


def prompt() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (17,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("depth", "lost"), [(1, [0]), (2, [0, 3]), (4, [0, 3])])
def test_folder_saved_by_peft_is_refused_with_its_lost_tensors(
    base: PreTrainedModel, tmp_path: Path, depth: int, lost: list[int]
) -> None:
    model = peft_xlora(base, write_experts(base, tmp_path), XLoraConfig(xlora_depth=depth, xlora_size=24), seed=0)
    model.save_pretrained(str(tmp_path / "saved"))
    names = [f"'{HEAD}layers.{layer}.{part}'" for layer in lost for part in ("weight", "bias")]
    with pytest.raises(AdapterFormatError) as raised:
        read_mixture_folder(tmp_path / "saved")
    message = str(raised.value)
    assert f"lacks {', '.join(names)}: with xlora_depth={depth}" in message
    assert f"{2 * depth} tensors, {2 * depth - 2 * len(lost)} of them are there" in message
    assert "PEFT (0.21) loses them when it saves" in message
    assert "whose number is also an expert's name, here '0' to '3'" in message


def save_whole(model: peft.PeftModel, folder: Path) -> Path:
    """PEFT's save, and then the head by hand, as the message of the refused folder says."""
    model.save_pretrained(str(folder))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "internal_xlora_classifier" in name}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("layerwise", [False, True])
def test_whole_folder_of_peft_gives_peft_s_scalings(
    base: PreTrainedModel, tmp_path: Path, depth: int, dropout: float, layerwise: bool
) -> None:
    config = XLoraConfig(xlora_depth=depth, xlora_size=24, xlora_dropout_p=dropout, layerwise_scalings=layerwise)
    experts = write_experts(base, tmp_path)
    model = peft_xlora(base, experts, config, seed=1)
    mixture = read_mixture_folder(save_whole(model, tmp_path / "saved"))
    assert mixture.config == config
    # PEFT's own expert folders are no adapters; it loads the experts from where they came from, and so do we.
    assert dict(mixture.experts) == {str(i): path for i, path in enumerate(experts.values())}

    _, scalings = peft_logits(model, prompt())
    assert mixture.num_layers == (scalings.shape[1] if layerwise else None)
    head = ScalingHead(config, hidden_size=HIDDEN_SIZE, num_experts=4, num_layers=scalings.shape[1]).eval()
    head.load_state_dict(dict(mixture.head))
    with torch.no_grad():
        hidden = base(prompt()[None], output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(head(hidden), scalings, rtol=1e-4, atol=1e-5)


def test_experts_trained_with_the_head_are_lost_by_peft(base: PreTrainedModel, tmp_path: Path) -> None:
    model = peft_xlora(base, write_experts(base, tmp_path), XLoraConfig(use_trainable_adapters=True), seed=1)
    folder = save_whole(model, tmp_path / "saved")
    with pytest.raises(AdapterFormatError, match=r"saved/0' is no whole adapter: .*use_trainable_adapters.* are lost"):
        read_mixture_folder(folder)


def test_frozen_experts_that_are_gone_are_named(base: PreTrainedModel, tmp_path: Path) -> None:
    folder = save_whole(peft_xlora(base, write_experts(base, tmp_path), XLoraConfig(), seed=1), tmp_path / "saved")
    (tmp_path / "expert2").rename(tmp_path / "elsewhere")
    with pytest.raises(AdapterNotFoundError, match=r"expert '2' .*expert2', which is neither a folder nor a hub id"):
        read_mixture_folder(folder)
    assert read_mixture_folder(folder, find_experts=False).expert_names == ("0", "1", "2", "3")


def load_in_peft(base: PreTrainedModel, folder: Path, settings: peft.PeftConfig | None = None) -> peft.PeftModel:
    copied = copy.deepcopy(base)
    copied.config.use_cache = False
    return peft.PeftModel.from_pretrained(copied, str(folder), config=settings).eval()


@pytest.mark.parametrize(
    ("config", "num_experts", "copied"),
    [(XLoraConfig(), 4, True), (DEEP, 4, False), (XLoraConfig(xlora_depth=2, xlora_size=24), 12, False)],
    ids=["defaults, folders copied", "deep", "12 experts"],
)
def test_written_folder_gives_the_same_logits_in_peft(
    base: PreTrainedModel, tmp_path: Path, config: XLoraConfig, num_experts: int, copied: bool
) -> None:
    paths = write_experts(base, tmp_path, num_experts)
    model = peft_xlora(base, paths, config, seed=2)
    experts: Mapping[str, Any] = paths if copied else {name: read_adapter(path) for name, path in paths.items()}
    write_mixture_folder(
        tmp_path / "mix",
        layout="peft",
        config=config,
        hidden_size=HIDDEN_SIZE,
        head_state=head_of(model),
        experts=experts,
        base_model_name="tiny/llama",
    )
    assert json.loads((tmp_path / "mix" / "loraplex.json").read_text()) == {"expert_names": list(paths)}

    loaded = load_in_peft(base, tmp_path / "mix")
    for name, tensor in head_of(model).items():
        assert torch.equal(head_of(loaded)[name], tensor), name
    expected, expected_scalings = peft_logits(model, prompt())
    logits, scalings = peft_logits(loaded, prompt())
    torch.testing.assert_close(scalings, expected_scalings, rtol=0, atol=0)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    without_mixture = base(prompt()[None]).logits[0]
    assert (logits - without_mixture).abs().max() > 0.01 * (expected.max() - expected.min())


def test_settings_mean_the_same_in_peft(base: PreTrainedModel, tmp_path: Path) -> None:
    paths = write_experts(base, tmp_path)
    write_mixture_folder(
        tmp_path / "mix",
        layout="peft",
        config=DEEP,
        hidden_size=HIDDEN_SIZE,
        head_state=head_of(peft_xlora(base, paths, DEEP, seed=0)),
        experts=paths,
        base_model_name="tiny/llama",
    )
    settings = peft.PeftConfig.from_pretrained(str(tmp_path / "mix"))
    assert isinstance(settings, peft.XLoraConfig)
    assert settings.hidden_size == HIDDEN_SIZE
    assert settings.base_model_name_or_path == "tiny/llama"
    for name, value in vars(DEEP).items():
        assert getattr(settings, name, value) == value, name


def test_moved_folder_loads_in_peft_as_the_documentation_says(base: PreTrainedModel, tmp_path: Path) -> None:
    paths = write_experts(base, tmp_path)
    model = peft_xlora(base, paths, XLoraConfig(), seed=5)
    write_mixture_folder(
        tmp_path / "mix",
        layout="peft",
        config=XLoraConfig(),
        hidden_size=HIDDEN_SIZE,
        head_state=head_of(model),
        experts=paths,
        base_model_name=None,
    )
    moved = (tmp_path / "mix").rename(tmp_path / "moved")
    settings = peft.PeftConfig.from_pretrained(str(moved))
    settings.adapters = {number: f"{moved}/{number}" for number in settings.adapters}
    logits, _ = peft_logits(load_in_peft(base, moved, settings), prompt())
    torch.testing.assert_close(logits, peft_logits(model, prompt())[0], rtol=0, atol=0)


def test_dora_experts_are_written_though_peft_runs_none(base: PreTrainedModel, tmp_path: Path) -> None:
    paths = {
        name: random_peft_adapter(base, tmp_path / name, targets=["q_proj"], seed=seed, options={"use_dora": True})
        for seed, name in enumerate(("a", "b"))
    }
    config = XLoraConfig()
    head = ScalingHead(config, hidden_size=HIDDEN_SIZE, num_experts=2, num_layers=2)
    write_mixture_folder(
        tmp_path / "mix",
        layout="peft",
        config=config,
        hidden_size=HIDDEN_SIZE,
        head_state=head.state_dict(),
        experts=paths,
        base_model_name=None,
    )
    mixture = read_mixture_folder(tmp_path / "mix")
    assert all(read_adapter(folder).config.use_dora for folder in mixture.experts.values())
    with pytest.raises(ValueError, match="does not support LoRA layers with DoRA"):
        peft_logits(load_in_peft(base, tmp_path / "mix"), prompt())


def test_written_experts_hold_what_peft_s_own_folders_held(base: PreTrainedModel, tmp_path: Path) -> None:
    paths = write_experts(base, tmp_path)
    write_mixture_folder(
        tmp_path / "mix",
        layout="peft",
        config=XLoraConfig(),
        hidden_size=HIDDEN_SIZE,
        head_state=head_of(peft_xlora(base, paths, XLoraConfig(), seed=0)),
        experts={name: read_adapter(path) for name, path in paths.items()},
        base_model_name=None,
    )
    for number, path in enumerate(paths.values()):
        written = load_file(tmp_path / "mix" / str(number) / "adapter_model.safetensors")
        original = load_file(path / "adapter_model.safetensors")
        lora = {name for name in original if "lora_" in name}
        assert written.keys() == lora
        assert all(torch.equal(written[name], original[name]) for name in lora)
