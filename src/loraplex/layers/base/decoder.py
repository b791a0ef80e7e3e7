"""Which part of a model makes the hidden states that its output layer reads."""

from inspect import signature

from torch import nn
from transformers import PreTrainedModel


def find_decoder(base: PreTrainedModel) -> nn.Module | None:
    """What computes the last hidden states that the output layer reads; None if the model has no such part."""
    if base.base_model is not base:
        return base.base_model
    parts = (part for part in base.modules() if isinstance(part, PreTrainedModel) and part is not base)
    return next((part for part in parts if _reads_tokens(part) and part.get_output_embeddings() is None), None)


def _reads_tokens(part: nn.Module) -> bool:
    return "input_ids" in signature(part.forward).parameters
