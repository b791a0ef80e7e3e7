"""Whether packed passes keep sequences apart in every module, seen by what NaN in one of them reaches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.engine.kv.block_pool import BlockPool, BlockTable
from loraplex.engine.kv.kv_cache import KeyValueCache, LayerShape
from loraplex.engine.kv.sequence_kv import SequenceKV
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.worker.input_batch import InputBatch
from loraplex.engine.worker.state_pool import LEAST_SEQUENCES
from loraplex.errors import BaseModelError

_FIRST = 3  # tokens that each sequence has run before
# How many follow in the pass that is looked at: behind a spoilt sequence stands each time one that must stay clean.
_COUNTS = (1, 1, 4, 5)
_SPOILT = (True, False, True, False)
_BLOCK_TOKENS = 16
assert len(_COUNTS) <= LEAST_SEQUENCES, "the sequences of the check have no room for their states"


@torch.inference_mode()
def check_flow(
    base: PreTrainedModel, shapes: dict[nn.Module, LayerShape], forward: Callable[[InputBatch], Tensor]
) -> None:
    """Raise BaseModelError where a module of packed passes lets a sequence's tokens reach those of another one.

    In one pass, the embeddings of some sequences are NaN, which survives whatever a module computes with them: so this
    holds in every dtype and needs no tolerance.
    """
    num_blocks = len(_COUNTS)  # of its own: the engine's may be fewer
    pool, table = BlockPool(num_blocks, _BLOCK_TOKENS), BlockTable(num_blocks, 1, base.device)
    cache = KeyValueCache(shapes, num_blocks, _BLOCK_TOKENS, base.device)
    kvs = [SequenceKV(list(range(1, 1 + _FIRST + count)), (), (), pool, table) for count in _COUNTS]
    for kv in kvs:
        kv.grow(len(kv.tokens))
    first = InputBatch([_chunk(kv, 0, _FIRST) for kv in kvs], cache, table)
    first.layer_by_layer = True  # also where another engine runs layers of this base model in one call
    forward(first)
    chunks = [_chunk(kv, _FIRST, count) for kv, count in zip(kvs, _COUNTS, strict=True)]
    batch = InputBatch(chunks, cache, table)
    batch.layer_by_layer = True
    is_clean = [not _SPOILT[kvs.index(chunk.kv)] for chunk in batch.chunks for _ in range(chunk.count)]
    clean = torch.tensor(is_clean, device=base.device)
    with _spoilt_embeddings(base, clean), _watched(base, clean) as leaks:
        logits = forward(batch)
    if logits[clean].isnan().any():
        raise BaseModelError(_told(base, leaks))


def _chunk(kv: SequenceKV, start: int, count: int) -> ScheduledChunk:
    return ScheduledChunk(kv=kv, start=start, count=count, wants_logits=True, wants_all_logits=True)


def _told(base: PreTrainedModel, leaks: Sequence[nn.Module]) -> str:
    who = type(leaks[0]).__name__ if leaks else "a module"
    return (
        f"{who} of {type(base).__name__} mixes the tokens of a pass in a way that the engine doesn't know: it keeps no "
        "sequence apart from the others beside it. Use MultiLoraModel.generate for this model."
    )


@contextmanager
def _spoilt_embeddings(base: PreTrainedModel, clean: Tensor) -> Iterator[None]:
    def spoil(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.masked_fill(~clean[None, :, None], torch.nan)

    handle = base.get_input_embeddings().register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watched(base: PreTrainedModel, clean: Tensor) -> Iterator[list[nn.Module]]:
    """The modules that were given clean tokens and returned spoilt ones, the innermost of each first."""
    leaks: list[nn.Module] = []
    num_tokens = len(clean)

    def spoils(value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return any(spoils(item) for item in value)
        if isinstance(value, dict):
            return any(spoils(item) for item in value.values())
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return False
        if value.shape[:2] == (1, num_tokens):
            return bool(value[0, clean].isnan().any())
        return value.shape[:1] == (num_tokens,) and bool(value[clean].isnan().any())

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not leaks and not spoils(args) and not spoils(kwargs) and spoils(output):
            leaks.append(module)

    handles: list[RemovableHandle] = [module.register_forward_hook(look, with_kwargs=True) for module in base.modules()]
    try:
        yield leaks
    finally:
        for handle in handles:
            handle.remove()
