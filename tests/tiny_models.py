"""Tiny random transformers models of many architectures, and random PEFT adapters for them.

The weights are large enough that adapters change logits and greedy tokens, not just their last bits.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 128
HIDDEN_SIZE = 64
SLIDING_WINDOW = 6  # tokens; shorter than the prompts of most tests
# No end-of-sequence token: `generate` gives every row as many tokens as it was asked for.
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA_LIKE: dict[str, Any] = {
    **TOKENS,
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
GEMMA_LIKE = {
    **LLAMA_LIKE,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": SLIDING_WINDOW,
    "tie_word_embeddings": False,  # tied and scaled by sqrt(hidden), a tiny model only repeats its last token
}
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class TinyArchitecture:
    """How to build one architecture, and the names of the modules that an adapter can target."""

    model_class: type[PreTrainedModel]
    config: Callable[[], PreTrainedConfig]
    linears: tuple[str, ...]  # suffixes of all linear modules but the output head
    embedding: str  # suffix of the token embedding


ARCHITECTURES: Mapping[str, TinyArchitecture] = {
    "llama": TinyArchitecture(
        model_class=transformers.LlamaForCausalLM,
        config=lambda: transformers.LlamaConfig(**LLAMA_LIKE),
        linears=LLAMA_TARGETS,
        embedding="embed_tokens",
    ),
    "mistral": TinyArchitecture(
        model_class=transformers.MistralForCausalLM,
        config=lambda: transformers.MistralConfig(**LLAMA_LIKE, sliding_window=SLIDING_WINDOW),
        linears=LLAMA_TARGETS,
        embedding="embed_tokens",
    ),
    "qwen2": TinyArchitecture(
        model_class=transformers.Qwen2ForCausalLM,
        config=lambda: transformers.Qwen2Config(
            **LLAMA_LIKE,
            use_sliding_window=True,
            sliding_window=SLIDING_WINDOW,
            layer_types=SLIDING_THEN_FULL,
            tie_word_embeddings=True,
        ),
        linears=LLAMA_TARGETS,
        embedding="embed_tokens",
    ),
    "qwen3": TinyArchitecture(
        model_class=transformers.Qwen3ForCausalLM,
        config=lambda: transformers.Qwen3Config(**LLAMA_LIKE, head_dim=16),
        linears=LLAMA_TARGETS,
        embedding="embed_tokens",
    ),
    "gemma2": TinyArchitecture(
        model_class=transformers.Gemma2ForCausalLM,
        config=lambda: transformers.Gemma2Config(**GEMMA_LIKE, layer_types=SLIDING_THEN_FULL),
        linears=LLAMA_TARGETS,
        embedding="embed_tokens",
    ),
    "gemma3": TinyArchitecture(
        model_class=transformers.Gemma3ForCausalLM,
        config=lambda: transformers.Gemma3TextConfig(**GEMMA_LIKE, layer_types=SLIDING_THEN_FULL),
        linears=LLAMA_TARGETS,
        embedding="embed_tokens",
    ),
    "phi3": TinyArchitecture(
        model_class=transformers.Phi3ForCausalLM,
        config=lambda: transformers.Phi3Config(**LLAMA_LIKE, sliding_window=SLIDING_WINDOW),
        linears=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        embedding="embed_tokens",
    ),
    "gpt2": TinyArchitecture(
        model_class=transformers.GPT2LMHeadModel,
        config=lambda: transformers.GPT2Config(
            **TOKENS,
            vocab_size=VOCAB_SIZE,
            n_embd=HIDDEN_SIZE,
            n_layer=2,
            n_head=4,
            n_positions=256,
            initializer_range=0.15,
        ),
        linears=("c_attn", "c_proj", "c_fc"),  # Conv1D modules, which store their weight transposed
        embedding="wte",
    ),
    "gpt_neox": TinyArchitecture(
        model_class=transformers.GPTNeoXForCausalLM,
        config=lambda: transformers.GPTNeoXConfig(
            **TOKENS,
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.15,
        ),
        linears=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        embedding="embed_in",
    ),
    "opt": TinyArchitecture(
        model_class=transformers.OPTForCausalLM,
        config=lambda: transformers.OPTConfig(
            **TOKENS,
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            word_embed_proj_dim=HIDDEN_SIZE,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            init_std=0.15,
        ),
        linears=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        embedding="embed_tokens",
    ),
    "t5": TinyArchitecture(
        model_class=transformers.T5ForConditionalGeneration,
        config=lambda: transformers.T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=HIDDEN_SIZE,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=None,
            decoder_start_token_id=0,
            initializer_factor=2.0,
        ),
        linears=("q", "k", "v", "o", "wi", "wo"),
        embedding="shared",
    ),
    "bert": TinyArchitecture(
        model_class=transformers.BertForMaskedLM,
        config=lambda: transformers.BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=0,
            initializer_range=0.15,
        ),
        linears=("query", "key", "value", "dense"),
        embedding="word_embeddings",
    ),
}
TINY_MODELS = tuple(ARCHITECTURES)
TINY_CAUSAL_MODELS = tuple(name for name in ARCHITECTURES if name not in ("t5", "bert"))


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the architecture with seeded random weights, in evaluation mode; the global seed is kept."""
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture.model_class(architecture.config())
        # Biases and norms start as zeros and ones, which would hide one that is dropped or applied twice.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter.data, parameter.data.mean().item(), 0.1)
    return model.to(dtype).eval()


def linear_targets(name: str) -> tuple[str, ...]:
    """The suffixes of an architecture's linear modules but its output head: what "all-linear" targets."""
    return ARCHITECTURES[name].linears


def embedding_target(name: str) -> str:
    """The suffix of an architecture's token embedding."""
    return ARCHITECTURES[name].embedding


def random_peft_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    targets: Sequence[str] | str,
    r: int = 4,
    lora_alpha: float = 8,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a PEFT LoRA folder for `model` with seeded, non-zero A and B; the model is left as it is.

    `options` are further settings of peft.LoraConfig, such as {"use_rslora": True}. Returns `folder`.
    """
    peft_targets = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=peft_targets, **(options or {}))
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_B" in name or "lora_embedding_" in name:
            fill_factor(name, parameter.data, generator)
    adapted.save_pretrained(str(folder))
    return folder


def fill_factor(name: str, factor: torch.Tensor, generator: torch.Generator) -> None:
    """Fill A so that it keeps the input's magnitude, and B so that the adapter rivals the base weights."""
    # An embedding's A is [rank, vocab] and is read one column at a time.
    std = 0.4 if "lora_embedding_A" in name else (1.0 if "lora_A" in name else 0.4) / math.sqrt(factor.shape[1])
    factor.copy_(torch.randn(factor.shape, generator=generator) * std)
