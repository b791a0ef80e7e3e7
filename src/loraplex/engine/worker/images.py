"""Images in packed passes: made into features once a request, by the model's own vision modules.

transformers' wrappers put the features in the place of the image tokens' embeddings before they call the language
model. A packed pass has chunks of many requests, so the same is done as the language model is called, for the image
tokens that the pass has. The features of a request go through its own adapters, and don't depend on its neighbours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.engine.kv.sequence_kv import SequenceRoute
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.sched.images import ImageFeatures, RequestImages
from loraplex.engine.worker.input_batch import BatchImages, InputBatch, current_input_batch
from loraplex.errors import RequestError
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.rows.images import vision_owner
from loraplex.routing.routing import use_routing
from loraplex.routing.rows import Route, RowRouting
from loraplex.routing.weight_provider import WeightProvider


class ImageEncoder:
    """One base model's vision modules, joined to packed passes."""

    def __init__(self, base: PreTrainedModel, adaptable: AdaptableModel, bank: WeightProvider) -> None:
        self._adaptable, self._bank = adaptable, bank
        self._owner = vision_owner(base)
        self._dtype = base.dtype
        self._handle = None
        if self._owner is not None:
            language: nn.Module = self._owner.get_decoder()  # type: ignore[operator]
            self._handle = language.register_forward_pre_hook(_place_images, with_kwargs=True)

    def leave(self) -> None:
        """Give the model back as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def embed(self, batch: InputBatch) -> None:
        """Put the features of the pass's image tokens into the batch.

        Raises RequestError where the images make another number of features than the prompt has image tokens.
        """
        found = [(i, *spans) for i, chunk in enumerate(batch.chunks) if (spans := _spans(chunk)) is not None]
        if not found:
            return
        mask = torch.zeros(batch.num_tokens, dtype=torch.bool)
        parts: list[ImageFeatures] = []
        for i, images, first, stop in found:
            chunk = batch.chunks[i]
            mask[[batch.offsets[i] + index - chunk.start for index in images.indices[first:stop]]] = True
            parts.append(self._features(images, chunk.kv.routes).rows(first, stop))
        joined = ImageFeatures(
            embeds=torch.cat([part.embeds for part in parts]),
            deepstack=tuple(map(torch.cat, zip(*(part.deepstack for part in parts), strict=True))),
        )
        batch.images = BatchImages(mask=mask.to(batch.positions.device), features=joined)
        if joined.deepstack:
            batch.layer_by_layer = True

    def _features(self, images: RequestImages, routes: Sequence[SequenceRoute]) -> ImageFeatures:
        """Made at the first pass that needs them; passes with other adapters of vision modules have their own."""
        unseen = set(self._adaptable.unseen())
        own = tuple(
            Route(slot=route.slot, weight=route.weight)
            for route in routes
            if not unseen.isdisjoint(self._bank.layers(route.slot))
            or any(path not in self._adaptable.tables for path in self._bank.changes(route.slot))
        )
        known = images.features.get(own)
        if known is None:
            known = self._encode(images, own)
            if len(known.embeds) != len(images.indices):
                raise RequestError(
                    f"the images make {len(known.embeds)} features, but the prompt has {len(images.indices)} image "
                    "tokens. Give the token ids and the tensors that transformers' processor made together."
                )
            images.features[own] = known
        return known

    def _encode(self, images: RequestImages, routes: tuple[Route, ...]) -> ImageFeatures:
        assert self._owner is not None, "a request's images were taken for a model without vision modules"
        device = next(self._owner.parameters()).device
        inputs = {
            name: value.to(device, self._dtype) if value.is_floating_point() else value.to(device)
            for name, value in images.inputs.items()
        }
        with use_routing(RowRouting([routes], self._bank)):
            output = self._owner.get_image_features(**inputs, return_dict=True)  # type: ignore[operator]
        deepstack = getattr(output, "deepstack_features", None) or ()
        return ImageFeatures(
            embeds=_rows(output.pooler_output).to(self._dtype), deepstack=tuple(_rows(layer) for layer in deepstack)
        )


def _spans(chunk: ScheduledChunk) -> tuple[RequestImages, int, int] | None:
    """A chunk's images, and which of their tokens it has; None for a chunk without image tokens."""
    if chunk.images is None:
        return None
    first, stop = chunk.images.tokens_in(chunk.start, chunk.stop)
    return (chunk.images, first, stop) if first < stop else None


def _rows(features: Tensor | Sequence[Tensor]) -> Tensor:  # [image tokens, hidden]
    """Of all images, which transformers gives one by one or as one tensor."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.flatten(0, -2) for part in parts])


def _place_images(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The call of the language model with features in the place of the image tokens' embeddings."""
    batch = current_input_batch()
    if batch is None or batch.images is None:
        return None
    mask, features = batch.images.mask.unsqueeze(0), batch.images.features
    embeds = kwargs["inputs_embeds"]
    placed = {"inputs_embeds": embeds.masked_scatter(mask.unsqueeze(-1), features.embeds.to(embeds))}
    if features.deepstack:
        placed |= {"visual_pos_masks": mask, "deepstack_visual_embeds": list(features.deepstack)}
    return args, kwargs | placed
