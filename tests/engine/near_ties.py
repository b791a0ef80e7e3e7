"""Models of 16 bits whose best two logits are equal once they are rounded, and what chose a token."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.architectures.variants import make_model

_LOUD = 8.0  # the output layer's weights, so that logits are large and 16 bits tell them apart by a tenth


def near_tied(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A tiny model in which the tokens 2i and 2i + 1 differ by one bit of one weight of the output layer.

    Which of the two is larger follows from the sign of one feature; of the rounded logits they are mostly equal.
    """
    base = make_model(name).to(dtype)
    output, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    weight = embedding.weight.detach().clone() * _LOUD
    weight[1::2] = weight[::2]
    feature = int(weight.abs().amin(dim=0).argmax())
    weight[1::2, feature] = torch.nextafter(weight[::2, feature], torch.full_like(weight[::2, feature], torch.inf))
    output.weight = nn.Parameter(weight, requires_grad=False)
    return base


@dataclass
class Seen:
    """One call of the output layer."""

    hidden: Tensor  # [tokens, hidden]
    logits: Tensor  # [tokens, vocab]

    def expected(self, weight: Tensor) -> Tensor:
        """The logits in float64."""
        return self.hidden.double() @ weight.double().t()


@contextmanager
def output_layer_seen(base: PreTrainedModel) -> Iterator[list[Seen]]:
    """What the output layer reads and gives inside the block."""
    seen: list[Seen] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(Seen(args[0].detach().flatten(0, -2).clone(), output.detach().flatten(0, -2).clone()))

    handle = base.get_output_embeddings().register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
