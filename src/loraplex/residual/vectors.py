"""Steering vectors from contrasting prompts: what attention blocks put out for the one kind and not for the other."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import SteeringVector


@torch.no_grad()
def vector_from_pairs(
    base: PreTrainedModel,
    layers: AttentionLayers,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],  # (wanted, unwanted)
    *,
    at: Sequence[int] | None = None,
) -> SteeringVector:
    """vectors[layer] = mean over the pairs of block(wanted) - block(unwanted), at each text's last token.

    block is the attention block's output, where residuals are added, so weight 1 adds the mean difference. (Difference
    of means, as in contrastive activation addition, arXiv 2312.06681, there on the residual stream.)
    """
    if not pairs:
        raise RequestError("there are no pairs. Give at least one (wanted, unwanted) pair of texts.")
    wanted = sorted(layers.layers) if at is None else list(at)
    unknown = [layer for layer in wanted if layer not in layers.layers]
    if unknown or not wanted:
        raise RequestError(f"layers {unknown or wanted} don't exist; the base model has {sorted(layers.layers)}.")
    sums = {layer: torch.zeros(layers.identity.hidden_size) for layer in wanted}
    for texts in pairs:
        for text, sign in zip(texts, (1, -1), strict=True):
            for layer, output in _last_outputs(base, layers, tokenizer, text, wanted).items():
                sums[layer] += sign * output
    return SteeringVector(vectors={layer: total / len(pairs) for layer, total in sums.items()}, base=layers.identity)


def _last_outputs(
    base: PreTrainedModel,
    layers: AttentionLayers,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    wanted: Sequence[int],
) -> dict[int, Tensor]:
    """The attention blocks' outputs [hidden] at a text's last token."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(base.device)
    if ids.shape[1] == 0:
        raise RequestError(f"the text {text!r} has no tokens. Give texts with at least one.")
    outputs: dict[int, Tensor] = {}

    def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        block_output = output[0] if isinstance(output, tuple) else output
        outputs[layer] = block_output[0, -1].float().cpu()

    def hook(layer: int, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, args, output: keep(layer, output))

    handles = [hook(layer, base.get_submodule(layers.layers[layer].path)) for layer in wanted]
    try:
        base.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
