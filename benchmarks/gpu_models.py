"""Models of known shapes with random weights, and random adapters for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex import MultiLoraModel, StoreConfig
from loraplex.bench.random_adapters import random_adapter
from loraplex.layers.base.modules import adaptable_modules


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            rope_theta=500000.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )

    def cache_bytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        """What keys and values of so many tokens take."""
        return num_tokens * self.layers * 2 * self.kv_heads * (self.hidden // self.heads) * dtype.itemsize


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="8B", hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, vocab=128256),
        Shape(name="1B", hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8, vocab=128256),
        Shape(name="tiny", hidden=32, inner=48, layers=1, heads=4, kv_heads=2, vocab=128),
    )
}


def random_base(shape: Shape, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The same weights for every call."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = LlamaForCausalLM(shape.config())
    finally:
        torch.set_default_dtype(before)
    return model.to(device=device, dtype=dtype).eval()


def with_adapters(base: LlamaForCausalLM, ranks: Sequence[int], *, std_b: float = 0.02) -> MultiLoraModel:
    """Adapters "0", "1", ... on all 7 targets; with std_b=0 they change nothing."""
    model = MultiLoraModel(base, store=StoreConfig(num_slots=max(1, len(ranks))))
    shapes = adaptable_modules(base)
    for i, rank in enumerate(ranks):
        model.load_adapter(str(i), random_adapter(shapes, rank, model.dtype, i, std_b))
    return model
