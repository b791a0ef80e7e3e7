"""A tiny random model with SmolLM2's tokenizer, which grammars can read, and chat templates of each form of calls."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from loraplex import EngineConfig, MultiLoraModel

ENGINE = EngineConfig(cache_bytes=2**25, max_waiting=256, max_running=32)
_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}CALLS<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
)
_EACH = "{% for call in message.tool_calls or [] %}EACH{% endfor %}"
_OBJECT = '{"name": "{{ call.function.name }}", "KEY": {{ call.function.arguments | tojson }}}'
_XML = (
    "\n<tool_call>\n<function={{ call.function.name }}>\n{% for name, value in call.function.arguments | items %}"
    "<parameter={{ name }}>\n{{ value if value is string else value | tojson }}\n</parameter>\n{% endfor %}</function>"
    "\n</tool_call>"
)
_LIST = "{% if message.tool_calls %}BEGIN{% for call in message.tool_calls %}EACH{{ '' if loop.last else ', ' }}"
_LIST_END = "{% endfor %}]END{% endif %}"


def _listed(begin: str, end: str) -> str:
    return (_LIST + _LIST_END).replace("BEGIN", begin).replace("END", end)


def _template(calls: str) -> str:
    arguments = _OBJECT.replace("KEY", "arguments")
    return _TOOLS + _TURNS.replace("CALLS", calls.replace("EACH", arguments))


TEMPLATES = {
    "hermes": _template(_EACH.replace("EACH", "\n<tool_call>\nEACH\n</tool_call>")),
    "smollm2": _template(_listed("<tool_call>[", "</tool_call>")),
    "llama3_json": _template(_EACH.replace("EACH", _OBJECT.replace("KEY", "parameters"))),
    "mistral": _template(_listed("[TOOL_CALLS] [", "")),
    "mistral-args": _template(
        _EACH.replace("EACH", "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}")
    ),
    "qwen": _template(_EACH.replace("EACH", _XML)),
}
SPECIAL = {"mistral": ["[TOOL_CALLS]"], "mistral-args": ["[TOOL_CALLS]", "[ARGS]"]}


@cache  # reading one takes a second, and making it ready for grammars another
def tool_tokenizer(folder: Path, form: str | None = None) -> PreTrainedTokenizerBase:
    """SmolLM2's, with its own template or one of TEMPLATES."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if form is not None:
        tokenizer.chat_template = TEMPLATES[form]
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL.get(form, [])})
    return tokenizer


def tool_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> MultiLoraModel:
    """A Llama of one block, whose answers mean nothing: what fits a schema does so by the grammar."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = LlamaForCausalLM(config).eval()
    model = MultiLoraModel(base)
    model.__dict__["tokenizer"] = tokenizer
    return model


def function(name: str, properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A tool; all properties are required unless they are named."""
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
    }
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters} | more}


UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"]}
WEATHER = function("get_weather", {"city": {"enum": ["Paris", "Rome"]}, "unit": UNIT}, ["city"])
ADD = function("add", {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}})
