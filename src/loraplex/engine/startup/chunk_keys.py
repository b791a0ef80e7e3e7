"""Up to how many keys a prompt's tokens may see for the compiled layers, where the processor has no tiles.

Their attention goes token by token then, which the calls from Python for each module take as long as sooner or later.
"""

import hashlib

from loraplex.engine.startup.step_tokens import LONG_S, fastest_pass
from loraplex.engine.worker import native_ops
from loraplex.engine.worker.fusion.layer_stack import USUAL_CHUNK_KEYS
from loraplex.engine.worker.fusion.linear_products import linear_shapes
from loraplex.engine.worker.model_runner import ModelRunner
from loraplex.kernels.tuning import ALL_TOKENS, is_measured, measured_once

_FIRST, _LAST = 16, 512  # tokens of a prompt


def limit_chunk_keys(runner: ModelRunner) -> None:
    """Let layers run in one call as long as that is the faster way on this machine; measured once for a model's shapes.

    Nothing changes where prompts are attended to on tiles.
    """
    shapes = linear_shapes(runner.model.base)
    if native_ops.attends_prompts(runner.model.dtype, runner.cache.dtype) or not any(map(is_measured, shapes)):
        return
    kinds = sorted({f"{s.num_kv_heads}x{s.key_dim}" for s in runner.shapes.values()})
    digest = hashlib.sha256(", ".join([*map(str, shapes), *kinds]).encode()).hexdigest()
    name = f"chunk keys {digest[:16]}"
    runner.limit_chunk_keys(measured_once(name, lambda: _measure(runner), USUAL_CHUNK_KEYS))


def _measure(runner: ModelRunner) -> int:
    """The keys of the longest prompt that is read faster in one call than module by module."""
    limit, tokens = 0, _FIRST
    while tokens <= min(_LAST, runner.max_length):
        seconds = []
        for allowed in (ALL_TOKENS, 0):
            runner.limit_chunk_keys(allowed)
            seconds.append(fastest_pass(runner, tokens))
        if seconds[0] > seconds[1]:
            return limit
        limit = tokens * (tokens + 1) // 2
        if max(seconds) > LONG_S:
            return limit
        tokens *= 2
    return ALL_TOKENS if tokens > _LAST else limit
