"""Routers: from a LoRA layer's input to its experts' gates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.routers.config import ArrowConfig, LinearRouterConfig, RouterConfig, SpectrConfig, StaticRouterConfig
from loraplex.routing.token_router import NativeRouter, TokenRouter


class Factors(Protocol):
    """An expert's weights in one module."""

    @property
    def lora_a(self) -> Tensor:  # [rank, in]
        ...

    @property
    def lora_b(self) -> Tensor:  # [rank, out]
        ...


Experts = Sequence[SlotWeights | None]
Layers = Sequence[Mapping[int, SlotWeights]]  # of each expert, by module
Made = TypeVar("Made")

_POWER_STEPS = 15  # PEFT's
_EPS = 1e-8  # PEFT's

_NOT_THERE = float("-inf")
_ARROW, _SPECTR, _LINEAR, _SIGMOID, _STATIC = range(5)  # RouterKind in kernels/csrc/router.h


class ArrowRouter:
    """See ArrowConfig."""

    def __init__(self, config: ArrowConfig) -> None:
        self.config = config
        self._prototypes = _Kept(lambda experts: _prototypes(experts, config.rng_seed))
        self._native = NativeKept(_ARROW, config.top_k, config.temperature, self._in_rank_space)

    def native(self, experts: Layers, num_modules: int) -> NativeRouter | None:
        return self._native.of(experts, num_modules)

    def _in_rank_space(self, module: int, expert: SlotWeights, place: int) -> Tensor:  # [rank]
        return strongest_direction(expert, self.config.rng_seed)[1] / expert.scaling

    def gates(self, module: int, x: Tensor, experts: Experts) -> Tensor:
        """[tokens, experts]"""
        scores = (x.float() @ self._prototypes.of(module, experts).t()).abs()
        return softmax_of_top(_without_missing(scores, experts), self.config.top_k, self.config.temperature)


class SpectrRouter:
    """See SpectrConfig."""

    def __init__(self, config: SpectrConfig) -> None:
        self.config = config
        self._grams = _Kept(_grams)
        self._native = NativeKept(
            _SPECTR, config.top_k, config.temperature, lambda module, expert, place: gram_of(expert) / expert.scaling**2
        )

    def native(self, experts: Layers, num_modules: int) -> NativeRouter | None:
        return self._native.of(experts, num_modules)

    def gates(self, module: int, x: Tensor, experts: Experts) -> Tensor:
        """[tokens, experts]"""
        scores = x.new_zeros(len(x), len(experts), dtype=torch.float32)
        for column, (expert, gram) in enumerate(zip(experts, self._grams.of(module, experts), strict=True)):
            if expert is not None:
                u = x.float() @ expert.lora_a.float().t()
                scores[:, column] = ((u @ gram) * u).sum(dim=-1).clamp_min(0).sqrt()
        return softmax_of_top(_without_missing(scores, experts), self.config.top_k, self.config.temperature)


class LinearRouter(nn.Module):
    """See LinearRouterConfig. `weights` and `biases` have an entry for each LoRA layer, or for each width of inputs."""

    def __init__(self, config: LinearRouterConfig, widths: Mapping[int, int], num_experts: int) -> None:
        """`widths`: the inputs of each LoRA layer, by module."""
        super().__init__()
        self.config = config
        self.widths = dict(widths)
        own = config.weight_widths(list(widths.values()))
        self.place = {  # of each module's R
            module: own.index(width) if config.shared else place for place, (module, width) in enumerate(widths.items())
        }
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(num_experts, width) / width**0.5) for width in own)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(num_experts)) for _ in own)
        kind = _SIGMOID if config.activation == "sigmoid" else _LINEAR
        self._native = NativeKept(kind, config.top_k, config.temperature, self._row, top_p=config.top_p)

    @property
    def num_experts(self) -> int:
        return len(self.biases[0])

    def native(self, experts: Layers, num_modules: int) -> NativeRouter | None:
        own = (
            *self.weights._parameters.values(),
            *self.biases._parameters.values(),
        )  # parameters() takes a millisecond
        return self._native.of(experts, num_modules, version=tuple(p._version for p in own if p is not None))

    def _row(self, module: int, expert: SlotWeights, place: int) -> Tensor:  # [in + 1]
        layer = self.place[module]
        return torch.cat([self.weights[layer][place], self.biases[layer][place : place + 1]]).detach()

    def gates(self, module: int, x: Tensor, experts: Experts) -> Tensor:
        """[tokens, experts]"""
        return self.gates_of(self.logits(module, x, experts))

    def logits(self, module: int, x: Tensor, experts: Experts) -> Tensor:
        """R x + bias [tokens, experts]; -inf for experts that don't adapt the module."""
        place = self.place[module]
        return _without_missing(x.float() @ self.weights[place].t() + self.biases[place], experts)

    def gates_of(self, logits: Tensor) -> Tensor:  # both [tokens, experts]
        """From logits to gates."""
        config = self.config
        if config.activation == "sigmoid":
            gates = torch.sigmoid(logits / config.temperature)
            return gates if config.top_k is None else gates.masked_fill(~_top(gates, config.top_k), 0)
        if config.top_p is None:
            return softmax_of_top(logits, config.top_k, config.temperature)
        return _top_p(torch.softmax(logits / config.temperature, dim=-1), config.top_p)

    def copy(self) -> "LinearRouter":
        """Another router with the same weights."""
        with torch.random.fork_rng(devices=[]):
            copied = LinearRouter(self.config, self.widths, self.num_experts)
        copied.load_state_dict(self.state_dict())
        return copied.to(self.biases[0].device)


class StaticRouter:
    """See StaticRouterConfig."""

    def __init__(self, config: StaticRouterConfig, modules: Sequence[int]) -> None:
        self.config = config
        gates = torch.tensor(config.gates, dtype=torch.float32)  # [experts] or [LoRA layers, experts]
        self._gates = gates.expand(len(modules), -1) if gates.ndim == 1 else gates
        self._place = {module: place for place, module in enumerate(modules)}
        self._native = NativeKept(
            _STATIC, None, 1.0, lambda module, _, place: self._gates[self._place[module], place : place + 1]
        )

    def native(self, experts: Layers, num_modules: int) -> NativeRouter | None:
        return self._native.of(experts, num_modules)

    def gates(self, module: int, x: Tensor, experts: Experts) -> Tensor:
        """[tokens, experts]"""
        return self._gates[self._place[module]].to(x.device).expand(len(x), -1)


def make_router(config: RouterConfig, widths: Mapping[int, int], num_experts: int) -> TokenRouter:
    """The router of a mixture whose LoRA layers, by module, have these inputs; a linear one's weights are random."""
    if isinstance(config, ArrowConfig):
        return ArrowRouter(config)
    if isinstance(config, SpectrConfig):
        return SpectrRouter(config)
    if isinstance(config, LinearRouterConfig):
        return LinearRouter(config, widths, num_experts).requires_grad_(False)
    return StaticRouter(config, list(widths))


def softmax_of_top(scores: Tensor, top_k: int | None, temperature: float) -> Tensor:  # both [tokens, experts]
    """A softmax of score / temperature over the `top_k` largest scores of each token; the others' gates are 0."""
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(~_top(scores, top_k), _NOT_THERE)
    return torch.softmax(scores / temperature, dim=-1)


def _top(scores: Tensor, top_k: int) -> Tensor:
    places = scores.topk(min(top_k, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)


def _top_p(probabilities: Tensor, top_p: float) -> Tensor:
    values, places = probabilities.sort(dim=-1, descending=True)
    values = values.masked_fill(values.cumsum(dim=-1) - values >= top_p, 0)
    return torch.zeros_like(probabilities).scatter_(-1, places, values / values.sum(dim=-1, keepdim=True))


def _without_missing(scores: Tensor, experts: Experts) -> Tensor:
    """Experts that don't adapt the module can't be chosen."""
    if all(expert is not None for expert in experts):
        return scores
    missing = torch.tensor([expert is None for expert in experts], device=scores.device)
    return scores.masked_fill(missing, _NOT_THERE)


class _Kept(Generic[Made]):
    """What is computed from a module's experts, kept as long as they are the same."""

    def __init__(self, compute: Callable[[Experts], Made]) -> None:
        self._compute = compute
        self._known: dict[int, tuple[Experts, Made]] = {}

    def of(self, module: int, experts: Experts) -> Made:
        known = self._known.get(module)
        if known is None or any(a is not b for a, b in zip(known[0], experts, strict=True)):
            with torch.no_grad():
                known = self._known[module] = (tuple(experts), self._compute(experts))
        return known[1]


class NativeKept:
    """A router for the compiled kernel, kept as long as the experts and what it was made of are the same."""

    def __init__(
        self,
        kind: int,
        top_k: int | None,
        temperature: float,
        parameters: Callable[[int, SlotWeights, int], Tensor],  # of a module's expert, which has a place
        *,
        top_p: float | None = None,
    ) -> None:
        self._settings = (kind, top_k or 0, temperature, top_p or 0.0)
        self._parameters = parameters
        self._known: tuple[Layers, object, NativeRouter | None] | None = None

    def of(self, experts: Layers, num_modules: int, version: object = None) -> NativeRouter | None:
        """For these experts; None where a scaling is 0, which leaves nothing of what scores are read from."""
        known = self._known
        if known is None or known[1] != version or any(a is not b for a, b in zip(known[0], experts, strict=True)):
            with torch.no_grad():
                known = self._known = (tuple(experts), version, self._make(experts, num_modules))
        return known[2]

    def _make(self, experts: Layers, num_modules: int) -> NativeRouter | None:
        """All parameters beside each other, those of a module's experts first: a step reads them in this order."""
        addresses = torch.zeros(len(experts), num_modules, dtype=torch.int64)
        found: dict[tuple[int, int], Tensor] = {}
        for place, layers in enumerate(experts):
            for module, weights in layers.items():
                if weights.scaling == 0:
                    return None
                parameters = self._parameters(module, weights, place)
                found[module, place] = parameters.to(weights.lora_a.device, torch.float32).flatten()
        if not found:
            return NativeRouter(*self._settings, addresses, None)
        kept = torch.cat([found[key] for key in sorted(found)])
        first = kept.data_ptr()
        for module, place in sorted(found):
            addresses[place, module] = first
            first += found[module, place].numel() * kept.element_size()
        return NativeRouter(*self._settings, addresses, kept)


def _prototypes(experts: Experts, seed: int) -> Tensor:  # [experts, in]
    like = next(expert.lora_a for expert in experts if expert is not None)
    none = like.new_zeros(like.shape[1], dtype=torch.float32)
    return torch.stack([none if expert is None else strongest_direction(expert, seed)[0] for expert in experts])


def strongest_direction(expert: Factors, seed: int) -> tuple[Tensor, Tensor]:  # [in], [rank]
    """The first right singular vector of an expert's B A, v = A'c, and c, as PEFT's power method has them."""
    a, gram = expert.lora_a.float(), gram_of(expert)
    v = torch.randn(a.shape[1], generator=torch.Generator(device=a.device.type).manual_seed(seed), device=a.device)
    v = v / (v.norm() + _EPS)
    c = v.new_zeros(len(a))
    for _ in range(_POWER_STEPS):
        c = gram @ (a @ v)
        w = a.t() @ c
        norm = w.norm() + _EPS
        v, c = w / norm, c / norm
    return v, c


def _grams(experts: Experts) -> list[Tensor]:
    return [torch.zeros(0) if expert is None else gram_of(expert) for expert in experts]


def gram_of(expert: Factors) -> Tensor:  # [rank, rank]
    """B'B of an expert."""
    b = expert.lora_b.float()  # [rank, out]
    return b @ b.t()
