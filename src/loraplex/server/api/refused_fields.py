"""Fields of other servers' APIs that are not served here: why, and the values that change nothing and so may be there.

docs/serving.md has this table; scripts/refused_fields.py writes it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RefusedField:
    """A field with the reason for its refusal. null is always the same as leaving it out."""

    api: str
    reason: str
    neutral: tuple[Any, ...] = ()


REFUSED: Mapping[str, RefusedField] = {
    "audio": RefusedField(api="OpenAI", reason="answers are text"),
    "modalities": RefusedField(api="OpenAI", reason="answers are text", neutral=(["text"],)),
    "prediction": RefusedField(api="OpenAI", reason="there is no speculation with a given text"),
    "prompt_cache_retention": RefusedField(
        api="OpenAI", reason="the prefix cache forgets by use alone", neutral=("in-memory", "in_memory")
    ),
    "reasoning_effort": RefusedField(
        api="OpenAI", reason="templates that know an effort take it in `chat_template_kwargs`", neutral=("none",)
    ),
    "service_tier": RefusedField(
        api="OpenAI", reason="there is one tier; `priority` orders requests", neutral=("auto", "default")
    ),
    "store": RefusedField(api="OpenAI", reason="answers are not kept", neutral=(False,)),
    "suffix": RefusedField(api="OpenAI", reason="a causal model continues, it doesn't fill in", neutral=("",)),
    "verbosity": RefusedField(api="OpenAI", reason="say it in the messages", neutral=("medium",)),
    "web_search_options": RefusedField(api="OpenAI", reason="the server reaches nothing but the model"),
    "chat_template": RefusedField(
        api="vLLM", reason="a template is a program: the tokenizer's own, or an adapter's, is used"
    ),
    "continue_final_message": RefusedField(
        api="vLLM", reason="send the text so far to `/v1/completions`", neutral=(False,)
    ),
    "documents": RefusedField(api="vLLM", reason="put them into the messages", neutral=([],)),
    "ec_transfer_params": RefusedField(api="vLLM", reason="caches aren't moved between servers", neutral=({},)),
    "guided_decoding_backend": RefusedField(
        api="vLLM", reason="llguidance is the one that is used", neutral=("auto", "guidance")
    ),
    "guided_whitespace_pattern": RefusedField(
        api="vLLM", reason="one space or a new line with its indentation, or none (`disable_any_whitespace`)"
    ),
    "include_reasoning": RefusedField(api="vLLM", reason="reasoning is not told apart", neutral=(True,)),
    "kv_transfer_params": RefusedField(api="vLLM", reason="caches aren't moved between servers", neutral=({},)),
    "length_penalty": RefusedField(api="vLLM", reason="of beam search alone", neutral=(1, 1.0)),
    "logprob_token_ids": RefusedField(
        api="vLLM", reason="`logprobs` gives the likeliest; `prompt_logprobs` those of a given text", neutral=([],)
    ),
    "media_io_kwargs": RefusedField(api="vLLM", reason="requests are text", neutral=({},)),
    "mm_payload": RefusedField(api="vLLM", reason="requests are text", neutral=("tensors",)),
    "mm_processor_kwargs": RefusedField(api="vLLM", reason="requests are text", neutral=({},)),
    "prompt_embeds": RefusedField(api="vLLM", reason="prompts are texts or token ids", neutral=([],)),
    "repetition_detection": RefusedField(api="vLLM", reason="`repetition_penalty` and `max_tokens` bound repetitions"),
    "return_prompt_text": RefusedField(
        api="vLLM", reason="`return_token_ids` and `/detokenize` give it", neutral=(False,)
    ),
    "return_token_offsets": RefusedField(api="vLLM", reason="of vLLM's render endpoints alone", neutral=(False,)),
    "return_tokens_as_token_ids": RefusedField(
        api="vLLM", reason="`return_token_ids` gives the ids beside the texts", neutral=(False,)
    ),
    "routed_experts_prompt_start": RefusedField(api="vLLM", reason="routed experts aren't told", neutral=(0,)),
    "spaces_between_special_tokens": RefusedField(
        api="vLLM", reason="texts are what the tokenizer decodes", neutral=(True,)
    ),
    "stream_interval": RefusedField(
        api="vLLM", reason="chunks hold what there is when the reader takes one", neutral=(1,)
    ),
    "structural_tag": RefusedField(api="vLLM", reason="give a `grammar`"),
    "thinking_token_budget": RefusedField(api="vLLM", reason="reasoning is not told apart", neutral=(-1,)),
    "use_beam_search": RefusedField(
        api="vLLM", reason="beams run in `MultiLoraModel.generate`, not in the engine", neutral=(False,)
    ),
    "vllm_xargs": RefusedField(api="vLLM", reason="there are no such extensions", neutral=({},)),
    "watermarking": RefusedField(api="vLLM", reason="no watermark is written", neutral=(False,)),
    "adapter_source": RefusedField(
        api="LoRAX", reason="nothing is downloaded over HTTP: adapters are loaded before", neutral=("local", "hub", "")
    ),
    "api_token": RefusedField(api="LoRAX", reason="nothing is downloaded over HTTP", neutral=("",)),
    "density": RefusedField(api="LoRAX", reason="of `merge_strategy`s that drop weights", neutral=(0, 0.0, 1, 1.0)),
    "majority_sign_method": RefusedField(api="LoRAX", reason="of TIES merging", neutral=("total",)),
    "merge_strategy": RefusedField(
        api="LoRAX", reason="a link adds outputs; `loraplex link` merges in other ways, before", neutral=("linear",)
    ),
    "typical_p": RefusedField(api="TGI", reason="`top_p` and `min_p` are the filters", neutral=(1, 1.0)),
    "watermark": RefusedField(api="TGI", reason="no watermark is written", neutral=(False,)),
}
NEUTRAL: Mapping[str, tuple[Any, ...]] = {name: field.neutral for name, field in REFUSED.items()}


def refusal_of(name: str) -> str:
    """What a client is told of a field that is not served."""
    known = REFUSED.get(name)
    return "is not supported here" if known is None else f"is not supported here: {known.reason}"


def as_markdown() -> str:
    """The table of the documentation."""
    rows = ["| field | of | why | passes with |", "|---|---|---|---|"]
    for name, field in sorted(REFUSED.items(), key=lambda item: (item[1].api, item[0])):
        values = ", ".join(f"`{json.dumps(value)}`" for value in _distinct(field.neutral))
        rows.append(f"| `{name}` | {field.api} | {field.reason} | {values} |")
    return "\n".join(rows)


def _distinct(values: tuple[Any, ...]) -> list[Any]:
    """1 and 1.0 are one number."""
    found: list[Any] = []
    for value in values:
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in found):
            found.append(value)
    return found
