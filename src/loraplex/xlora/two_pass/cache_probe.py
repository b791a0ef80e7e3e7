"""What a base model does with a cache of keys and values, tried on a few tokens."""

import logging
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.errors import RequestError
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.base.decoder import find_decoder
from loraplex.layers.base.unchanged import left_unchanged
from loraplex.layers.rows.probe import Recorder, different_ids
from loraplex.xlora.two_pass.cache import PairedCache

logger = logging.getLogger(__name__)

_NUM_PAST = 5
_SAME = 0.1  # of the distance of two tokens' hidden states


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """How the base model's decoder goes on from a cache of both passes."""

    works: bool = True  # it computes what it computes without one
    sees_past: frozenset[int] = frozenset()  # modules that see the tokens in the cache beside the new ones


def probe_cache(base: PreTrainedModel, adaptable: AdaptableModel) -> CacheUse:
    """Go on from a cache by one token; nothing of it stays."""
    decoder = find_decoder(base)
    assert decoder is not None, "mixtures are made for models with a decoder only"
    ids = different_ids(base, 1)[:, : _NUM_PAST + 1]
    recorder = Recorder(adaptable.modules, adaptable.shapes)
    try:
        with left_unchanged(base), torch.no_grad(), recorder.attached():
            whole = _run(decoder, ids, 0, use_cache=False)
            cache = PairedCache(base.config, ())
            cache.begin(1, 1)
            _run(decoder, ids[:, :-1], 0, past_key_values=cache, use_cache=True)
            cache.main_length = _NUM_PAST
            cache.show_main()
            calls, (last,) = recorder.record(
                lambda: _run(decoder, ids[:, -1:], _NUM_PAST, past_key_values=cache, use_cache=True)
            )
    except RequestError:  # its layers keep something else, which the call that wants a cache is told
        return CacheUse(works=False)
    except Exception as error:  # whatever a model raises that keeps its state in another way
        logger.info("%s can't go on from a cache of keys and values: %s", type(base).__name__, error)
        return CacheUse(works=False)
    past = [path for path, inputs in calls.items() if any(x[..., 0].numel() > 1 for x in inputs)]
    sees_past = frozenset(adaptable.module_index[path] for path in past)
    return CacheUse(works=_is_near(last, whole), sees_past=sees_past)


def _run(decoder: nn.Module, ids: Tensor, first: int, **inputs: Any) -> Tensor:  # [tokens, hidden]
    """The hidden states of one sequence's tokens from position `first` on."""
    if "position_ids" in signature(decoder.forward).parameters:  # else some models take them from an earlier call
        inputs["position_ids"] = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    hidden: Tensor = decoder(input_ids=ids, **inputs).last_hidden_state
    return hidden[0]


def _is_near(last: Tensor, whole: Tensor) -> bool:  # [hidden], [tokens, hidden]
    usual = (whole[-1] - whole[:-1]).float().norm(dim=-1).median()
    return bool((last - whole[-1]).float().norm() <= _SAME * usual)
