"""What several tests of the engine watch."""

import pytest
import torch

from loraplex.engine.worker import native_ops
from loraplex.engine.worker.fusion import layer_stack


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every compiled call."""
    made: list[int] = []
    run = native_ops.decode_layers

    def counted(x: torch.Tensor, *args: object) -> torch.Tensor:
        made.append(len(x))
        return run(x, *args)

    monkeypatch.setattr(layer_stack.native_ops, "decode_layers", counted)
    return made
