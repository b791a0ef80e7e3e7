"""From a request's images to what the vision modules are given: decoded within bounds, and placed in the prompt."""

import hashlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedTokenizerBase

from loraplex.engine.config import EngineConfig
from loraplex.engine.frontend.image_tokens import ImageFamily, ProcessedImages, family_of, grid_tokens
from loraplex.engine.kv.sequence_kv import ExtraKey, LengthRule
from loraplex.engine.sched.images import RequestImages
from loraplex.errors import BaseModelError, RequestError, TooLargeError
from loraplex.extras import require_extra
from loraplex.layers.rows.images import image_token_of, vision_owner
from loraplex.models.multi_lora import MultiLoraModel

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")
_UNUSED = ("rows", "cols")  # what image processors tell for the prompt alone


class ImageInputs:
    """Prepares the images of one engine's requests; safe to use from many threads."""

    def __init__(self, model: MultiLoraModel, config: EngineConfig, lengths: LengthRule) -> None:
        self._model, self._config, self._lengths = model, config, lengths
        self._image_token = image_token_of(model.base.config)

    def prepare(
        self, images: Any, prompt: tuple[int, ...], tokenizer: PreTrainedTokenizerBase | None, most: int
    ) -> tuple[tuple[int, ...], RequestImages]:
        """The prompt with all tokens of its images, and the images. Raises RequestError or TooLargeError.

        `images` are pictures, for which the prompt has one image token each, or the tensors that transformers'
        processor made together with the prompt. A prompt may have `most` tokens.
        """
        family, image_token = self._known()
        counts: list[int] | None = None
        if isinstance(images, Mapping):
            inputs = _checked_tensors(images)
        else:
            inputs, tokens = self._processed(images, family, tokenizer)
            prompt, counts = _expanded(prompt, image_token, tokens, most)
        indices = tuple(index for index, token in enumerate(prompt) if token == image_token)
        if not indices:
            raise RequestError("the request has images, but its prompt has no image token. Write one where each is.")
        if family.has_grid:
            counts = self._check_grid(inputs, len(indices))
        rotary = self._rotary(inputs, prompt, image_token) if family.has_grid else None
        keys = tuple(_keys(inputs, indices, counts))
        return prompt, RequestImages(inputs=inputs, indices=indices, keys=keys, rotary=rotary)

    def check_adapters(self, modules: frozenset[int], what: str) -> None:
        """Raise RequestError for adapters of vision modules where a link has gates for each token."""
        if not modules.isdisjoint(self._model.adaptable.unseen()):
            raise RequestError(
                f"the request has images, and {what} adapts vision modules in a link with gates for each token (a "
                "mixture, or an aLoRA). Images have no tokens yet: use adapters of the language model only."
            )

    def _known(self) -> tuple[ImageFamily, int]:
        config = self._model.base.config
        if self._image_token is None or vision_owner(self._model.base) is None:
            raise RequestError(f"the request has images, but {config.model_type!r} takes none. Leave them out.")
        family = family_of(config)
        if family.has_grid and self._lengths.threshold is not None:
            raise RequestError(
                "positions of this model change with a sequence's length, and those of its images too, which the "
                "engine doesn't know together. Use MultiLoraModel.generate."
            )
        return family, self._image_token

    def _check_grid(self, inputs: Mapping[str, Tensor], num_tokens: int) -> list[int]:
        grid = inputs.get("image_grid_thw")
        if grid is None:
            raise RequestError("images of this model need image_grid_thw, as transformers' processor gives it.")
        counts = grid_tokens(self._model.base.config, grid)
        if sum(counts) != num_tokens or int(grid.prod(dim=1).sum()) != len(inputs["pixel_values"]):
            raise RequestError(
                f"image_grid_thw tells of {sum(counts)} tokens of images, but the prompt has {num_tokens}, and "
                f"pixel_values {len(inputs['pixel_values'])} patches. Give what transformers' processor made together."
            )
        return counts

    def _rotary(self, inputs: Mapping[str, Tensor], prompt: Sequence[int], image_token: int) -> Tensor:  # [3, prompt]
        """M-RoPE (arXiv 2409.12191): positions in time, height and width, by the model's own rule."""
        owner: Any = vision_owner(self._model.base)
        ids = torch.tensor([prompt])
        kinds = (ids == image_token).int()
        positions, _ = owner.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=inputs["image_grid_thw"])
        return positions[-3:, 0]

    # Pictures

    def _processed(
        self, images: Any, family: ImageFamily, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[dict[str, Tensor], list[list[int]]]:
        """What the vision modules are given, and the tokens of each image."""
        pictures = decode_images(images, self._config)
        if tokenizer is None:
            raise RequestError(
                "this model was made from a transformers model in memory, so how it reads pictures isn't known. Load "
                "it with from_pretrained, or give the tensors that transformers' processor made."
            )
        config = self._model.base.config
        made = self._processor(pictures, return_tensors="pt", **family.options(config))
        assert self._image_token is not None, "a model without an image token was taken for one with images"
        processed = ProcessedImages(
            config=config, image_token=self._image_token, tokenizer=tokenizer, inputs=dict(made.items())
        )
        tokens = [family.tokens(processed, index) for index in range(len(pictures))]
        inputs = {name: value for name, value in made.items() if name not in _UNUSED}
        return _checked_tensors(inputs), tokens

    @cached_property
    def _processor(self) -> Any:
        require_extra("images", "reading pictures")
        source = self._model.source
        if source is None:
            raise RequestError("where the base model came from isn't known, so how it reads pictures isn't either.")
        try:
            return AutoImageProcessor.from_pretrained(source)
        except Exception as error:
            raise BaseModelError(
                f"the image processor of {str(source)!r} can't be loaded: {type(error).__name__}: {error}. Give a "
                "complete folder with preprocessor_config.json."
            ) from error


def decode_images(images: Any, config: EngineConfig) -> "list[Image]":
    """Pictures in RGB, of Pillow's images or encoded bytes; their number and sizes are bounded before any is decoded.

    Raises RequestError or TooLargeError.
    """
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise RequestError(
            f"images is a {type(images).__name__}; give a list of Pillow's images or of encoded images as bytes, or "
            "the tensors of transformers' processor by name."
        )
    if len(images) > config.max_images:
        raise TooLargeError(
            f"the request has {len(images)} images; {config.max_images} are possible (EngineConfig.max_images)."
        )
    opened = [_opened(image, number) for number, image in enumerate(images)]
    pixels = sum(image.width * image.height for image in opened)
    if pixels > config.max_image_pixels:
        raise TooLargeError(
            f"the request's images have {pixels} pixels together; {config.max_image_pixels} are possible "
            "(EngineConfig.max_image_pixels). Make them smaller."
        )
    return [_decoded(image, number) for number, image in enumerate(opened)]


def _opened(image: Any, number: int) -> "Image":
    """A picture whose size is known and whose pixels aren't read yet."""
    require_extra("images", "reading pictures")
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, bytes):
        raise RequestError(f"image {number} is a {type(image).__name__}; give a Pillow image, or encoded bytes.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(image), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"image {number} has too many pixels: {error}. Make it smaller.") from error
    except Exception as error:  # Pillow raises all kinds for damaged files
        raise RequestError(
            f"image {number} can't be read: {type(error).__name__}. Give {', '.join(_FORMATS)}."
        ) from error


def _decoded(image: "Image", number: int) -> "Image":
    from PIL import ImageOps

    try:
        return (image if image.format is None else ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:
        raise RequestError(f"image {number} can't be decoded: {type(error).__name__}: {error}.") from error


# The prompt


def _expanded(
    prompt: Sequence[int], image_token: int, tokens: Sequence[Sequence[int]], most: int
) -> tuple[tuple[int, ...], list[int]]:
    """Each image token of the prompt as all tokens of its image; and of each, how many are image tokens."""
    found = sum(1 for token in prompt if token == image_token)
    if found != len(tokens):
        raise RequestError(
            f"the prompt has {found} image tokens for {len(tokens)} images. Write one image token for each image."
        )
    length = len(prompt) - found + sum(map(len, tokens))
    if length > most:
        raise RequestError(f"the prompt has {length} tokens with its images, but can have {most}. Give smaller images.")
    images = iter(tokens)
    made = [own for token in prompt for own in (next(images) if token == image_token else (token,))]
    return tuple(made), [sum(1 for token in own if token == image_token) for own in tokens]


def _checked_tensors(images: Mapping[str, Any]) -> dict[str, Tensor]:
    unknown = [name for name in images if name not in _INPUTS]
    if unknown or "pixel_values" not in images:
        raise RequestError(
            f"images has {sorted(images)}; give pixel_values and what belongs to them of {', '.join(_INPUTS[1:])}."
        )
    try:
        return {name: torch.as_tensor(value) for name, value in images.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"images can't be read as tensors: {error}.") from error


def _keys(inputs: Mapping[str, Tensor], indices: Sequence[int], counts: Sequence[int] | None) -> Iterator[ExtraKey]:
    """What keys and values depend on from each image's first token on; of all together where no image is told apart."""
    parts = _images_apart(inputs, counts)
    if counts is None or parts is None:
        counts, parts = [len(indices)], [inputs]
    first = 0
    for part, count in zip(parts, counts, strict=True):
        yield ExtraKey(identity=("image", _digest(part)), active_from=indices[first])
        first += count


def _images_apart(inputs: Mapping[str, Tensor], counts: Sequence[int] | None) -> list[Mapping[str, Tensor]] | None:
    if counts is None or 0 in counts:
        return None
    pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
    if grid is not None:
        patches = pixels.split(grid.prod(dim=1).tolist())
        return [{"pixel_values": own, "image_grid_thw": size} for own, size in zip(patches, grid, strict=True)]
    if all(len(value) == len(counts) for value in inputs.values()):
        return [{name: value[image] for name, value in inputs.items()} for image in range(len(counts))]
    return None


def _digest(inputs: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs):
        value = inputs[name].detach().cpu().contiguous()
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes())
    return digest.hexdigest()
