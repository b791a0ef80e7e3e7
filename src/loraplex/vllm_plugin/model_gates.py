"""Gates on linear modules inside vLLM, whose layers may be several modules side by side and be split over workers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from loraplex.adapters.weights import ModuleShape
from loraplex.errors import UnsupportedAdapterError
from loraplex.layers.rows.order import RowOrder
from loraplex.residual.gates import GateResidual
from loraplex.vllm_plugin.batch_residuals import BatchResiduals


class GateModules:
    """vLLM's LoRA layers by name, on which gates act: on what a layer reads, and on what it and its LoRAs make.

    A residual that is read has gates by the paths of transformers' modules; `local` makes those of the layers here.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],  # vLLM's linear LoRA layers
        packed: Mapping[str, Sequence[str]],  # the names of a packed layer's modules, in the order of its slices
        name_of: Callable[[str], str],  # vLLM's name of transformers' module; raises UnsupportedAdapterError
        shapes: Mapping[str, ModuleShape],
        output_module: str | None,
    ) -> None:
        self.shapes, self.output_module = shapes, output_module  # which fitting asks for
        self._layers, self._name_of = layers, name_of
        self._parts = {name: tuple(packed.get(name, ())) or (name,) for name in layers}
        self._layer_of = {part: name for name, parts in self._parts.items() for part in parts}

    def check(self, paths: Iterable[str]) -> None:
        """Raise UnsupportedAdapterError for modules that vLLM has no LoRA layer of."""
        for path in paths:
            if self._name_of(path) not in self._layer_of:
                raise UnsupportedAdapterError(
                    f"a gate acts on {path!r}, which is no linear LoRA layer inside vLLM. Use loraplex's own engine."
                )

    def order_of(self, path: str) -> RowOrder:
        """vLLM's modules see tokens row after row."""
        return RowOrder.ROWS

    def local(self, residual: GateResidual) -> GateResidual:
        """The gates of this worker's layers, by their names. Raises UnsupportedAdapterError."""
        outputs, inputs = (self._by_layer(gates) for gates in (residual.outputs, residual.inputs))
        return GateResidual(
            outputs={name: self._output(name, gates) for name, gates in outputs.items()},
            inputs={name: self._input(name, gates) for name, gates in inputs.items()},
            base=residual.base,
        )

    def attach(self, residuals: BatchResiduals) -> None:
        """Let the layers go through the gates that are current."""
        for name, layer in self._layers.items():
            layer.register_forward_pre_hook(_InputHook(residuals, name))
            layer.register_forward_hook(_OutputHook(residuals, name))

    def _by_layer(self, gates: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """By layer, the gates of its parts."""
        found: dict[str, dict[str, Tensor]] = {}
        for path, gate in gates.items():
            part = self._name_of(path)
            found.setdefault(self._layer_of[part], {})[part] = gate.float()
        return found

    def _output(self, name: str, gates: Mapping[str, Tensor]) -> Tensor:  # [out of this worker]
        layer, parts = self._layers[name], self._parts[name]
        if layer.n_slices == 1:
            gate = gates[parts[0]]
            if _is_row_parallel(layer) or layer.tp_size == 1:  # the sum over all workers
                return gate
            return cast(Tensor, layer.slice_lora_b(gate.unsqueeze(1)))[:, 0]
        columns = [gates[part].unsqueeze(1) if part in gates else None for part in parts]
        if layer.tp_size > 1:
            columns = layer.slice_lora_b(columns)
        sizes = layer.output_slices
        return torch.cat(
            [torch.ones(n) if own is None else own[:, 0].cpu() for n, own in zip(sizes, columns, strict=True)]
        )

    def _input(self, name: str, gates: Mapping[str, Tensor]) -> Tensor:  # [in of this worker]
        layer, parts = self._layers[name], self._parts[name]
        first = next(iter(gates.values()))
        if len(gates) < len(parts) or not all(torch.equal(gate, first) for gate in gates.values()):
            raise UnsupportedAdapterError(
                f"gates act on what {sorted(gates)} read; inside vLLM, {sorted(parts)} are one layer, {name!r}, that "
                "reads once, so that the same gate would have to act on all. Use loraplex's own engine."
            )
        if not _is_row_parallel(layer) or layer.tp_size == 1 or not layer.base_layer.input_is_parallel:
            return first
        return cast(Tensor, layer.slice_lora_a(first.unsqueeze(0)))[0]


def _is_row_parallel(layer: Any) -> bool:
    """Whether each worker reads a part of the input, and makes a part of a sum."""
    return hasattr(layer.base_layer, "input_is_parallel")


class _InputHook:
    """A hook before a LoRA layer."""

    def __init__(self, residuals: BatchResiduals, name: str) -> None:
        self._residuals, self._name = residuals, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        current = self._residuals.interventions
        changed = None if current is None else current.gate_input(self._name, args[0])
        return None if changed is None else (changed, *args[1:])


class _OutputHook:
    """A hook behind a LoRA layer."""

    def __init__(self, residuals: BatchResiduals, name: str) -> None:
        self._residuals, self._name = residuals, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        current = self._residuals.interventions
        if current is None:
            return None
        made, *others = output if isinstance(output, tuple) else (output,)
        changed = current.gate_output(self._name, made)
        if changed is None:
            return None
        return (changed, *others) if isinstance(output, tuple) else changed
