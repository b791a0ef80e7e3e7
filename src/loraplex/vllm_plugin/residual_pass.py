"""Residuals, steering and captures of a batch: chosen before each forward pass of vLLM's model, and gone after it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.forward_context import get_forward_context, is_forward_context_available

from loraplex.vllm_plugin.attention_args import parse_attention_args
from loraplex.vllm_plugin.attention_log import CaptureLog
from loraplex.vllm_plugin.attention_reader import AttentionReader, AttentionRow
from loraplex.vllm_plugin.batch_residuals import BatchResiduals
from loraplex.vllm_plugin.batch_rows import BatchRow, batch_rows
from loraplex.vllm_plugin.row_steering import RowSteering


class ResidualPass:
    """Hooks around the model's forward pass, which vLLM's runners call themselves.

    Scaling passes don't go through them, so they have no residuals, captures or steering.
    """

    def __init__(self, residuals: BatchResiduals, reader: AttentionReader | None, runner: Any) -> None:
        """`reader` where the engine serves steering and captures."""
        self._residuals, self._runner = residuals, runner
        self._rows = None if reader is None else AttentionRequests(reader, runner)

    @property
    def log(self) -> CaptureLog:
        return CaptureLog() if self._rows is None else self._rows.log

    def attach(self, model: nn.Module) -> None:
        """Stand around every forward pass of the model; after the hooks of scaling passes."""
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after, always_call=True)

    def _before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._residuals.is_waiting and self._rows is None:
            return
        if not is_forward_context_available() or get_forward_context().attn_metadata is None:
            self._residuals.forget_batch()  # vLLM measures memory or warms up
            return
        needs_rows = self._rows is not None or self._residuals.depends_on_prompt
        rows = list(batch_rows(self._runner)) if needs_rows else []
        if self._residuals.is_waiting:
            self._residuals.begin_pass(rows)
        if self._rows is not None:
            self._rows.begin_pass(rows)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._residuals.end_pass()
        if self._rows is not None:
            self._rows.end_pass()


class AttentionRequests:
    """Which rows of a batch ask something of attention, by what came with their requests."""

    def __init__(self, reader: AttentionReader, runner: Any) -> None:
        self._reader, self._runner = reader, runner
        self._args: dict[str, _Asked] = {}  # by request id
        self.log = CaptureLog()

    def begin_pass(self, rows: Sequence[BatchRow]) -> None:
        """The rows run now."""
        found = []
        for number, row in enumerate(rows):
            params = self._runner.requests[row.request_id].sampling_params
            if params is None or not params.extra_args:
                continue
            own = self._known(row, params)
            if own is None:
                continue
            found.append(AttentionRow(number, row, own.layers, own.steering, self.log.buffer(row.request_id)))
            self.log.feed(row.request_id, row.first_position + row.tokens.stop - row.tokens.start)
        self._reader.rows = found

    def end_pass(self) -> None:
        self._reader.rows = ()
        for gone in [known for known in self._args if known not in self._runner.requests]:
            del self._args[gone]

    def _known(self, row: BatchRow, params: Any) -> "_Asked | None":
        if row.request_id not in self._args:
            args = parse_attention_args(params.extra_args)
            if args is None:
                return None
            if args.capture is not None:  # kept by the log alone, which bounds what all take together
                buffer = args.buffer(row.num_prompt, self._reader.num_heads, params.max_tokens)
                self.log.add(row.request_id, buffer)
            num_heads = next(iter(self._reader.num_heads.values()))
            steering = RowSteering(args.steering, num_heads, self._reader.heads)
            layers = frozenset(args.layers(self._reader.num_heads))
            self._args[row.request_id] = _Asked(layers, steering)
        return self._args[row.request_id]


@dataclass(frozen=True)
class _Asked:
    """By one request, for as long as it runs."""

    layers: frozenset[int]
    steering: RowSteering
