"""Images of a batch's rows: each one passes the vision modules through the adapters of its own row.

transformers' vision-language models turn all images of a batch into features at once, in `get_image_features`, by rules
that differ from model to model: patches of all images in one sequence, windows, merged neighbours. Where rows with
different adapters adapt such modules, the images of neighbouring rows with the same adapters are turned into features
by a call of their own, and the features are put together in the images' order.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.errors import BatchError
from loraplex.routing.routing import Routing, current_routing, use_routing

_METHOD = "get_image_features"
_GRID = "image_grid_thw"  # [images, 3]  patches in time, height and width, of models that pack all patches together
_PIXELS = "pixel_values"
_FEATURES = "pooler_output"  # of the method's output
_IMAGE_TOKENS = ("image_token_id", "image_token_index")

_FIX = "Run rows with different adapters in calls of their own, or use adapters of the language model only."

_ids: ContextVar[Tensor | None] = ContextVar("loraplex_ids_of_rows", default=None)


@contextmanager
def use_image_rows(input_ids: Tensor | None) -> Iterator[None]:  # [rows, tokens]
    """Inside the block, the tokens tell which images belong to which row."""
    token = _ids.set(input_ids)
    try:
        yield
    finally:
        _ids.reset(token)


def join_image_rows(base: nn.Module, unseen: Callable[[], Sequence[int]]) -> list["ImageRows"]:
    """Let a model's images follow their rows' adapters. `unseen` gives the modules that tokens alone don't reach."""
    image_token = image_token_of(getattr(base, "config", None))
    return [ImageRows(module, unseen, image_token) for module in _owners(base)]


def image_token_of(config: object) -> int | None:
    """The token that stands for a part of an image; None for a model without images."""
    return next((value for name in _IMAGE_TOKENS if (value := getattr(config, name, None)) is not None), None)


def vision_owner(base: nn.Module) -> nn.Module | None:
    """The module whose `get_image_features` runs the vision modules; None if no one module has it."""
    owners = _owners(base)
    return owners[0] if len(owners) == 1 else None


def _owners(base: nn.Module) -> list[nn.Module]:
    modules = [module for module in base.modules() if callable(getattr(type(module), _METHOD, None))]
    return [module for module in modules if not any(other in modules for other in module.children())]


class ImageRows:
    """Stands in for one module's `get_image_features`."""

    def __init__(self, module: nn.Module, unseen: Callable[[], Sequence[int]], image_token: int | None) -> None:
        self._module, self._unseen, self._image_token = module, unseen, image_token
        self._whole: Callable[..., Any] = getattr(module, _METHOD)
        self.__signature__ = inspect.signature(self._whole)  # which transformers' generate reads
        vars(module)[_METHOD] = self

    def remove(self) -> None:
        """Give the module its method back."""
        vars(self._module).pop(_METHOD, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        routing, ids = current_routing(), _ids.get()
        if routing is None or routing.is_uniform or not any(routing.adapts(module) for module in self._unseen()):
            return self._whole(*args, **kwargs)
        bound = self.__signature__.bind(*args, **kwargs).arguments
        others = bound.pop("kwargs", {})
        if ids is None or self._image_token is None:
            raise BatchError(f"which image belongs to which row can't be told without input_ids. {_FIX}")
        counts = (ids == self._image_token).sum(dim=1).tolist()
        runs = _runs(routing, len(counts))
        outputs = []
        for part, run in zip(_split({**bound, **others}, counts, runs), runs, strict=True):
            if part is not None:
                with use_routing(routing.images_of(run)):
                    outputs.append(self._whole(**part))
        return _joined(outputs)


def _runs(routing: Routing, num_rows: int) -> list[range]:
    """Neighbouring rows with the same adapters."""
    runs, start = [], 0
    for _, group in groupby(range(num_rows), routing.routes_of):
        stop = start + len(list(group))
        runs.append(range(start, stop))
        start = stop
    return runs


@dataclass(frozen=True)
class _Shares:
    """How many entries of the inputs each row has."""

    images: list[int]
    patches: list[int] | None  # of rows whose patches are packed together


def _split(inputs: Mapping[str, Any], counts: Sequence[int], runs: Sequence[range]) -> Iterator[dict[str, Any] | None]:
    """The inputs of each run of rows; None for a run without images. `counts` are the rows' image tokens."""
    pixels = inputs[_PIXELS]
    if pixels.ndim == 5 and pixels.shape[0] == len(counts):  # [rows, images, channels, height, width]
        for run in runs:
            yield _cut(inputs, run.start, run.stop, pixels) if any(counts[row] for row in run) else None
        return
    shares = _shares(inputs, counts)
    image = patch = 0
    for run in runs:
        images = sum(shares.images[run.start : run.stop])
        part = _cut(inputs, image, image + images, inputs.get(_GRID, pixels))
        image += images
        if shares.patches is not None:
            patches = sum(shares.patches[run.start : run.stop])
            part[_PIXELS] = pixels[patch : patch + patches]
            patch += patches
        yield part if images else None


def _shares(inputs: Mapping[str, Any], counts: Sequence[int]) -> _Shares:
    grid = inputs.get(_GRID)
    if grid is None:
        return _Shares(_equal_images(len(inputs[_PIXELS]), counts), None)
    patches = grid.prod(dim=1).tolist()
    merged = sum(patches) // max(1, sum(counts))  # patches that become one token
    images, of_rows = iter(patches), []
    for count in counts:
        own: list[int] = []
        while sum(own) < count * merged:
            own.append(next(images, -1))
            if own[-1] < 0:
                raise _untold(len(patches), counts)
        if sum(own) != count * merged:
            raise _untold(len(patches), counts)
        of_rows.append(own)
    if next(images, None) is not None:
        raise _untold(len(patches), counts)
    return _Shares([len(own) for own in of_rows], [sum(own) for own in of_rows])


def _equal_images(num_images: int, counts: Sequence[int]) -> list[int]:
    """The rows' images, of as many tokens each; or one a row."""
    size, rest = divmod(sum(counts), num_images)
    if rest == 0 and size and all(count % size == 0 for count in counts):
        return [count // size for count in counts]
    if num_images == sum(1 for count in counts if count):
        return [int(count > 0) for count in counts]
    raise _untold(num_images, counts)


def _untold(num_images: int, counts: Sequence[int]) -> BatchError:
    return BatchError(
        f"{num_images} images came for rows with {list(counts)} image tokens, and which image belongs to which row "
        f"can't be told. {_FIX}"
    )


def _cut(inputs: Mapping[str, Any], start: int, stop: int, like: Any) -> dict[str, Any]:
    """The entries [start, stop) of whatever has as many as `like`."""
    return {
        name: value[start:stop] if isinstance(value, Tensor | list) and len(value) == len(like) else value
        for name, value in inputs.items()
    }


def _joined(outputs: Sequence[Any]) -> Any:
    """The outputs of some images as that of all of them."""
    first = outputs[0]
    if len(outputs) == 1 or not hasattr(first, "keys"):
        return _joined_images(outputs)
    for name in list(first.keys()):
        values = [output[name] for output in outputs]
        is_of_layers = name != _FEATURES and isinstance(values[0], tuple | list)
        if is_of_layers:
            first[name] = [_joined_images(layer) for layer in zip(*values, strict=True)]
        else:
            first[name] = _joined_images(values)
    return first


def _joined_images(values: Sequence[Any]) -> Any:
    """A tensor [images, ..], or one of each image; None where parts don't fit together (states, of other sizes)."""
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], tuple | list):
        return [image for value in values for image in value]
    if isinstance(values[0], Tensor) and len({value.shape[1:] for value in values}) == 1:
        return torch.cat(list(values))
    return None
