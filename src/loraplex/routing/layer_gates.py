"""Gates that differ from layer to layer and token to token: what an X-LoRA mixture predicts for its experts."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from loraplex.errors import BatchError


class LayerGates:
    """The gates of all experts of a batch, set before each forward pass.

    A column is one expert of one row; its tokens are those of the row's sequences in this pass.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None  # [modules, columns, copies, tokens]
        self.so_far: Tensor | None = None  # the same with those of all earlier passes before them, where they are kept
        self.version = 0
        self._by_module: tuple[Tensor, ...] = ()

    def set(self, values: Tensor, so_far: Tensor | None = None) -> None:  # [modules, columns, copies, tokens]
        """Let the forward pass that follows use these gates."""
        self.values, self.so_far = values, so_far
        self.version += 1
        self._by_module = ()

    def of_tokens(self, length: int) -> Tensor:  # [modules, columns, copies, at least length]
        """The gates of a sequence's last `length` tokens: some layers see those in the cache too."""
        assert self.values is not None, "a forward pass with experts began before its gates were set"
        if length <= self.values.shape[-1]:
            return self.values
        missing = length - (0 if self.so_far is None else self.so_far.shape[-1])
        if self.so_far is None or missing > 1:
            raise BatchError(
                f"a layer got {length} tokens of a sequence with a mixture, whose scalings are known for "
                f"{self.values.shape[-1]} of them. Pass use_cache=False."
            )
        return pad(self.so_far, (missing, 0))  # a drafted step has an empty column before the first token

    def of_module(self, module: int, length: int = 0) -> Tensor:  # [columns, copies, tokens]
        """One module's gates, of at least `length` tokens."""
        assert self.values is not None, "a forward pass with experts began before its gates were set"
        if length > self.values.shape[-1]:
            return self.of_tokens(length)[module]
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
