"""The images of a chat: encoded pictures out of data URIs. Nothing is fetched from an address."""

import base64
import binascii
import re
from collections.abc import Sequence

from transformers import PreTrainedConfig

from loraplex.layers.rows.images import image_token_of
from loraplex.server.api.api_errors import BAD_REQUEST, TOO_LARGE, ApiError
from loraplex.server.api.messages import Message

_START = re.compile(r"data:image/[a-z.+-]{1,32};base64,", re.IGNORECASE)


def images_of(
    messages: Sequence[Message], model_config: PreTrainedConfig, most: int, *, param: str, numbered: bool = True
) -> list[bytes]:
    """The messages' pictures, still encoded, in their order.

    `numbered`: the messages are those of the request's field `param`, one for each. Raises ApiError: for too many, and
    of a model that takes none, before any is decoded.
    """
    found = [
        (f"{param}.{number}.content" if numbered else param, part["url"])
        for number, message in enumerate(messages)
        if isinstance(message.content, list)
        for part in message.content
        if part["type"] == "image_url"
    ]
    if len(found) > most:
        message = f"the messages have {len(found)} images; {most} are possible (max_images)."
        raise ApiError(TOO_LARGE, message, param=param)
    if found and image_token_of(model_config) is None:
        kind = model_config.model_type
        raise ApiError(BAD_REQUEST, f"the messages have images, but {kind!r} takes none.", param=found[0][0])
    return [_decoded(url, place) for place, url in found]


def _decoded(url: str, param: str) -> bytes:
    start = _START.match(url)
    if start is None:
        raise ApiError(
            BAD_REQUEST,
            f'{param}: image_url must be a data URI, "data:image/png;base64,..."; addresses are not fetched.',
            param=param,
        )
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except binascii.Error as error:
        raise ApiError(BAD_REQUEST, f"{param}: the image is no base64: {error}.", param=param) from error
