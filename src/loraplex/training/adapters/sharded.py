"""What can be trained on a base model whose weights are shared out over the processes."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from loraplex.errors import ConfigError
from loraplex.training.adapters.config import AdapterJob
from loraplex.training.adapters.links import needs_attention
from loraplex.training.core.config import TrainConfig
from loraplex.training.core.distributed import ProcessGroup


def check_sharded(base: PreTrainedModel, jobs: Sequence[AdapterJob], config: TrainConfig, ranks: ProcessGroup) -> None:
    """Raise ConfigError for what needs a sharded base model's weights whole, or runs parts of it."""
    if config.packing:
        raise ConfigError("fsdp and packing are both True; rows are packed on whole base models only. Set one.")
    for job in jobs:
        if job.lora is not None and job.lora.use_dora:
            raise ConfigError(
                f"{job.label}: fsdp is True, but DoRA needs whole weights of the base model in every step. Set "
                "use_dora=False, or leave fsdp out."
            )
        if needs_attention(job) or job.reft is not None:
            raise ConfigError(f"{job.label}: fsdp is True, which residuals don't have. Leave fsdp out.")
    _check_plain_weights(base)
    if ranks.num_processes == 1:
        raise ConfigError(
            "fsdp is True, but there is one process. Start several: accelerate launch --num_processes 2 -m "
            "loraplex.cli.train ..., or leave fsdp out."
        )


def _check_plain_weights(base: PreTrainedModel) -> None:
    """Raise ConfigError for quantized weights, and those that are held in another form: only plain ones are cut."""
    for name, parameter in base.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(
                f"fsdp is True, but {name!r} of the base model is a {type(parameter).__name__} of {dtype}, which can't "
                "be shared out. Load the base model anew and without quantization (weights='auto'), or leave fsdp out."
            )
