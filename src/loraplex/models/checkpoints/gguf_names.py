"""The names and the order of rows that llama.cpp's files have for the modules of a base model."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_gguf_pytorch_utils

from loraplex.errors import UnsupportedAdapterError
from loraplex.validation import quoted

# GGUF's architecture by transformers' model_type, of those whose weights go into a file as they are, but for the rows
# of queries and keys.
ARCHITECTURES: Mapping[str, str] = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
# Whose rotary embeddings turn neighbours in llama.cpp, where transformers turns the halves of a head.
_TURNS_NEIGHBOURS = ("llama",)


@dataclass(frozen=True, kw_only=True)
class GgufNames:
    """How one base model's linear modules stand in GGUF files."""

    architecture: str
    by_path: Mapping[str, str]  # "model.layers.0.self_attn.q_proj": "blk.0.attn_q"
    num_heads: Mapping[str, int]  # by path, of the modules whose rows have another order

    def to_file(self, path: str, rows: Tensor) -> Tensor:  # [out, n] -> [out, n]
        """A module's rows in the file's order (`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py)."""
        return interleaved(rows, self.num_heads[path]) if path in self.num_heads else rows

    def from_file(self, path: str, rows: Tensor) -> Tensor:  # [out, n] -> [out, n]
        """The same the other way round."""
        if path not in self.num_heads:
            return rows
        neighbours = rows.reshape(self.num_heads[path], -1, 2, rows.shape[1])  # [heads, head_dim / 2, 2, n]
        return neighbours.transpose(1, 2).reshape(rows.shape)


def interleaved(rows: Tensor, num_heads: int) -> Tensor:  # [out, n] -> [out, n]
    """The two halves of every head, row by row."""
    halves = rows.reshape(num_heads, 2, -1, rows.shape[1])  # [heads, 2, head_dim / 2, n]
    return halves.transpose(1, 2).reshape(rows.shape)


def gguf_names(model: PreTrainedModel) -> GgufNames:
    """The names for `model`, whose weights aren't needed. Raises UnsupportedAdapterError for other architectures."""
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UnsupportedAdapterError(
            f"adapters for a base model of type {quoted(config.model_type)} are not converted from or to GGUF. "
            f"Supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    files = modeling_gguf_pytorch_utils
    known = files.get_gguf_hf_weights_map(model, files.TensorProcessor(config=config.to_dict()), architecture)
    paths = {parameter.removesuffix(".weight"): name.removesuffix(".weight") for name, parameter in known.items()}
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    by_path = {path: name for path, name in paths.items() if path in linear}
    heads = _heads(config) if architecture in _TURNS_NEIGHBOURS else {}
    num_heads = {path: heads[path.rpartition(".")[2]] for path in by_path if path.rpartition(".")[2] in heads}
    return GgufNames(architecture=architecture, by_path=by_path, num_heads=num_heads)


def _heads(config: PreTrainedConfig) -> dict[str, int]:
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or config.num_attention_heads}
