"""How what an adapter brings in the place of a module's own weights differs from them: the changes that run."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.finite import require_finite
from loraplex.adapters.store.module_change import ModuleChange
from loraplex.adapters.weights import LoraWeights, ModuleShape, TokenRows
from loraplex.errors import UnsupportedAdapterError
from loraplex.kernels.int8_weight import Int8Weight
from loraplex.layers.base.modules import embed_scale, weight_matrix
from loraplex.layers.own_weights.module_changes import EmbeddingChange, LinearChange, OtherChange
from loraplex.validation import listed


class Replacement(NamedTuple):
    """What takes the place of one parameter."""

    whole: Tensor | None = None  # of the parameter's shape
    rows: TokenRows | None = None  # on top of that


def module_change(
    path: str,
    module: nn.Module,
    shape: ModuleShape | None,
    replacements: Mapping[str, Replacement],
    weights: LoraWeights | None,
    dtype: torch.dtype,
) -> ModuleChange | None:
    """What `replacements`, by parameter name, change; None where they are the module's own weights.

    `shape` is None for a module that factors can't adapt; `weights` are the adapter's factors there, whose bias counts
    too. Raises UnsupportedAdapterError for a module that can't be changed row by row, and for DoRA over another weight.
    """
    if shape is None:
        return _other_change(path, module, replacements, dtype)
    weight = replacements.get("weight")
    difference = None if weight is None else row_difference(module, weight, dtype)
    if difference is not None and weights is not None and weights.magnitude is not None:
        raise UnsupportedAdapterError(
            f"DoRA on {path!r} can't be honoured: the adapter comes with another weight of that module than the base "
            "model has. Load the base model that the adapter was trained on."
        )
    if shape.kind == "embedding":
        return None if difference is None else _embedding_change(path, module, difference, dtype)
    bias = _bias_difference(module, replacements.get("bias"), dtype)
    if weights is not None and weights.bias is not None:
        own = (weights.scaling * weights.bias.to(_wide(dtype))).to(dtype)
        bias = own if bias is None else bias + own.to(bias.device)
    if difference is None and bias is None:
        return None
    return _linear_change(path, module, difference, bias, dtype)


class RowDifference(NamedTuple):
    """How a replacement's rows differ from those of a weight [out, in], or an embedding's [vocab, hidden]."""

    rows: Tensor  # [changed] int64  those of both
    change: Tensor  # [changed, in]  new - old
    added: Tensor  # [added, in]  rows behind the base's
    size: int  # rows of the new one


def row_difference(module: nn.Module, replacement: Replacement, dtype: torch.dtype) -> RowDifference | None:
    """None for the same rows. What is told is at least of float32."""
    parameter = module.weight
    assert isinstance(parameter, Tensor), f"{type(module).__name__} has no weight tensor"
    base, (whole, rows), wide = parameter.detach(), replacement, _wide(dtype)
    if isinstance(parameter, Int8Weight) and whole is not None and whole.shape == parameter.shape:
        whole = None if parameter.is_made_of(whole) else whole
    whole = None if whole is None else whole.to(base.device)
    if isinstance(module, Conv1D):
        base, whole = base.t(), None if whole is None else whole.t()
    tokens = torch.tensor([] if rows is None else rows.tokens, dtype=torch.int64, device=base.device)
    values = base.new_zeros(0, base.shape[1], dtype=wide) if rows is None else rows.values.to(base.device, wide)
    num_common = len(base) if whole is None else min(len(base), len(whole))
    index = tokens[tokens < num_common]
    if whole is not None:
        index = torch.cat([index, _unequal_rows(whole[:num_common], base[:num_common])]).unique()
    else:
        index = index.sort().values
    old = base[index].to(wide)
    new = old.clone() if whole is None else whole[index].to(wide)
    new[torch.searchsorted(index, tokens[tokens < num_common])] = values[tokens < num_common]
    size = max(len(base) if whole is None else len(whole), int(tokens.max()) + 1 if len(tokens) else 0)
    added = base.new_zeros(max(0, size - len(base)), base.shape[1], dtype=wide)
    if whole is not None and len(whole) > len(base):
        added[: len(whole) - len(base)] = whole[len(base) :].to(wide)
    added[tokens[tokens >= len(base)] - len(base)] = values[tokens >= len(base)]
    if not len(index) and size == len(base):
        return None
    return RowDifference(index, new - old, added, size)


def _unequal_rows(new: Tensor, base: Tensor) -> Tensor:  # [changed] int64
    """Rounding to the narrower dtype of the two is no difference."""
    same = (new.to(base.dtype) == base).all(dim=1)
    if new.dtype != base.dtype:
        same |= (base.to(new.dtype) == new).all(dim=1)
    return (~same).nonzero().flatten()


def _bias_difference(module: nn.Module, replacement: Replacement | None, dtype: torch.dtype) -> Tensor | None:
    if replacement is None or replacement.whole is None:
        return None
    base = module.bias
    assert isinstance(base, Tensor), f"{type(module).__name__} has no bias, which was checked"
    new = replacement.whole.to(base.device)
    if new.to(base.dtype).equal(base) or base.to(new.dtype).equal(new):
        return None
    difference = (new.to(_wide(dtype)) - base.detach().to(_wide(dtype))).to(dtype)
    return difference


def _linear_change(
    path: str, module: nn.Module, difference: RowDifference | None, bias: Tensor | None, dtype: torch.dtype
) -> LinearChange:
    if bias is not None:
        require_finite(bias, f"the change of {path!r}'s bias in the base model's dtype")
    if difference is None:
        return LinearChange(bias=_on_cpu(bias))
    num_outputs = weight_matrix(module).shape[0]
    index, weight, added = difference.rows, difference.change.to(dtype), difference.added.to(dtype)
    for tensor in (weight, added):
        require_finite(tensor, f"the change of {path!r} in the base model's dtype")
    return LinearChange(
        weight=_on_cpu(weight.contiguous()) if len(weight) else None,
        outputs=None if len(index) == num_outputs else _on_cpu(index),
        bias=_on_cpu(bias),
        added=_on_cpu(added) if len(added) else None,
        size=None if difference.size == num_outputs else difference.size,
    )


def _embedding_change(path: str, module: nn.Module, difference: RowDifference, dtype: torch.dtype) -> EmbeddingChange:
    index, change, added, size = difference
    rows = torch.zeros(len(change) + len(added) + 1, change.shape[1], dtype=dtype)
    scale = (
        torch.tensor(embed_scale(module), dtype=torch.float64).to(weight_matrix(module).dtype).item()
    )  # as the module rounds it
    rows[:-1] = (torch.cat([change, added]) * scale).to("cpu", dtype)
    require_finite(rows, f"the change of {path!r} in the base model's dtype")
    places = torch.full((size,), len(rows) - 1, dtype=torch.int32)
    places[index.cpu()] = torch.arange(len(index), dtype=torch.int32)
    if len(added):
        places[-len(added) :] = torch.arange(len(index), len(rows) - 1, dtype=torch.int32)
    return EmbeddingChange(index=places, rows=rows, size=None if size == weight_matrix(module).shape[1] else size)


def _other_change(
    path: str, module: nn.Module, replacements: Mapping[str, Replacement], dtype: torch.dtype
) -> OtherChange | None:
    """Of a norm, which treats each token by itself. Raises UnsupportedAdapterError for another module."""
    changed = {}
    for name, replacement in replacements.items():
        base, new = module.get_parameter(name), replacement.whole
        assert new is not None, "token rows of a module that is no embedding"
        if not (new.to(base.device, base.dtype).equal(base) or base.to("cpu", new.dtype).equal(new)):
            changed[name] = new.to(base.dtype)
    if not changed:
        return None
    if "norm" not in type(module).__name__.lower() or list(module.children()):
        raise UnsupportedAdapterError(
            f"the adapter brings its own {listed([f'{path}.{name}' for name in changed])}, but {type(module).__name__} "
            "modules can't have other weights for each row. Supported: linear modules, norms, and the input embedding."
        )
    for name, tensor in changed.items():
        require_finite(tensor, f"{path}.{name} in the base model's dtype")
    return OtherChange(module, changed)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to("cpu")
