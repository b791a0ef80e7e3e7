"""The hooks that put two passes around a base model's calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.errors import RequestError
from loraplex.xlora.two_pass.two_pass import TwoPass

_current: ContextVar[TwoPass | None] = ContextVar("loraplex_two_pass", default=None)


@contextmanager
def use_two_pass(two_pass: TwoPass) -> Iterator[None]:
    """Let the base model's calls inside the block run both passes."""
    token = _current.set(two_pass)
    try:
        yield
    finally:
        _current.reset(token)


def attach_two_pass(base: PreTrainedModel) -> list[RemovableHandle]:
    """Give the base model the hooks that stand around its calls; they do nothing outside `use_two_pass`."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        two_pass = _current.get()
        if two_pass is None:
            return None
        if args:
            raise RequestError("call the base model with keyword arguments where mixtures are used.")
        return args, two_pass.before(kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        two_pass = _current.get()
        return None if two_pass is None else two_pass.after(kwargs, output)

    def capture(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        two_pass = _current.get()
        if two_pass is not None and two_pass.captures_hidden and hasattr(output, "last_hidden_state"):
            two_pass.captured = output.last_hidden_state

    # Some models (OPT) call their decoder past the module around it; of those that are called, the outermost is last.
    parts = [module for module in base.modules() if isinstance(module, PreTrainedModel) and module is not base]
    return [
        base.register_forward_pre_hook(before, with_kwargs=True),
        base.register_forward_hook(after, with_kwargs=True),
        *(part.register_forward_hook(capture) for part in parts),
    ]
