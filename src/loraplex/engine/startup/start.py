"""Starting a model runner: what it gives is compared with the base model before it serves anybody."""

from loraplex.engine.config import EngineConfig
from loraplex.engine.startup.model_check import ModelCheck
from loraplex.engine.startup.token_flow import check_flow
from loraplex.engine.startup.trial_passes import TrialPasses, trial_groups
from loraplex.engine.worker.cuda_graphs import GraphRecorder
from loraplex.engine.worker.model_runner import ModelRunner
from loraplex.kernels.dispatch import native_runs
from loraplex.models.multi_lora import MultiLoraModel


def start_model_runner(model: MultiLoraModel, config: EngineConfig) -> ModelRunner:
    """Raises BaseModelError for a base model that packed passes can't run, and ConfigError."""
    runner = ModelRunner(model, config)
    try:
        check_flow(model.base, runner.shapes, runner.forward)
        _check_model(runner)
        if model.base.device.type == "cuda" and runner.config.cuda_graphs and runner.lengths.is_step:
            runner.use_graphs(GraphRecorder())
    except BaseException:
        runner.close()
        raise
    return runner


def _check_model(runner: ModelRunner) -> None:
    """Compare packed passes with the model's own; take modules over where that changes nothing.

    Raises BaseModelError for a model whose tokens depend on something that packed passes don't know.
    """
    base = runner.model.base
    chunks = [shape.terms.mask_rule.chunk for shape in runner.shapes.values()]
    groups = trial_groups(base, runner.max_length, step=max((chunk for chunk in chunks if chunk), default=1))
    if runner.lengths.threshold is not None:  # a pass of the model's own gives all its rows the longest one's length
        groups = [[row] for group in groups for row in group]
    passes = TrialPasses(runner.pool, runner.table, runner.cache, runner.forward)
    ModelCheck(base, runner.attends, groups, runner.forget_lengths).run(passes)
    if native_runs(base.device, runner.model.dtype):
        runner.fuse(lambda: passes.run(groups, 3))
