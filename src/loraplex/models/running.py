"""Run the calls of a MultiLoraModel: on packed passes, or through transformers' own forward and generate."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loraplex.errors import RequestError
from loraplex.models.call import Call

if TYPE_CHECKING:
    from loraplex.engine.packed_generate import PackedCall, PackedGenerator
    from loraplex.models.multi_lora import MultiLoraModel


class CallRunner:
    """Of one model, which it doesn't keep; what a call reports (drafts, scalings) goes there, and to who asked."""

    def __init__(self) -> None:
        self._packed: PackedGenerator | None = None  # made by the first `generate`
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give back what packed passes changed."""
        if self._packed is not None:
            self._packed.close()

    def generate(self, model: "MultiLoraModel", call: Call, *, packed: bool | None, return_scalings: bool) -> Any:
        """On packed passes unless they can't run it, or aren't wanted. Raises RequestError where they alone are."""
        _ = call.row_ends, call.vocabularies
        prepared = "" if packed is False else self._packed_call(model, call)
        if not isinstance(prepared, str):
            return self._run_packed(model, prepared)
        if packed:
            raise RequestError(f"packed=True, but this call can't run so: {prepared}. Leave packed out.")
        return self.run(model, call, model.base.generate, return_scalings=return_scalings)

    def run(self, model: "MultiLoraModel", call: Call, function: Callable[..., Any], *, return_scalings: bool) -> Any:
        """The output of the base model's forward or generate; with `return_scalings`, (output, scalings)."""
        with call.running() as ran:
            output = function(input_ids=call.input_ids, attention_mask=call.attention_mask, **call.inputs)
        call.note_cached(output)
        call.mask_logits(output)
        sequences = call.input_ids
        if call.generates:
            sequences = output if isinstance(output, Tensor) else output.sequences
        call.report_attention(ran, sequences, lambda: None if model.source is None else model.tokenizer)
        if ran.mixtures.two_pass is not None:
            model.draft_counts.add(ran.mixtures.two_pass.counts)
        if not call.options.collect:
            return output
        scalings = call.scalings(ran, sequences, wanted=return_scalings)
        model.scalings_log.record([entry for row in scalings for entry in row])
        return (output, scalings) if return_scalings else output

    def _packed_call(self, model: "MultiLoraModel", call: Call) -> "PackedCall | str":
        """The call on packed passes, or why it can't be."""
        if not model.decodes_fast:
            return "there is no compiled kernel for this model, or fast_decode is False"
        from loraplex.engine.packed_generate import PackedGenerator  # which imports this module

        with self._lock:
            if self._packed is None:
                self._packed = PackedGenerator(model)
        return self._packed.prepare(call)

    def _run_packed(self, model: "MultiLoraModel", call: "PackedCall") -> Tensor:
        output: Tensor = call.run()
        model.draft_counts.add(call.counts)
        return output
