"""What the compiled call reads about a layer, in the order of kernels/csrc/layer_record.h."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.store.expert_table import ExpertTable
from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.worker.fusion.layer_parts import ExpertsPart, LayerParts, NormPart, linear_shape, tensor_at
from loraplex.kernels.int8_weight import Int8Weight
from loraplex.kernels.packed_experts import PackedExperts
from loraplex.kernels.packed_weight import PackedWeight

# The numbers in routing plans: of linear modules, and of bare parameters by their owner and name.
ModuleIndex = Mapping[nn.Module | tuple[nn.Module, str], int]

_NO_MODULE = [0] * 7
_NO_NORM = [0] * 5
_NO_EXPERTS = [0] * 25
_NO_INDEX = -1


class WeightForm(IntEnum):
    """How a weight's values lie."""

    ROWS = 0  # [out, in]
    COLUMNS = 1  # [in, out]
    TILES = 2  # as kernels/csrc/tiles.h packs them
    INT8 = 3  # 8 bits each, as kernels/csrc/int8_layout.h packs them


def layer_record(
    layer: nn.Module,
    parts: LayerParts,
    cache: KeyValueCache,
    module_index: ModuleIndex,
    expert_table: ExpertTable | None,
) -> tuple[list[int], list[float], list[Tensor]]:
    """Addresses and whole numbers, floats, and tensors that are read too."""
    attention = layer.get_submodule(parts.attention.path)
    shape = cache.shapes[attention]
    keys, values = cache.layers[attention]
    sinks = None if shape.terms.sinks is None else shape.terms.sinks.float().contiguous()
    inner, mlp, experts = 0, parts.mlp, parts.experts
    if mlp is not None:
        inner = linear_shape(layer.get_submodule(mlp.down))[1]
    modules = [None if path is None else layer.get_submodule(path) for path in parts.linears]
    activation = experts.activation if experts is not None else 0 if mlp is None else mlp.activation
    correction = None
    if experts is not None and experts.router.correction is not None:
        correction = tensor_at(layer, experts.router.correction).float().contiguous()
    rule = shape.terms.mask_rule
    ints = [
        *(value for module in modules for value in _linear(module, module_index)),
        *(value for norm in parts.norms for value in _norm(layer, norm)),
        *(parts.is_attention_only, parts.is_parallel, parts.shares_norm),
        *(num_heads(layer, parts, cache), shape.num_kv_heads, shape.key_dim, inner),
        *(parts.attention.projection, parts.attention.rotary),
        *(activation, 0 if mlp is None else mlp.gating),
        *(_address(keys), _address(values), rule.window or 0, rule.chunk or 0, _address(sinks)),
        *(_NO_EXPERTS if experts is None else _experts(layer, experts, module_index, expert_table, correction)),
    ]
    floats = [0.0 if norm is None else norm.eps for norm in parts.norms]
    floats += [shape.terms.scale * parts.attention.scale_factor, shape.terms.softcap or 0.0, parts.multiplier]
    floats += [0.0] * 3 if experts is None else [experts.router.factor, experts.alpha, experts.limit]
    return [int(i) for i in ints], floats, [kept for kept in (sinks, correction) if kept is not None]


def num_heads(layer: nn.Module, parts: LayerParts, cache: KeyValueCache) -> int:
    """How many queries a token has, by what the module behind them reads."""
    head_dim = cache.shapes[layer.get_submodule(parts.attention.path)].value_dim
    return linear_shape(layer.get_submodule(parts.attention.out))[1] // head_dim


def _experts(
    layer: nn.Module,
    part: ExpertsPart,
    module_index: ModuleIndex,
    table: ExpertTable | None,
    correction: Tensor | None,
) -> list[int]:
    module, router = layer.get_submodule(part.path), part.router
    indices = [module_index.get((module, name), _NO_INDEX) for name in (part.input, part.down)]
    return [
        *_stacked(module, part.input, indices[0]),
        *_stacked(module, part.down, indices[1]),
        *(router.num_experts, router.top_k, router.scores, router.normalises, router.rounds),
        *(router.num_groups, router.top_groups, _address(correction), part.gate),
        *(_NO_INDEX if table is None else table.first_of(index) for index in indices),
    ]


def _stacked(module: Any, name: str, index: int) -> list[int]:
    """The first expert's part of a stacked weight."""
    weight, bias = getattr(module, name), getattr(module, f"{name}_bias", None)
    form = WeightForm.COLUMNS if module.is_transposed else WeightForm.ROWS
    if isinstance(weight, PackedExperts):
        form = WeightForm.TILES
    _, first, second = weight.shape
    num_in, num_out = (first, second) if module.is_transposed else (second, first)
    return [_address(weight), _address(bias), form, num_in, num_out, index, 0]


def _linear(module: nn.Module | None, module_index: ModuleIndex) -> list[int]:
    if module is None:
        return _NO_MODULE
    if not isinstance(module, (nn.Linear, Conv1D)):  # a router
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor), "a router without a weight was taken for one"
        num_out, num_in = weight.shape
        index = module_index.get((module, "weight"), _NO_INDEX)
        return [_address(weight), _address(bias), WeightForm.ROWS, num_in, num_out, index, 0]
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
