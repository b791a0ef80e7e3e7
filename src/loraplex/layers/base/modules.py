"""Which modules of a transformers model can carry adapters, and what shape they have."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.weights import ModuleShape
from loraplex.layers.quantized.kinds import dequantized_weight, quantized_kind


def adaptable_modules(base: PreTrainedModel) -> dict[str, ModuleShape]:
    """Every linear module and the input embedding, by path, in registration order (that numbers LoRA layers).

    Other embeddings (positions, token types) don't see one id per token and row, so no row can own their output.
    """
    embedding = input_embedding(base)
    shapes = {}
    for path, module in base.named_modules():
        if isinstance(module, Conv1D):
            shapes[path] = ModuleShape(kind="linear", in_features=module.nx, out_features=module.nf)
        elif isinstance(module, nn.Linear) or quantized_kind(module) is not None:
            shapes[path] = ModuleShape(kind="linear", in_features=module.in_features, out_features=module.out_features)
        elif module is embedding and isinstance(module, nn.Embedding):
            shapes[path] = ModuleShape(
                kind="embedding", in_features=module.num_embeddings, out_features=module.embedding_dim
            )
    return shapes


def input_embedding(base: PreTrainedModel) -> nn.Module | None:
    """The module that looks tokens up; None for a model that has no such module (it hashes them, or reads bytes)."""
    try:
        return base.get_input_embeddings()
    except NotImplementedError:
        return None


def output_module(base: PreTrainedModel) -> str | None:
    """The path of the output layer (lm_head), which PEFT's "all-linear" leaves out."""
    output = base.get_output_embeddings()
    return next((path for path, module in base.named_modules() if output is not None and module is output), None)


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """A linear module's weight as [out, in], a quantized one's values too; an embedding's as [hidden, vocab]."""
    if quantized_kind(module) is not None:
        return dequantized_weight(module)
    weight = module.weight
    assert isinstance(weight, torch.Tensor), f"{type(module).__name__} has no weight tensor"
    return weight.t() if isinstance(module, (Conv1D, nn.Embedding)) else weight


def embed_scale(module: nn.Module) -> float:
    """The factor by which some embeddings (Gemma) multiply what they look up; their adapters take it too."""
    scale = getattr(module, "embed_scale", None)
    return 1.0 if scale is None else float(scale)
