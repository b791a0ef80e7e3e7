"""X-LoRA's first pass: before each forward pass of a batch with mixtures, the same model runs on the second cache."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.forward_context import get_forward_context, is_forward_context_available, override_forward_context

from loraplex.errors import UnsupportedEngineError
from loraplex.vllm_plugin.gates import BatchGates
from loraplex.vllm_plugin.scalings_api import RequestScalingsLog, asked_rows
from loraplex.vllm_plugin.second_cache import SecondCache


class BatchScalingPass:
    """Hooks around the model's forward pass, which vLLM's runners call themselves."""

    def __init__(self, gates: BatchGates, cache: SecondCache, wrapper: Any, runner: Any) -> None:
        self._gates = gates
        self._runner = runner
        self.log = RequestScalingsLog()
        self.cache = cache
        self._wrapper = wrapper  # Punica's: on a CPU it can leave out all adapters

    def attach(self, model: nn.Module) -> None:
        """Stand before every forward pass of the model, and before its logits."""
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after)
        for name in ("compute_logits", "compute_logits_local"):
            if hasattr(model, name):
                setattr(model, name, self._checked(getattr(model, name)))

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._gates.groups:
            return
        if not is_forward_context_available() or get_forward_context().attn_metadata is None:
            self._gates.forget_batch()  # vLLM measures memory or warms up
            return
        context = self.cache.scaling_context(get_forward_context())
        self._gates.begin_scaling_pass()
        had_no_lora = self._wrapper.no_lora
        # The base model itself: on a CPU, where this is read at every call, the adapters needn't be computed. On a GPU
        # it isn't read, and the gates, which are 0, do the same.
        self._wrapper.no_lora = had_no_lora or self._gates.pass_is_base
        try:
            with override_forward_context(context):
                hidden = model.forward(*args, **kwargs)
        finally:
            self._wrapper.no_lora = had_no_lora
        if not isinstance(hidden, Tensor):
            raise UnsupportedEngineError(
                f"the model returned a {type(hidden).__name__} where hidden states were expected: mixtures don't go "
                "with speculative decoding or pipeline parallelism."
            )
        self._gates.begin_main_pass(hidden)
        self._note_scalings(hidden)

    def _note_scalings(self, hidden: Tensor) -> None:  # [tokens, hidden]
        for row in asked_rows(self._runner):
            for use in self._gates.mixtures_of(row.tokens.start):
                self.log.add(row.request_id, use.name, row.first_position, use.head(hidden[row.tokens]))

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._gates.end_main_pass()

    def _checked(self, compute_logits: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._gates.check_gated()
            return compute_logits(*args, **kwargs)

        return checked
