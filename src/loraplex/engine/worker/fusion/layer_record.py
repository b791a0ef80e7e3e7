"""What the compiled call reads about a layer, in the order of kernels/csrc/layer_record.h."""

from collections.abc import Mapping
from enum import IntEnum

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.worker.fusion.layer_parts import LayerParts, NormPart, linear_shape
from loraplex.kernels.int8_weight import Int8Weight
from loraplex.kernels.packed_weight import PackedWeight

_NO_MODULE = [0] * 7
_NO_NORM = [0] * 5


class WeightForm(IntEnum):
    """How a weight's values lie."""

    ROWS = 0  # [out, in]
    COLUMNS = 1  # [in, out]
    TILES = 2  # as kernels/csrc/tiles.h packs them
    INT8 = 3  # 8 bits each, as kernels/csrc/int8_layout.h packs them


def layer_record(
    layer: nn.Module, parts: LayerParts, cache: KeyValueCache, module_index: Mapping[nn.Module, int]
) -> tuple[list[int], list[float], Tensor | None]:
    """Addresses and whole numbers, floats, and a tensor that is read too."""
    attention = layer.get_submodule(parts.attention.path)
    shape = cache.shapes[attention]
    keys, values = cache.layers[attention]
    sinks = None if shape.terms.sinks is None else shape.terms.sinks.float().contiguous()
    inner, mlp = 0, parts.mlp
    if mlp is not None:
        inner = linear_shape(layer.get_submodule(mlp.down))[1]
    modules = [None if path is None else layer.get_submodule(path) for path in parts.linears]
    rule = shape.terms.mask_rule
    ints = [
        *(value for module in modules for value in _linear(module, module_index)),
        *(value for norm in parts.norms for value in _norm(layer, norm)),
        *(mlp is None, parts.is_parallel, parts.shares_norm),
        *(num_heads(layer, parts, cache), shape.num_kv_heads, shape.key_dim, inner),
        *(parts.attention.projection, parts.attention.rotary),
        *((0, 0) if mlp is None else (mlp.activation, mlp.gating)),
        *(_address(keys), _address(values), rule.window or 0, rule.chunk or 0, _address(sinks)),
    ]
    floats = [0.0 if norm is None else norm.eps for norm in parts.norms]
    floats += [shape.terms.scale * parts.attention.scale_factor, shape.terms.softcap or 0.0, parts.multiplier]
    return [int(i) for i in ints], floats, sinks


def num_heads(layer: nn.Module, parts: LayerParts, cache: KeyValueCache) -> int:
    """How many queries a token has, by what the module behind them reads."""
    head_dim = cache.shapes[layer.get_submodule(parts.attention.path)].value_dim
    return linear_shape(layer.get_submodule(parts.attention.out))[1] // head_dim


def _linear(module: nn.Module | None, module_index: Mapping[nn.Module, int]) -> list[int]:
    if module is None:
        return _NO_MODULE
    form = WeightForm.COLUMNS if isinstance(module, Conv1D) else WeightForm.ROWS
    group = 0
    if isinstance(module.weight, Int8Weight):
        form, group = WeightForm.INT8, module.weight.group
    elif isinstance(module.weight, PackedWeight):
        form = WeightForm.TILES
    num_out, num_in = linear_shape(module)
    return [_address(module.weight), _address(module.bias), form, num_in, num_out, module_index[module], group]


def _norm(layer: nn.Module, norm: NormPart | None) -> list[int]:
    if norm is None:
        return _NO_NORM
    module = layer.get_submodule(norm.path)
    weight = getattr(module, "weight", None)
    has_rows = isinstance(weight, Tensor) and weight.numel() > norm.size  # a weight of its own for each head
    flags = norm.is_centered + 2 * norm.plus_one
    return [_address(weight), _address(getattr(module, "bias", None)), norm.size, norm.size * has_rows, flags]


def _address(tensor: object) -> int:
    """Where values lie; 0 is none."""
    return tensor.data_ptr() if isinstance(tensor, Tensor) else 0
