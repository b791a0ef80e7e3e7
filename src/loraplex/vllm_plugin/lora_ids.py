"""One number, one adapter: vLLM's workers know adapters by `lora_int_id` and never ask whose number it is."""

import functools
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine

from loraplex.errors import RequestError
from loraplex.vllm_plugin.catalog import FolderCatalog
from loraplex.vllm_plugin.end_tokens import AdapterEnds
from loraplex.vllm_plugin.options import options_from
from loraplex.vllm_plugin.request_salts import RequestSalts

_ATTRIBUTE = "loraplex_ids"  # of an engine's InputProcessor
_MARK = "_loraplex"  # on the functions that stand in for vLLM's: a second call changes nothing


class LoraIds:
    """Which adapter each number stands for, for as long as the engine lives.

    vLLM serves whatever has a number: a second adapter that comes with it would get the first one's weights.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, str | None]] = {}  # number -> name, path; None: any path

    def check(self, request: LoRARequest) -> None:
        """Raise RequestError if the number is another adapter's; `load_inplace` may bring new files for its name."""
        given = (request.lora_name, request.lora_path)
        name, path = self._known.setdefault(request.lora_int_id, given)  # one step: several threads may call
        if name == request.lora_name and request.load_inplace:
            self._known[request.lora_int_id] = (name, None)  # from now on; requests for the old files may still run
        elif (name, path) != given and (name, path) != (request.lora_name, None):
            raise RequestError(
                f"lora_int_id {request.lora_int_id} is that of {name!r} ({path}), so vLLM would serve its weights to "
                f"{request.lora_name!r} ({request.lora_path}). Give every adapter, mixture and link a lora_int_id of "
                "its own."
            )


def check_requests() -> None:
    """Let every engine of this process refuse another adapter's number before it has the request: only that one fails.

    And let requests stop at their adapters' end tokens, and share keys and values with those only that have the same.

    Requests come in through an engine's `InputProcessor`, adapters that are loaded beforehand through `add_lora`.
    Engines that don't ask for loraplex keep vLLM's behaviour.
    """
    if getattr(InputProcessor.__init__, _MARK, False):
        return
    InputProcessor.__init__ = _with_ids(InputProcessor.__init__)
    for engine in (LLMEngine, AsyncLLM):
        engine.add_lora = _with_check(engine.add_lora)


def _with_ids(make: Any) -> Any:
    @functools.wraps(make)
    def make_with_ids(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        make(self, vllm_config, *args, **kwargs)
        options = options_from(vllm_config.additional_config)
        if options is None:
            return
        ids, validate = LoraIds(), self._validate_lora
        catalog = FolderCatalog(options)
        ends, salts = AdapterEnds(catalog), RequestSalts(vllm_config, options, catalog)
        process, process_async = self.process_inputs, self.process_inputs_async

        def validate_lora(lora_request: LoRARequest | None) -> None:
            validate(lora_request)
            if lora_request is not None:
                ids.check(lora_request)

        def completed(request: Any) -> Any:
            ends.add(request.lora_request, request.sampling_params)
            salts.add(request)
            return request

        async def completed_async(*args: Any, **kwargs: Any) -> Any:
            return completed(await process_async(*args, **kwargs))

        self._validate_lora = validate_lora
        self.process_inputs = lambda *args, **kwargs: completed(process(*args, **kwargs))
        self.process_inputs_async = completed_async
        setattr(self, _ATTRIBUTE, ids)

    setattr(make_with_ids, _MARK, True)
    return make_with_ids


def _with_check(add_lora: Any) -> Any:
    @functools.wraps(add_lora)
    def add_checked(self: Any, lora_request: LoRARequest) -> Any:  # of AsyncLLM: a coroutine
        ids = getattr(self.input_processor, _ATTRIBUTE, None)
        if ids is not None:
            ids.check(lora_request)
        return add_lora(self, lora_request)

    return add_checked
