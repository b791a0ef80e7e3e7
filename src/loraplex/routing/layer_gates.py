"""Gates that differ from layer to layer and token to token: what an X-LoRA mixture predicts for its experts."""

from typing import NamedTuple

from torch import Tensor


class LayerGates:
    """The gates of all experts of a batch, set before each forward pass.

    A column is one expert of one row; its tokens are those of the row's sequences in this pass.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None  # [modules, columns, copies, tokens]
        self.version = 0
        self._by_module: tuple[Tensor, ...] = ()

    def set(self, values: Tensor) -> None:  # [modules, columns, copies, tokens]
        """Let the forward pass that follows use these gates."""
        self.values = values
        self.version += 1
        self._by_module = ()

    def of_module(self, module: int) -> Tensor:  # [columns, copies, tokens]
        assert self.values is not None, "a forward pass with experts began before its gates were set"
        if not self._by_module:
            self._by_module = self.values.unbind(0)  # once for all modules: one node for autograd
        return self._by_module[module]


class GateColumn(NamedTuple):
    """A segment's gates: one column, from each of its row's copies (beams) the last `length` tokens.

    A layer that sees fewer tokens than the pass has (lm_head often sees only the last) sees the last ones.
    """

    column: int
    length: int
    positions: Tensor | None = None  # instead: these of the column's tokens

    def of(self, values: Tensor) -> Tensor:  # [columns, copies, tokens] -> [copies * length] or [positions]
        if self.positions is not None:
            return values[self.column].reshape(-1)[self.positions]
        return values[self.column, :, -self.length :].reshape(-1)
