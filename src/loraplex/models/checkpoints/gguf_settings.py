"""Settings of a GGUF file that transformers' reader leaves out, though they change what the model computes.

Each is set in the configuration, or the file is refused; names are llama.cpp's (gguf-py/gguf/constants.py).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex.errors import BaseModelError

_PARTIAL_ROTARY = ("stablelm", "phi3")  # whose heads may be turned in part
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # the one size whose queries have another scale, as llama.cpp tells it
ROPE_FACTORS = "rope_freqs.weight"  # by which frequencies are divided
_LONG_ROPE = ("rope_factors_long.weight", "rope_factors_short.weight")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_PLACED = (".bias", "_norm.weight")  # tensors that a configuration can leave out


def complete_config(file: Path, config: PreTrainedConfig, reader: Any) -> None:
    """Set what the file says of rotary positions, biases and scales. Raises BaseModelError for what has no setting."""
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = str(values["general.architecture"])

    def value(name: str) -> Any:
        return values.get(f"{architecture}.{name}")

    rope = _scaled_rope(config)
    if rope is not None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        theta, num_turned, scaling = (
            value(f"rope.{name}") for name in ("freq_base", "dimension_count", "scaling.type")
        )
        if theta is not None:
            rope["rope_theta"] = float(theta)
        if num_turned is not None and architecture in _PARTIAL_ROTARY:
            rope["partial_rotary_factor"] = num_turned / head_dim
        if scaling == "linear":
            rope |= {"rope_type": "linear", "factor": float(value("rope.scaling.factor") or 1.0)}
        elif scaling not in (None, "none") and rope.get("rope_type") == "default":
            raise _refusal(file, f"rope.scaling.type {scaling!r}")
    if _LONG_ROPE[0] in tensors or _LONG_ROPE[1] in tensors:
        raise _refusal(file, " and ".join(_LONG_ROPE))
    if ROPE_FACTORS in tensors:
        _set_llama3(file, config, torch.from_numpy(tensors[ROPE_FACTORS].data.copy()).float())
    if architecture == "stablelm":
        config.use_qkv_bias = "blk.0.attn_q.bias" in tensors
        config.qk_layernorm = "blk.0.attn_q_norm.weight" in tensors
        config.use_parallel_residual = bool(value("use_parallel_residual"))
    if config.num_hidden_layers == _LAYERS_OF_27B.get(architecture):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def refuse_left_out(file: Path, tensors: Collection[str], places: Collection[str]) -> None:
    """Raise BaseModelError for biases and norms that the model has no place for: without them it is another one."""
    left = sorted(name for name in tensors if name not in places and name.endswith(_PLACED))
    if left:
        raise _refusal(file, f"the tensors {left[:3]}")


def _scaled_rope(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The rotary positions that the file's settings are of: where kinds of layers have their own, full attention's."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return None
    own = rope.get("full_attention", rope)
    return own if isinstance(own, dict) and "rope_theta" in own else None


def _set_llama3(file: Path, config: PreTrainedConfig, factors: Tensor) -> None:
    """Llama 3.1's scaling by its parameters, of which the file has what they give: a factor for each frequency."""
    plain = dict(config.rope_parameters)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / plain["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    config.rope_parameters = {**plain, "rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if factors.shape != frequencies.shape or not torch.allclose(found, frequencies / factors, rtol=1e-4, atol=0):
        config.rope_parameters = plain
        raise _refusal(file, f"{ROPE_FACTORS}, which aren't those of Llama 3")


def _refusal(file: Path, what: str) -> BaseModelError:
    return BaseModelError(
        f"{file} has {what}, which transformers' reader of GGUF files leaves out, so that the model would compute "
        "something else. Use the model's safetensors checkpoint."
    )
