"""Which order of rows each module of a base model sees, and whether it answers with a tensor: tried on a few tokens.

Architectures differ: some transpose to [tokens, rows, features], some hand an expert the tokens that chose it, some run
modules on images or positions that belong to no row. No layout tells them apart, but a pass of two rows and a pass of
each of them do.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.adapters.weights import ModuleShape
from loraplex.layers.base.modules import input_embedding
from loraplex.layers.base.unchanged import left_unchanged
from loraplex.layers.rows.order import RowOrder, find_order

logger = logging.getLogger(__name__)

_NUM_TOKENS, _NUM_DECODER_TOKENS = 6, 5
_MORE_ROWS = 12  # tell a module that sees all tokens, or one of each row, from one that sees chosen ones
_FEATURES = 256  # of an input that are compared, at most

Calls = dict[str, list[Tensor]]
Result = TypeVar("Result")


@dataclass(kw_only=True)
class RowProbe:
    """What was learnt."""

    orders: dict[str, RowOrder]  # of the modules that were reached
    not_linear: set[str] = field(default_factory=set)  # whose output isn't one tensor with a row for each input


def probe_rows(base: PreTrainedModel, modules: Mapping[str, nn.Module], shapes: Mapping[str, ModuleShape]) -> RowProbe:
    """Run a few tokens through the base model and see what reaches each module; nothing of it stays."""
    recorder = Recorder(modules, shapes)
    try:
        with left_unchanged(base), torch.no_grad(), recorder.attached():
            orders = _find_orders(base, recorder)
    except Exception as error:  # whatever a model raises that needs other inputs than tokens
        logger.info("the order of rows in %s is not known: it can't run a few tokens: %s", type(base).__name__, error)
        return RowProbe(orders={}, not_linear=recorder.not_linear)
    return RowProbe(orders=orders, not_linear=recorder.not_linear)


def _find_orders(base: PreTrainedModel, recorder: "Recorder") -> dict[str, RowOrder]:
    ids = different_ids(base, 4 + _MORE_ROWS)
    alone = [recorder.run(base, ids[row : row + 1]) for row in (0, 1)]
    together = recorder.run(base, ids[:2])
    orders = {path: find_order([calls.get(path, []) for calls in alone], together[path]) for path in together}
    flat = [p for p, order in orders.items() if order is RowOrder.ROWS and any(x.ndim == 2 for x in together[p])]
    if not flat:
        return orders
    whole = recorder.run(base, ids[4:])
    pooled = [path for path in flat if len(alone[0][path][0]) < _NUM_TOKENS]
    singles = [recorder.run(base, ids[row : row + 1]) for row in range(4, len(ids))] if pooled else []
    for path in flat:
        share = [len(call) for call in alone[0][path]]
        counts = [[len(call) for call in calls.get(path, [])] for calls in (*singles, *alone)]
        is_whole = [len(call) for call in whole.get(path, [])] == [_MORE_ROWS * count for count in share]
        if not is_whole or any(count != share for count in counts):
            orders[path] = RowOrder.UNKNOWN
    return orders


class Recorder:
    """Keeps what reaches the modules in the passes of the thread that probes."""

    def __init__(self, modules: Mapping[str, nn.Module], shapes: Mapping[str, ModuleShape]) -> None:
        self._modules, self._shapes = modules, shapes
        self._thread = threading.get_ident()
        self._calls: Calls = {}
        self.not_linear: set[str] = set()

    def run(self, base: PreTrainedModel, ids: Tensor) -> Calls:  # [rows, tokens]
        """The inputs of each module in one pass of the base model."""
        return self.record(lambda: run_tokens(base, ids))[0]

    def record(self, run: Callable[[], Result]) -> tuple[Calls, Result]:
        """The inputs of each module while `run` runs, and its result."""
        self._calls = {}
        torch.default_generator.manual_seed(0)
        result = run()
        return self._calls, result

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [module.register_forward_hook(self._hook(path)) for path, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Any:
        shape = self._shapes[path]
        is_embedding, num_out, is_parameter = shape.kind == "embedding", shape.out_features, shape.is_parameter

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            if not args or not isinstance(args[0], Tensor):
                self.not_linear.add(path)
                return
            x = args[0].unsqueeze(-1) if is_embedding else args[0]
            if not is_parameter and not is_tensor_of(output, (*x.shape[:-1], num_out)):
                self.not_linear.add(path)
            step = -(-x.shape[-1] // _FEATURES)
            values = x.detach()[..., ::step].to("cpu", torch.float32)
            self._calls.setdefault(path, []).append(torch.nan_to_num(values))

        return keep


def is_tensor_of(output: Any, shape: tuple[int, ...]) -> bool:
    """Whether a module's output is a tensor of this shape, as a linear module's is."""
    return isinstance(output, Tensor) and output.shape == shape


def run_tokens(base: PreTrainedModel, ids: Tensor) -> Any:  # [rows, tokens]
    """The base model's output for these rows, in the decoder of an encoder-decoder for some of them too."""
    return base(**_inputs(base, ids))


def _inputs(base: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """What the base model's forward is given for these rows."""
    decoder_ids = ids.flip(1)[:, :_NUM_DECODER_TOKENS]
    optional = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    if getattr(base.config, "is_encoder_decoder", False):
        optional["decoder_input_ids"] = decoder_ids
    parameters = signature(base.forward).parameters
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"input_ids": ids} | {name: value for name, value in optional.items() if takes_any or name in parameters}


def different_ids(base: PreTrainedModel, num_rows: int) -> Tensor:  # [rows, tokens]
    """Rows of different tokens, none of them special (padding, images)."""
    embedding = input_embedding(base)
    vocabulary = int(getattr(embedding, "num_embeddings", 0) or base.config.get_text_config().vocab_size)
    special = _special_ids(base.config.to_dict())
    generator = torch.Generator().manual_seed(0)
    plain = [i for i in torch.randperm(min(vocabulary, 10_000), generator=generator).tolist() if i not in special]
    wanted = num_rows * _NUM_TOKENS
    plain = (plain * -(-wanted // len(plain)))[:wanted]
    return torch.tensor(plain, device=base.device).view(num_rows, _NUM_TOKENS)


def _special_ids(settings: Mapping[str, Any]) -> set[int]:
    """The ids of a configuration's settings that name a token."""
    found: set[int] = set()
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _special_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index", "token_indices")):
            found |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    return found
