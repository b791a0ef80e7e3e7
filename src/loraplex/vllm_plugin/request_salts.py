"""Requests whose keys and values depend on more than tokens and adapters share none with others in the prefix cache.

And what requests ask of attention is checked before anything runs.
"""

import json
import re
import uuid
from typing import Any, NamedTuple

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from loraplex.errors import AdapterNotFoundError, CapacityError, LoraplexError, RequestError
from loraplex.residual.format import is_residual_folder
from loraplex.residual.format_settings import read_settings
from loraplex.vllm_plugin.attention_args import CAPTURE, STEER, AttentionArgs, parse_attention_args
from loraplex.vllm_plugin.catalog import FolderCatalog
from loraplex.vllm_plugin.options import KEY, PluginOptions

_BEAM = re.compile(r"-beam-\d+$")  # how the ids of vLLM's beams end, in its server


class LinkFacts(NamedTuple):
    """What the residuals of a link are like."""

    depends_on_prompt: bool = False  # one acts on the prompt's tokens, the generated ones, or the first and last
    has_linked: bool = False


class RequestSalts:
    """Says to the hashes of a request's blocks what their keys and values depend on, if its residuals ask for it.

    Of two requests for a link, one's prompt may be the other's prompt with its answer: the same tokens, and a vector on
    "generated" acts on some of them in one request only. Steered tokens have keys and values of their own. A request
    that captures attention shares none at all: what was not computed can't be captured.
    """

    def __init__(self, config: VllmConfig, options: PluginOptions, catalog: FolderCatalog) -> None:
        text = config.model_config.hf_text_config
        self._num_heads = dict.fromkeys(range(text.num_hidden_layers), int(text.num_attention_heads))
        self._options, self._catalog = options, catalog
        self._known: dict[int, LinkFacts] = {}  # by lora_int_id

    def add(self, request: Any) -> None:
        """Check and salt an EngineCoreRequest. Raises VLLMValidationError."""
        facts = LinkFacts() if request.lora_request is None else self.facts(request.lora_request)
        salts: list[str] = []
        if facts.depends_on_prompt:
            salts.append(f"loraplex prompt {len(request.prompt_token_ids or ())}")
        try:
            args = self._attention_args(request, facts)
        except (RequestError, CapacityError) as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        if facts.depends_on_prompt and _BEAM.search(request.request_id):
            raise VLLMValidationError(
                "residuals on chosen tokens don't go with beam search: vLLM sends what was generated as prompts, so "
                "that nothing tells where the request's own prompt ends. Leave use_beam_search out.",
                parameter="use_beam_search",
            )
        if getattr(request, "resumable", False) and (facts.depends_on_prompt or args is not None):
            raise VLLMValidationError(
                "residuals on chosen tokens, steering and captures need a prompt that is whole: streaming input moves "
                "its end. Send the prompt at once.",
                parameter="prompt",
            )
        if args is not None:
            salts.append(f"loraplex capture {uuid.uuid4()}" if args.capture else f"loraplex steer {args.steering}")
        if salts or request.cache_salt:  # apart from each other: no client's own salt may be taken for one of these
            request.cache_salt = json.dumps([request.cache_salt or None, *salts])

    def facts(self, request: LoRARequest) -> LinkFacts:
        """Of a link; nothing of a name that isn't known, which is refused where its weights are read.

        Raises VLLMValidationError for one whose residuals can't be read: what its keys depend on isn't known.
        """
        number = request.lora_int_id
        if number not in self._known or request.load_inplace:
            try:
                self._known[number] = self._read(request.lora_path)
            except (AdapterNotFoundError, RequestError):
                return LinkFacts()
            except (LoraplexError, OSError) as error:
                raise VLLMValidationError(
                    f"the residuals of {request.lora_name!r} can't be read: {error}", parameter="model"
                ) from error
        return self._known[number]

    def _attention_args(self, request: Any, facts: LinkFacts) -> AttentionArgs | None:
        params = request.sampling_params
        args = None if params is None else parse_attention_args(params.extra_args)
        if args is None:
            return None
        if not self._options.attention:
            raise RequestError(
                f"{STEER} and {CAPTURE} need memory for keys and values that this engine doesn't have. Start it with "
                f'{{"{KEY}": {{"attention": true}}}}.'
            )
        if args.steering and facts.has_linked:
            raise RequestError(
                f"{STEER} doesn't go with linked residuals inside vLLM: they would have to listen to the steered "
                "attention. Use loraplex's own engine."
            )
        if args.capture is not None and params.n != 1:
            raise RequestError(f"{CAPTURE} is for one answer, and n is {params.n}.")
        if request.prompt_token_ids is None:
            raise RequestError(f"{STEER} and {CAPTURE} need a prompt of tokens, not of embeddings.")
        known = self._options.attention_layers
        layers = tuple(self._num_heads) if known is None else tuple(known)
        args.check(len(request.prompt_token_ids), self._num_heads, layers, params.max_tokens)
        return args

    def _read(self, path: str) -> LinkFacts:
        found = [read_settings(folder) for folder, _ in self._catalog.find(path) if is_residual_folder(folder)]
        positions = [
            one for own in found for one in (own.positions, *(change.positions for change in own.interventions))
        ]
        return LinkFacts(
            depends_on_prompt=any(one.depends_on_prompt for one in positions),
            has_linked=any(own.kind == "linked" for own in found),
        )
