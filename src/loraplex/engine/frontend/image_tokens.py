"""How many tokens an image takes in a prompt, and which: transformers' processors write them, one rule a family.

A chat template or a user writes one image token for each image; these rules put the image's own tokens there. They are
read off the model's configuration and what the image processor made, so that no processor of videos is needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from loraplex.errors import RequestError

_WITH_CLASS_TOKEN = {"clip_vision_model": 1, "siglip_vision_model": 0}  # states that are no patch's


@dataclass(frozen=True, kw_only=True)
class ImageFamily:
    """What the engine knows about one family's images."""

    tokens: "Callable[[ProcessedImages, int], list[int]]"  # of one image
    options: "Callable[[PreTrainedConfig], dict[str, Any]]" = lambda config: {}  # of its image processor
    has_grid: bool = False  # patches of all images in one sequence, and positions in time and space


@dataclass(frozen=True, kw_only=True)
class ProcessedImages:
    """What an image processor made of a request's images."""

    config: PreTrainedConfig
    image_token: int
    tokenizer: PreTrainedTokenizerBase
    inputs: Mapping[str, Any]

    def token(self, text: str) -> int:
        """Raises RequestError where the tokenizer has no such token."""
        found: Any = self.tokenizer.convert_tokens_to_ids(text)
        if found is None or found == self.tokenizer.unk_token_id:
            raise RequestError(
                f"the tokenizer has no token {text!r}, which stands beside this model's images. Give token ids and the "
                "tensors that transformers' processor made."
            )
        return int(found)


def family_of(config: PreTrainedConfig) -> ImageFamily:
    """Raises RequestError for a model whose images packed passes can't have."""
    kind = str(config.model_type)
    if kind in _FAMILIES:
        return _FAMILIES[kind]
    why = _REFUSED.get(kind, f"images of {kind!r} aren't known to the engine")
    raise RequestError(f"{why}. Use MultiLoraModel.generate with what transformers' processor gives.")


def grid_tokens(config: PreTrainedConfig, grid: Tensor) -> list[int]:
    """How many tokens each image has, by its patches in time, height and width [images, 3] (Qwen-VL)."""
    return [int(patches) // config.vision_config.spatial_merge_size**2 for patches in grid.prod(dim=1)]


def _grid(images: ProcessedImages, index: int) -> list[int]:
    return [images.image_token] * grid_tokens(images.config, images.inputs["image_grid_thw"])[index]


def _llava(images: ProcessedImages, index: int) -> list[int]:
    """One for each patch; the class token's state is cut off, or kept ("full")."""
    config = images.config
    kind = config.vision_config.model_type
    if kind not in _WITH_CLASS_TOKEN:
        raise RequestError(
            f"the number of tokens of an image isn't known for the vision model {kind!r}. Give token ids and the "
            "tensors that transformers' processor made."
        )
    height, width = images.inputs["pixel_values"][index].shape[-2:]
    size = config.vision_config.patch_size
    is_cut = config.vision_feature_select_strategy == "default"
    return [images.image_token] * ((height // size) * (width // size) + _WITH_CLASS_TOKEN[kind] - int(is_cut))


def _pixtral(images: ProcessedImages, index: int) -> list[int]:
    """Rows of tokens that end in a break, the last one in an end."""
    size = _pixtral_patch(images.config)
    height, width = (int(side) // size for side in images.inputs["image_sizes"][index])
    row = [images.image_token] * width + [images.token("[IMG_BREAK]")]
    return [*(row * height)[:-1], images.token("[IMG_END]")]


def _pixtral_patch(config: PreTrainedConfig) -> int:
    return int(config.vision_config.patch_size * config.spatial_merge_size)


def _pixtral_options(config: PreTrainedConfig) -> dict[str, Any]:
    return {"patch_size": _pixtral_patch(config)}


def _idefics3(images: ProcessedImages, index: int) -> list[int]:
    """Tiles, row by row, and the whole; or the whole alone."""
    vision = images.config.vision_config
    num_tokens = (vision.image_size // vision.patch_size) ** 2 // images.config.scale_factor**2
    tile = [images.image_token] * num_tokens
    fake, whole = images.token("<fake_token_around_image>"), images.token("<global-img>")
    rows = [row for of_row in images.inputs["rows"] for row in of_row][index]
    columns = [column for of_row in images.inputs["cols"] for column in of_row][index]
    tokens: list[int] = []
    for row in range(rows):
        for column in range(columns):
            tokens += [fake, images.token(f"<row_{row + 1}_col_{column + 1}>"), *tile]
        tokens += _text(images, "\n" if row + 1 < rows else "\n\n")  # an empty line before the whole
    return [*tokens, fake, whole, *tile, fake]


def _text(images: ProcessedImages, text: str) -> list[int]:
    return list(images.tokenizer(text, add_special_tokens=False)["input_ids"])


_GRID = ImageFamily(tokens=_grid, has_grid=True)
_IDEFICS3 = ImageFamily(tokens=_idefics3, options=lambda config: {"return_row_col_info": True})
_PIXTRAL = ImageFamily(tokens=_pixtral, options=_pixtral_options)
_FAMILIES = {
    "llava": ImageFamily(tokens=_llava),
    "mistral3": _PIXTRAL,
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "qwen2_vl": _GRID,
    "qwen2_5_vl": _GRID,
    "qwen3_vl": _GRID,
    "qwen3_5": _GRID,
}
_BOTH_WAYS = "the tokens of an image of {} see each other in both directions, which packed passes don't do"
_REFUSED = {kind: _BOTH_WAYS.format(kind) for kind in ("gemma3", "gemma4", "paligemma")}
