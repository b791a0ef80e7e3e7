"""Images of a batch's rows: each one goes through its own row's adapters, as PEFT gives it to the row alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from loraplex.errors import BatchError
from loraplex.models.multi_lora import MultiLoraModel
from tests.architectures.variants import VISION_14, make_model
from tests.tiny_models import random_peft_adapter

IMAGE = 120  # the token
TOKENS = 4  # of an image
NUM_IMAGES = (1, 2, 0, 1, 1)  # of each row
CHOICES = ("a", "b", "a", None, "a+b:0.5")
MODELS = ("llava", "gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm")

Inputs = Mapping[str, Tensor]


def make(name: str) -> PreTrainedModel:
    if name == "qwen2_vl":
        return make_qwen2_vl()
    if name not in ("smolvlm", "idefics3"):
        return make_model(f"vlm-{name}")
    text = {"model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "pad_token_id": 0}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    vision = {**VISION_14, "image_size": 56}
    kind = SmolVLMConfig if name == "smolvlm" else Idefics3Config
    config = kind(text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2)
    torch.manual_seed(0)
    classes = {"smolvlm": SmolVLMForConditionalGeneration, "idefics3": Idefics3ForConditionalGeneration}
    return classes[name](config).eval()


def make_qwen2_vl() -> PreTrainedModel:
    text = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2}
    tokens = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)).eval()


def tokens_of(images: int, length: int, seed: int) -> Tensor:
    ids = torch.randint(5, 100, (length,), generator=torch.Generator().manual_seed(seed))
    for image in range(images):
        ids[1 + image * (TOKENS + 1) :][:TOKENS] = IMAGE
    return ids


def pixels_of(name: str, rows: Sequence[int]) -> dict[str, Tensor]:
    """What the model is given for the images of these rows; an image's values depend on its row and its place."""
    shapes = dict.fromkeys(("smolvlm", "idefics3", "mistral3"), (3, 56, 56))
    shape = (4 * 4, 3 * 2 * 14 * 14) if name.startswith("qwen") else shapes.get(name, (3, 28, 28))
    of_rows = [
        [torch.randn(shape, generator=torch.Generator().manual_seed(100 * row + i)) for i in range(NUM_IMAGES[row])]
        for row in rows
    ]
    images = [image for own in of_rows for image in own]
    if not images:
        return {}
    if name.startswith("qwen"):  # patches of all images, one after the other
        return {"pixel_values": torch.cat(images), "image_grid_thw": torch.tensor([[1, 4, 4]] * len(images))}
    if name in ("smolvlm", "idefics3"):  # [rows, images, ..], with empty images
        empty, most = torch.zeros(shape), max(map(len, of_rows))
        return {"pixel_values": torch.stack([torch.stack(own + [empty] * (most - len(own))) for own in of_rows])}
    pixels = {"pixel_values": torch.stack(images)}
    if name == "mistral3":
        pixels["image_sizes"] = torch.tensor([[56, 56]] * len(images))
    return pixels


def inputs_of(name: str, rows: Sequence[int]) -> dict[str, Tensor]:
    lengths = [14 + row for row in rows]
    ids = [tokens_of(NUM_IMAGES[row], length, row) for row, length in zip(rows, lengths, strict=True)]
    width = max(lengths)
    padded = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.int64), row]) for row in ids])
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    inputs = {"input_ids": padded, "attention_mask": mask} | pixels_of(name, rows)
    kinds = (padded == IMAGE).long()
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = kinds
    if name == "gemma3":
        inputs["token_type_ids"] = kinds
    return inputs


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, MultiLoraModel, Any]:
    name, folder = request.param, tmp_path_factory.mktemp("images")
    for seed, adapter in enumerate("ab"):
        random_peft_adapter(make(name), folder / adapter, targets="all-linear", seed=seed, lora_alpha=2)
    model = MultiLoraModel(make(name))
    oracle = peft.PeftModel.from_pretrained(make(name), str(folder / "a"), "a")
    oracle.load_adapter(str(folder / "b"), "b")
    oracle.add_weighted_adapter(["a", "b"], [1.0, 0.5], "link", combination_type="cat")
    for adapter in "ab":
        model.load_adapter(adapter, folder / adapter)
    return name, model, oracle.eval()


@torch.no_grad()
def alone(oracle: Any, choice: str | None, run: Callable[[Any], Any]) -> Any:
    if choice is None:
        with oracle.disable_adapter():
            return run(oracle)
    oracle.set_adapter("link" if "+" in choice else choice)
    return run(oracle)


@torch.no_grad()
def test_rows_with_images_get_what_peft_gives_them_alone(case: tuple[str, MultiLoraModel, Any]) -> None:
    name, model, oracle = case
    together = model(**inputs_of(name, range(5)), adapters=list(CHOICES)).logits
    for row, choice in enumerate(CHOICES):
        expected = alone(oracle, choice, lambda peft_model, row=row: peft_model(**inputs_of(name, [row])).logits[0])
        difference = (together[row, -len(expected) :] - expected).abs().max() / (expected.max() - expected.min())
        assert difference < 1e-4, f"row {row}"


@torch.no_grad()
def test_answers_about_images_are_those_of_peft(case: tuple[str, MultiLoraModel, Any]) -> None:
    name, model, oracle = case
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**inputs_of(name, range(5)), adapters=list(CHOICES), **options)
    for row, choice in enumerate(CHOICES):
        inputs = inputs_of(name, [row])
        expected = alone(oracle, choice, lambda peft_model, inputs=inputs: peft_model.generate(**inputs, **options))
        assert together[row, -5:].tolist() == expected[0, -5:].tolist(), f"row {row}"


def test_images_that_no_row_can_be_told_for_are_refused(tmp_path: Path) -> None:
    model = MultiLoraModel(make("llava"))
    model.load_adapter("a", random_peft_adapter(make("llava"), tmp_path / "a", targets="all-linear"))
    inputs = inputs_of("llava", [0, 1])
    inputs["input_ids"][0, -1] = IMAGE  # 5 and 8 image tokens for 3 images
    with pytest.raises(BatchError, match=r"3 images came for rows with \[5, 8\] image tokens"):
        model(**inputs, adapters=["a", None])


def test_closing_gives_the_model_its_method_back() -> None:
    base = make("llava")
    with MultiLoraModel(base):
        assert "get_image_features" in vars(base.model)
    assert "get_image_features" not in vars(base.model)
