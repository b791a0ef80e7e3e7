"""Random adapters, in memory or on disk, and a random tiny base model: a speed doesn't depend on what they say."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.writer import write_adapter
from loraplex.adapters.store.store import StoreConfig
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleShape
from loraplex.models.multi_lora import MultiLoraModel

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY = "tiny"


def random_adapter(
    shapes: Mapping[str, ModuleShape], rank: int, dtype: torch.dtype, seed: int, std_b: float = 0.02
) -> Adapter:
    """An adapter on all targets among `shapes` (a base model's modules by path), strong enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ALL_TARGETS, task_type="CAUSAL_LM")
    layers = {}
    for path, shape in shapes.items():
        if shape.is_parameter or path.rsplit(".", 1)[-1] not in ALL_TARGETS:
            continue
        lora_a = torch.randn(rank, shape.in_features, generator=generator) / shape.in_features**0.5
        lora_b = torch.randn(rank, shape.out_features, generator=generator) * std_b
        layers[path] = LoraWeights(
            kind="linear", lora_a=lora_a.to(dtype), lora_b=lora_b.to(dtype), scaling=config.scaling_of(path)
        )
    return Adapter(config=config, layers=layers)


def write_random_folders(
    shapes: Mapping[str, ModuleShape], folder: Path, ranks: Sequence[int], dtype: torch.dtype
) -> dict[str, Path]:
    """One adapter for each rank, all distinct; their folders by name."""
    paths = {f"adapter{i}": folder / f"adapter{i}" for i in range(len(ranks))}
    for seed, (rank, path) in enumerate(zip(ranks, paths.values(), strict=True)):
        write_adapter(random_adapter(shapes, rank, dtype, seed), path)
    return paths


def load_model(name: str, dtype: str, store: StoreConfig | None = None) -> MultiLoraModel:
    """A base model by name; "tiny" is a random Llama that is made in a moment and knows no texts."""
    if name != TINY:
        return MultiLoraModel.from_pretrained(name, dtype=dtype, store=store)
    return MultiLoraModel(tiny_llama(), store=store)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two blocks, 128 tokens, no end token; its weights are large enough that tokens depend on the prompt."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
