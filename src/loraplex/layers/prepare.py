"""From an adapter at rest to slot weights: the base model's dtype, module numbers, DoRA folded in."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loraplex.adapters.finite import require_finite
from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import UnsupportedAdapterError
from loraplex.layers.base.modules import embed_scale, weight_matrix
from loraplex.layers.reload import read_back_of


def prepare_adapter(
    adapter: Adapter, modules: Mapping[str, nn.Module], module_index: Mapping[str, int], dtype: torch.dtype
) -> PreparedAdapter:
    """Make an adapter that fits the base model ready for a slot."""
    layers = {
        module_index[path]: prepare_weights(path, weights, modules[path], dtype)
        for path, weights in adapter.layers.items()
    }
    ordered = {index: layers[index] for index in sorted(layers)}
    again = read_back_of(adapter, ordered, module_index, dtype)
    return PreparedAdapter(layers=ordered, invocation=adapter.config.alora_invocation_tokens, read_back=again)


def prepare_weights(path: str, weights: LoraWeights, module: nn.Module, dtype: torch.dtype) -> SlotWeights:
    """One module's factors in `dtype`; the LoRA scaling includes an embedding's own scale."""
    scaling = weights.scaling * (embed_scale(module) if weights.kind == "embedding" else 1.0)
    lora_b, dora_scale = weights.lora_b, None
    if weights.magnitude is not None:
        if weights.kind == "embedding" and embed_scale(module) != 1.0:
            raise UnsupportedAdapterError(
                f"DoRA on {path!r} can't be honoured: this embedding scales its output by {embed_scale(module)}, for "
                "which DoRA is not defined. Train the adapter without DoRA on the embedding."
            )
        norm_ratio = dora_norm_ratio(weights, weight_matrix(module))
        lora_b, dora_scale = lora_b.float() * norm_ratio, norm_ratio - 1
    made = SlotWeights(
        lora_a=weights.lora_a.to(dtype).contiguous(),
        lora_b=lora_b.to(dtype).contiguous(),
        scaling=scaling,
        dora_scale=dora_scale,
        num_experts=weights.num_experts,
    )
    _check_range(path, weights, made, dtype)
    return made


def _check_range(path: str, weights: LoraWeights, made: SlotWeights, dtype: torch.dtype) -> None:
    """Raise AdapterFormatError where weights that were finite no longer are; a dtype that stays loses nothing."""
    if made.dora_scale is not None:
        require_finite(made.dora_scale, f"{path!r}: the ratio of DoRA's magnitude to the norm of the merged weight")
    for name, before, after in (("lora_a", weights.lora_a, made.lora_a), ("lora_b", weights.lora_b, made.lora_b)):
        if before.dtype != dtype or made.dora_scale is not None:
            require_finite(after, f"{path!r}: {name} in the base model's dtype")


def dora_norm_ratio(weights: LoraWeights, base_weight: Tensor) -> Tensor:
    """c = m / ||W + scaling * B A||, one for each output row (DoRA, arXiv 2402.09353, section 4), in float32."""
    assert weights.magnitude is not None, "dora_norm_ratio needs a magnitude"
    update = weights.lora_b.float().t() @ weights.lora_a.float()  # [out, in]
    update = update.to(base_weight.device)
    norm = torch.linalg.norm(base_weight.float() + weights.scaling * update, dim=1)
    return weights.magnitude.float() / norm.to(weights.magnitude.device)
