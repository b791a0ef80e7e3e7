"""Starting a model runner: what it gives is compared with the base model before it serves anybody."""

import logging
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from loraplex.engine.config import EngineConfig
from loraplex.engine.startup.chunk_keys import limit_chunk_keys
from loraplex.engine.startup.model_check import ModelCheck
from loraplex.engine.startup.step_tokens import best_step_tokens
from loraplex.engine.startup.token_flow import check_flow
from loraplex.engine.startup.trial_passes import SHORT_LENGTH, TrialPasses, TrialRow, trial_groups
from loraplex.engine.worker.cuda_graphs import GraphRecorder
from loraplex.engine.worker.fusion.cpu_fusion import Trial
from loraplex.engine.worker.model_runner import ModelRunner
from loraplex.errors import ConfigError
from loraplex.kernels.dispatch import native_runs
from loraplex.layers.base.module_kinds import first_layers
from loraplex.layers.quantized.int8_outliers import has_outliers
from loraplex.layers.quantized.kinds import quantized_modules
from loraplex.models.multi_lora import MultiLoraModel

logger = logging.getLogger(__name__)


def start_model_runner(model: MultiLoraModel, config: EngineConfig) -> ModelRunner:
    """Raises BaseModelError for a base model that packed passes can't run, and ConfigError."""
    if config.batch_invariant and any(quantized_modules(model.base)):
        raise ConfigError(
            "batch_invariant is True, but the base model has quantized modules, whose products have other bits for "
            "other numbers of tokens. Leave batch_invariant out."
        )
    runner = ModelRunner(model, config)
    try:
        part = _checked_part(runner)
        check_flow(part, runner.shapes, partial(runner.forward, base=part))
        _check_model(runner, part)
        records = runner.lengths.is_step and not any(
            map(has_outliers, model.base.modules())
        )  # they have no fixed shape
        if model.base.device.type == "cuda" and runner.config.cuda_graphs and records:
            runner.use_graphs(GraphRecorder())
        if native_runs(runner.model.base.device, runner.model.dtype):
            limit_chunk_keys(runner)
        if runner.config.max_step_tokens is None:
            runner.config = replace(runner.config, max_step_tokens=best_step_tokens(runner))
    except BaseException:
        runner.close()
        raise
    return runner


def _checked_part(runner: ModelRunner) -> PreTrainedModel:
    """The model up to a layer of each kind: what long passes at all positions are tried on."""
    base = runner.model.base
    part = first_layers(base, runner.attends)
    try:
        with torch.inference_mode():
            part(input_ids=torch.ones(1, 2, dtype=torch.int64, device=base.device), use_cache=False)
    except Exception as error:  # its forward counts its layers in another way
        logger.debug("all layers of %s are checked: %s: %s", type(base).__name__, type(error).__name__, error)
        return base
    return part


def _check_model(runner: ModelRunner, part: PreTrainedModel) -> None:
    """Compare packed passes with the model's own; take modules over where that changes nothing.

    A layer of each kind with long sequences at all positions; then all layers with a few tokens, in which those would
    show that do something of their own. Raises BaseModelError for a model whose tokens depend on something that packed
    passes don't know.
    """
    base = runner.model.base
    chunks = [shape.terms.mask_rule.chunk for shape in runner.shapes.values()]
    groups = trial_groups(base, runner.max_length, step=max((chunk for chunk in chunks if chunk), default=1))
    if runner.lengths.threshold is not None:  # a pass of the model's own gives all its rows the longest one's length
        groups = [[row] for group in groups for row in group]
    room = (runner.pool, runner.table, runner.cache)
    of_part, of_all = TrialPasses(*room, partial(runner.forward, base=part)), TrialPasses(*room, runner.forward)
    ModelCheck(part, runner.attends, groups, runner.forget_lengths).run(of_part)
    few = [[TrialRow(row.tokens[:SHORT_LENGTH]) for row in groups[0]]]
    if part is not base:
        ModelCheck(base, runner.attends, few, runner.forget_lengths).run(of_all)
    if native_runs(base.device, runner.model.dtype):
        runner.fuse(Trial(run=lambda: of_part.run(groups, 3), run_all=lambda: of_all.run(few, 3)))
