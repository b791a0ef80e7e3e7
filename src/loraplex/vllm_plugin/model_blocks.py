"""The blocks of the model that vLLM runs, where residuals act, and the hooks that let them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention

from loraplex.errors import UnsupportedEngineError
from loraplex.residual.operations import SiteKey
from loraplex.residual.reft import Site
from loraplex.vllm_plugin.batch_residuals import BatchResiduals
from loraplex.vllm_plugin.linked_pass import SumHeads
from loraplex.vllm_plugin.second_cache import SecondCache

# Whose blocks are known to hand on what transformers' do: either hidden states, or a pair whose sum they are.
KNOWN = frozenset(
    f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "OPT")
)


class ModelBlocks:
    """The decoder blocks of one worker's model, by number."""

    def __init__(self, model: nn.Module, attention: Mapping[str, Any]) -> None:
        """`attention` are vLLM's attention layers by name. Raises UnsupportedEngineError for unknown models."""
        kind = type(model).__name__
        if kind not in KNOWN:
            raise UnsupportedEngineError(
                f"residuals inside vLLM are not known to be right for {kind}; known: {sorted(KNOWN)}. Serve it without "
                "residuals, or with loraplex's own engine."
            )
        modules = dict(model.named_modules())
        self.attention: dict[int, Attention] = {}
        self._modules: dict[SiteKey, nn.Module] = {}
        for name, layer in attention.items():
            block, _, inner = name.rpartition(".")[0].rpartition(".")  # "model.layers.7", "self_attn"
            number = int(block.rpartition(".")[2])
            self.attention[number] = layer
            self._modules["attention", number] = modules[f"{block}.{inner}"]
            self._modules["block", number] = modules[block]
            if f"{block}.mlp" in modules:
                self._modules["mlp", number] = modules[f"{block}.mlp"]
        self.num_workers = get_tensor_model_parallel_world_size()
        rank = get_tensor_model_parallel_rank()
        own = {layer.num_heads for layer in self.attention.values()}
        if len(own) != 1:
            raise UnsupportedEngineError(f"the attention layers of {kind} have different numbers of heads: {own}.")
        num_heads = own.pop()
        self.heads = slice(rank * num_heads, (rank + 1) * num_heads)  # of this worker
        self.num_heads = dict.fromkeys(sorted(self.attention), num_heads * self.num_workers)

    @property
    def sites(self) -> frozenset[SiteKey]:
        return frozenset(self._modules)

    def module(self, site: Site, number: int) -> nn.Module:
        return self._modules[site, number]

    def chosen(self, layers: Sequence[int] | None) -> list[int]:
        """The attention layers meant; None is all. Raises UnsupportedEngineError for others than the model has."""
        numbers = sorted(self.attention) if layers is None else list(layers)
        unknown = [number for number in numbers if number not in self.attention]
        if unknown:
            raise UnsupportedEngineError(
                f"attention_layers names {unknown}, which the model doesn't have: its attention layers are "
                f"{min(self.attention)} to {max(self.attention)}."
            )
        return numbers

    def attach(self, residuals: BatchResiduals, linked: "LinkedCaches | None") -> None:
        """Let the blocks go through what is current in `residuals`."""
        if linked is not None:
            for number in self.attention:  # also where there is no cache: a link's vectors may act there
                reader = _LinkedReader(residuals, linked, number, self._sum_heads)
                self.attention[number].register_forward_pre_hook(reader.note_attention)
                self._modules["attention", number].register_forward_hook(reader, with_kwargs=True)
        for site, number in self._modules:
            self._modules[site, number].register_forward_hook(_SiteHook(residuals, site, number))

    @property
    def _sum_heads(self) -> SumHeads | None:
        return tensor_model_parallel_all_reduce if self.num_workers > 1 else None


class LinkedCaches:
    """For each linked residual of a link, copies of attention layers whose values are its local responses."""

    def __init__(self, registry: Any, blocks: ModelBlocks, num_linked: int, layers: Sequence[int] | None) -> None:
        """Register the copies; before vLLM asks the layers for their caches."""
        numbers = blocks.chosen(layers)
        chosen = {blocks.attention[number].layer_name: blocks.attention[number] for number in numbers}
        caches = [SecondCache(registry, chosen, f"loraplex_linked{i}.") for i in range(num_linked)]
        self._copies = {
            number: [cache.copies[blocks.attention[number].layer_name] for cache in caches] for number in numbers
        }
        self.layers = {number: blocks.attention[number].head_size for number in numbers}  # the largest rank of each

    def attend(self, layer: int, number: int, query: Tensor, key: Tensor, u: Tensor) -> Tensor:
        """What each head hears: query and key as the layer has them, u [tokens, rank]; [tokens, heads, head size]."""
        copied = self._copies[layer][number]
        padded = torch.nn.functional.pad(u.to(key.dtype), (0, copied.head_size - u.shape[1]))
        values = padded.unsqueeze(1).expand(-1, copied.num_kv_heads, -1).reshape(len(u), -1)
        heard: Tensor = copied.forward(query, key, values)
        return heard.view(len(u), copied.num_heads, copied.head_size)


class _LinkedReader:
    """Hooks on an attention layer, whose query and key are noted, and on its block, to whose output residuals go."""

    def __init__(self, residuals: BatchResiduals, caches: LinkedCaches, layer: int, sum_heads: SumHeads | None) -> None:
        self._residuals, self._caches, self._layer, self._sum_heads = residuals, caches, layer, sum_heads
        self._seen: tuple[Tensor, Tensor] | None = None

    def note_attention(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        current = self._residuals.linked
        if current is not None and current.reaches(self._layer):
            self._seen = args[0], args[1]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        current = self._residuals.linked
        if current is None or self._seen is None:
            return None
        (query, key), self._seen = self._seen, None
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[-1]

        def attend(number: int, u: Tensor) -> Tensor:
            return self._caches.attend(self._layer, number, query, key, u)

        return output + current.residual(self._layer, x, attend, self._sum_heads).to(output.dtype)


class _SiteHook:
    """A forward hook that lets interventions change what a block, or a part of it, puts out."""

    def __init__(self, residuals: BatchResiduals, site: Site, number: int) -> None:
        self._residuals, self._site, self._number = residuals, site, number

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        current = self._residuals.interventions
        if current is None:
            return None
        if isinstance(output, Tensor):
            return current.at_site(self._site, self._number, output)
        hidden, before = output  # whose sum is what the block puts out
        if self._site != "block" or not current.acts_behind(self._number):
            changed = current.at_site(self._site, self._number, hidden)
            return None if changed is None else (changed, before)
        whole = hidden + before
        changed = current.at_site(self._site, self._number, whole)
        return None if changed is None else (hidden + (changed - whole), before)
