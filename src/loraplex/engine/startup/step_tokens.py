"""How many tokens a pass should have where nobody says: as few as reach nearly all of this machine's speed."""

import hashlib
import time
from collections.abc import Sequence

import torch

from loraplex.engine.kv.sequence_kv import SequenceKV
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.worker.fusion.linear_products import linear_shapes
from loraplex.engine.worker.model_runner import ModelRunner
from loraplex.kernels.tuning import is_measured, measured_once

USUAL_STEP_TOKENS = 256  # of models too small to be measured, and while others work on the machine
_FIRST, _LAST = 64, 2048
_ENOUGH = 0.93  # of the best tokens a second
LONG_S = 0.5  # of a pass: longer ones are not tried, which other answers would wait for
_SIZE_S = 0.15  # for one size, in which a pass is repeated
_MIN_PASSES, _MAX_PASSES = 2, 8  # of one size


def best_step_tokens(runner: ModelRunner) -> int:
    """The tokens of a pass with which prompts are read at nearly the best speed; measured once for a model's shapes."""
    shapes = linear_shapes(runner.model.base)
    if not any(map(is_measured, shapes)):
        return USUAL_STEP_TOKENS
    device = runner.model.base.device
    where = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    digest = hashlib.sha256(", ".join(map(str, shapes)).encode()).hexdigest()
    name = f"step tokens on {where} {digest[:16]}"
    return measured_once(name, lambda: _measure(runner), USUAL_STEP_TOKENS)


def _measure(runner: ModelRunner) -> int:
    rates: dict[int, float] = {}  # tokens a second
    tokens = _FIRST
    while tokens <= min(_LAST, runner.max_length):
        seconds = fastest_pass(runner, tokens)
        rates[tokens] = tokens / seconds
        if seconds > LONG_S or _have_peaked(list(rates.values())):
            break
        tokens *= 2
    best = max(rates.values(), default=0)
    return next((tokens for tokens, rate in rates.items() if rate >= _ENOUGH * best), USUAL_STEP_TOKENS)


def _have_peaked(rates: Sequence[float]) -> bool:
    """Whether the last two sizes are no faster than one before them: one of them may have been disturbed."""
    return len(rates) > 2 and max(rates[-2:]) < max(rates[:-2])


def fastest_pass(runner: ModelRunner, num_tokens: int) -> float:
    """Seconds of the fastest of some passes."""
    times: list[float] = []
    while len(times) < _MIN_PASSES or (sum(times) < _SIZE_S and len(times) < _MAX_PASSES):
        times.append(_pass_seconds(runner, num_tokens))
    return min(times)


def _pass_seconds(runner: ModelRunner, num_tokens: int) -> float:
    """Of a pass that reads a prompt."""
    kv = SequenceKV([1] * num_tokens, (), (), runner.pool, runner.table)
    try:
        kv.grow(num_tokens)
        start = time.perf_counter()
        runner.run([ScheduledChunk(kv=kv, start=0, count=num_tokens, wants_logits=True)])
        return time.perf_counter() - start
    finally:
        kv.close()
