"""The tensors that a scaling head consists of: their names, their shapes, and what is wrong with some."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from loraplex.adapters.finite import require_finite
from loraplex.errors import AdapterFormatError
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.head import linear_indices, num_outputs

Shape = tuple[int, ...]


def head_shapes(config: XLoraConfig, *, hidden_size: int, num_experts: int, num_layers: int) -> dict[str, Shape]:
    """The shape of each tensor in `ScalingHead.state_dict()`, by name and in its order."""
    outputs = num_outputs(config, num_experts, num_layers)
    sizes = [hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), outputs]
    shapes: dict[str, Shape] = {}
    for layer, index in enumerate(linear_indices(config)):
        shapes[f"layers.{index}.weight"] = (sizes[layer + 1], sizes[layer])
        if config.use_bias:
            shapes[f"layers.{index}.bias"] = (sizes[layer + 1],)
    return shapes


def check_head(
    head: Mapping[str, Tensor],
    config: XLoraConfig,
    *,
    hidden_size: int,
    num_experts: int,
    num_layers: int | None = None,
    where: str = "the scaling head",
) -> None:
    """Raise AdapterFormatError unless `head` holds exactly the finite tensors of a ScalingHead.

    `num_layers` None takes the number of LoRA layers from the last layer's shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    check_head_shapes(
        shapes, config, hidden_size=hidden_size, num_experts=num_experts, num_layers=num_layers, where=where
    )
    for name, tensor in head.items():
        require_finite(tensor, f"{where}: {name!r}")


def check_head_shapes(
    shapes: Mapping[str, Shape],
    config: XLoraConfig,
    *,
    hidden_size: int,
    num_experts: int,
    num_layers: int | None,
    where: str,
    file_name: Callable[[str], str] = str,
    why_missing: Callable[[list[str]], str] = lambda missing: "Save the head again.",
) -> None:
    """Like check_head, for shapes alone; `file_name` gives a tensor's name in the file, for the messages."""
    if num_layers is None:
        num_layers = count_layers(shapes, config, num_experts, where) or 1
    expected = head_shapes(config, hidden_size=hidden_size, num_experts=num_experts, num_layers=num_layers)
    needs = (
        f"xlora_depth={config.xlora_depth}, layerwise_scalings={config.layerwise_scalings} and {num_experts} experts"
    )
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise AdapterFormatError(
            f"{where} lacks {_in_order(map(file_name, missing))}: with {needs} the scaling head has "
            f"{len(expected)} tensors, {len(expected) - len(missing)} of them are there. {why_missing(missing)}"
        )
    extra = [name for name in shapes if name not in expected]
    if extra:
        raise AdapterFormatError(
            f"{where} holds tensors that no scaling head with {needs} has: {_in_order(map(file_name, extra))}. Correct "
            "the settings, or remove the tensors."
        )
    wrong = [name for name in expected if shapes[name] != expected[name]]
    if wrong:
        listing = "; ".join(
            f"{file_name(name)!r} is {list(shapes[name])} instead of {list(expected[name])}" for name in wrong
        )
        raise AdapterFormatError(
            f"{where} doesn't match its settings (hidden_size={hidden_size}, xlora_size={config.xlora_size}, "
            f"{needs}): {listing}. Correct the settings, or save the head again."
        )


def count_layers(shapes: Mapping[str, Shape], config: XLoraConfig, num_experts: int, where: str) -> int | None:
    """The number of LoRA layers that a layerwise head was made for, from its last layer; None if it can't tell.

    Raises AdapterFormatError if the layer's outputs are no whole number of rows of experts.
    """
    last = shapes.get(f"layers.{linear_indices(config)[-1]}.weight")
    if not config.layerwise_scalings or not last:
        return None
    num_layers, rest = divmod(last[0], num_experts)
    if rest or not num_layers:
        raise AdapterFormatError(
            f"{where}: the last layer has {last[0]} outputs, which is not a multiple of the {num_experts} experts, as "
            "layerwise_scalings needs. Correct the list of experts, or layerwise_scalings."
        )
    return num_layers


def _in_order(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"
