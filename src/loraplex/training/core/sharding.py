"""FSDP: each process keeps a share of the base model's weights, and gathers a layer's when it runs.

The processes are accelerate's (`accelerate launch`, torchrun), the sharding torch's `fully_shard`, without
accelerate's wrapper, which knows no frozen model and no CPU. Adapters are whole on every process.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from loraplex.errors import ConfigError
from loraplex.training.core.distributed import ProcessGroup

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")


def shard_base(base: PreTrainedModel, ranks: ProcessGroup) -> None:
    """Shard the base model over all processes, layer by layer; it stays so, and runs on all of them together.

    Raises ConfigError for a model whose layers aren't known.
    """
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"fsdp is True, but the layers of {type(base).__name__} aren't known. Leave fsdp out.")
    mesh = init_device_mesh(ranks.device.type, (ranks.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(base, mesh=mesh, reshard_after_forward=True)  # else its own weights stay whole after an evaluation
    logger.info("the base model is sharded over %d processes", ranks.num_processes)


@contextmanager
def all_layers_run_backward(base: PreTrainedModel) -> Iterator[None]:
    """Inside the block gradients reach every layer, whichever a process's rows adapt.

    Gathering a layer's weights takes all processes, in the backward pass too.
    """

    def require(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y.requires_grad_() if torch.is_grad_enabled() and y.is_leaf else y

    handle = base.get_input_embeddings().register_forward_hook(require)
    try:
        yield
    finally:
        handle.remove()


def same_number(batches: Sequence[Batch], filler: Batch, ranks: ProcessGroup, device: torch.device) -> list[Batch]:
    """The batches, and as many of `filler` as make every process run equally many."""
    counts = torch.zeros(ranks.num_processes, device=device)
    counts[ranks.index] = len(batches)
    most = int(ranks.add_up(counts).max())
    return [*batches, *[filler] * (most - len(batches))]
