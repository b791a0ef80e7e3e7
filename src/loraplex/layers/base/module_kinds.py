"""Modules that run the same code on the same settings, so that what one of them computes tells what the others do."""

import copy
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.layers.base.decoder import find_decoder
from loraplex.layers.quantized.kinds import quantized_kind

_NOT_SETTINGS = ("_", "lora_", "loraplex_")  # torch's own attributes of a module, and ours
_SIMPLE = (bool, int, float, str, torch.dtype, torch.device, type)
_LEAST_LAYERS = 2  # so that one of them reads what another one made


def module_kind(module: nn.Module, index: int | None = None) -> Hashable:
    """Equal for modules that differ in the values of their weights alone, and in their own `index` in a list."""
    parts: list[Hashable] = []
    for path, part in module.named_modules():
        value_of = _value if quantized_kind(part) is None else _value_of_quantized
        settings = [(name, value_of(value)) for name, value in vars(part).items() if not name.startswith(_NOT_SETTINGS)]
        is_index = [(name, value) for name, value in settings if _tells_index(name, value, index)]
        parts += [path, cast(Hashable, type(part)), tuple(sorted(set(settings) - set(is_index), key=repr))]
        parts += [_who(hook) for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())]
        parts += [(name, weight.shape, weight.dtype) for name, weight in part.named_parameters(recurse=False)]
        parts += [(name, buffer.shape, buffer.dtype) for name, buffer in part.named_buffers(recurse=False)]
    return tuple(parts)


def _tells_index(name: str, value: Hashable, index: int | None) -> bool:
    return index is not None and value == repr(index) and name.endswith(("_idx", "_index", "_id"))


def _who(hook: Any) -> Hashable:
    return getattr(hook, "__module__", ""), getattr(hook, "__qualname__", id(hook))


def _value(value: Any) -> Hashable:
    """Simple values by what they are; others, which layers share, by which they are."""
    is_simple = value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, type))
    if is_simple or (
        isinstance(value, (tuple, list)) and all(isinstance(item, (bool, int, float, str)) for item in value)
    ):
        return repr(value)
    if isinstance(value, Tensor):
        return (value.shape, value.dtype)
    return id(value)


def _value_of_quantized(value: Any) -> Hashable:
    """What belongs to one weight, such as its scales, by its class alone."""
    known = _value(value)
    return cast(Hashable, type(value)) if known == id(value) else known


def first_layers(base: PreTrainedModel, attends: Callable[[nn.Module], bool]) -> PreTrainedModel:
    """`base` up to the layer behind which only kinds come that came before: other objects around the same layers.

    `base` itself where its layers can't be told, or are all needed.
    """
    decoder = find_decoder(base) or base
    layers = _layers(decoder, attends)
    if layers is None:
        return base
    kinds = [module_kind(layer, index) for index, layer in enumerate(layers)]
    count = max(_LEAST_LAYERS, *(kinds.index(kind) + 1 for kind in kinds))
    path = next(name for name, module in base.named_modules() if module is decoder)
    around = [base, *(base.get_submodule(path.rsplit(".", n)[0]) for n in range(path.count("."), -1, -1) if path)]
    if count >= len(layers) or any("forward" in vars(module) for module in around):
        return base
    return _cut(base, decoder, layers, count)


def _layers(decoder: nn.Module, attends: Callable[[nn.Module], bool]) -> nn.ModuleList | None:
    """The list whose members hold all that attends, each in the order in which the decoder runs them."""
    num_attending = sum(map(attends, decoder.modules()))
    for part in decoder.children():
        if isinstance(part, nn.ModuleList) and sum(map(attends, part.modules())) == num_attending > 0:
            return part
    return None


def _cut(base: PreTrainedModel, decoder: nn.Module, layers: nn.ModuleList, count: int) -> PreTrainedModel:
    config = copy.deepcopy(base.config)
    config.get_text_config(decoder=True).num_hidden_layers = count

    def around(module: nn.Module) -> nn.Module:
        """A copy of the objects that hold the layers, which hold everything else together with the originals."""
        if module is layers:
            return nn.ModuleList(list(layers)[:count])
        if not any(part is layers for part in module.modules()):
            return module
        view = copy.copy(module)
        view._modules = {name: child if child is None else around(child) for name, child in module._modules.items()}
        if isinstance(view, PreTrainedModel):
            own = getattr(module, "config", None)
            view.config = config if own is base.config else config.get_text_config(decoder=True)
        return view

    view = around(base)
    assert isinstance(view, PreTrainedModel), "the model lost its class in a copy"
    return view
