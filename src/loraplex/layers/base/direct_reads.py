"""Modules whose weight the base model reads without running them: an adapter there does nothing until it is merged.

Mamba's `dt_proj` is one: the mixer multiplies with its weight itself. No hook and no PEFT layer sees that.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.adapters.weights import ModuleShape
from loraplex.layers.base.unchanged import left_unchanged
from loraplex.layers.rows.probe import Recorder, different_ids, run_tokens

logger = logging.getLogger(__name__)


@torch.no_grad()
def read_directly(
    base: PreTrainedModel, modules: Mapping[str, nn.Module], shapes: Mapping[str, ModuleShape]
) -> list[str]:
    """Those of `modules` that a few tokens don't reach, though their weights change what the model answers.

    Tried by running the model with these weights negated, which is undone exactly. What the tokens reach neither way
    (experts that they don't choose, modules for images) isn't among them, and nothing is if the model can't run tokens.
    """
    recorder = Recorder(modules, shapes)
    ids = different_ids(base, 1)
    try:
        with left_unchanged(base), recorder.attached():
            calls, before = recorder.record(lambda: _answer(base, ids))
            unreached = [path for path in modules if path not in calls]
            if not unreached or _is_same(before, _negated(base, modules, unreached, ids)):
                return []
            return [path for path in unreached if not _is_same(before, _negated(base, modules, [path], ids))]
    except Exception as error:  # whatever a model raises that needs other inputs than tokens
        logger.info("what %s reads of its weights is not known: it can't run tokens: %s", type(base).__name__, error)
        return []


def _answer(base: PreTrainedModel, ids: Tensor) -> Tensor:
    torch.default_generator.manual_seed(0)
    answer: Tensor = run_tokens(base, ids)[0]
    return answer


def _negated(base: PreTrainedModel, modules: Mapping[str, nn.Module], paths: list[str], ids: Tensor) -> Tensor:
    """The answer with the weights of these modules negated, each once though some share it."""
    weights = {id(weight): weight for path in paths if isinstance(weight := modules[path].weight, nn.Parameter)}
    for weight in weights.values():
        weight.data.neg_()
    try:
        return _answer(base, ids)
    finally:
        for weight in weights.values():
            weight.data.neg_()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
