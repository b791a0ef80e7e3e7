"""Mixtures with routers, from their folders to columns of one LoRA of vLLM's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex.adapters.weights import Adapter, LoraWeights, ModuleShape
from loraplex.models.routed_mixtures import check_gates
from loraplex.routers.config import ArrowConfig, LinearRouterConfig, RouterConfig, SpectrConfig, StaticRouterConfig
from loraplex.routers.folder import RouterFolder
from loraplex.routers.router import strongest_direction
from loraplex.vllm_plugin.concatenate import LinkMember, total_rank
from loraplex.vllm_plugin.route_ranks import ARROW, SIGMOID, SOFTMAX, SPECTR
from loraplex.vllm_plugin.routers import SlotRouting, settings_of


@dataclass(frozen=True)
class RoutedExperts:
    """A mixture with a router as members of a link: its experts and, after them, what is appended to A for it."""

    config: RouterConfig
    weight: float  # of the mixture in the link
    experts: Sequence[Adapter]
    logits: Adapter | None = None  # of a linear router: a row of A for each expert, and no B
    biases: Mapping[str, Tensor] | None = None  # [experts], of a linear router, by module path

    @property
    def members(self) -> list[tuple[Adapter, float]]:
        """With the weights that are folded into B; those of gated experts are in their gates."""
        weight = self.weight if isinstance(self.config, StaticRouterConfig) else 1.0
        return [(expert, weight) for expert in self.experts] + ([] if self.logits is None else [(self.logits, 1.0)])


def routed_experts(
    folder: RouterFolder, weight: float, experts: Sequence[Adapter], shapes: Mapping[str, ModuleShape]
) -> RoutedExperts:
    """A folder's mixture as members of a link, `shapes` the base's modules in the order of registration.

    SpectR's experts get factors of the same product whose values in rank space have the score's length. Static gates
    are folded into the experts. Raises ConfigError and AdapterFormatError.
    """
    adapted = {path for expert in experts for path in expert.layers}
    layers = [path for path in shapes if path in adapted]
    config = folder.config
    check_gates(config, len(experts), len(layers))
    if isinstance(config, SpectrConfig):
        return RoutedExperts(config, weight, [_orthogonal(expert) for expert in experts])
    if isinstance(config, StaticRouterConfig):
        return RoutedExperts(config, weight, _gated(experts, config, layers))
    if not isinstance(config, LinearRouterConfig):
        return RoutedExperts(config, weight, experts)
    widths = {path: shapes[path].in_features for path in layers}
    state = folder.read_router(widths)
    numbers = _numbers_of_weights(state, widths)
    rows = {
        path: LoraWeights(
            kind=shapes[path].kind,
            lora_a=state[f"weights.{number}"],
            lora_b=torch.zeros(len(experts), shapes[path].out_features),
            scaling=1.0,
        )
        for path, number in numbers.items()
    }
    biases = {path: state[f"biases.{number}"] for path, number in numbers.items()}
    return RoutedExperts(config, weight, experts, replace(experts[0], layers=rows), biases)


def _numbers_of_weights(state: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, int]:
    """Which of a linear router's weights a LoRA layer has: its own, or those that layers of its width share."""
    own = [state[f"weights.{i}"].shape[1] for i in range(len(state) // 2)]
    if len(own) == len(widths):
        return {path: number for number, path in enumerate(widths)}
    return {path: own.index(width) for path, width in widths.items()}


def _orthogonal(expert: Adapter) -> Adapter:
    """B A = Q (R A): the values R A x have the length of B A x."""
    layers = {}
    for path, weights in expert.layers.items():
        q, r = torch.linalg.qr(weights.lora_b.double().t())  # [out, rank], [rank, rank], of the smaller of both
        a = r @ weights.lora_a.double()
        layers[path] = replace(weights, lora_a=a.float(), lora_b=q.t().float())
    return replace(expert, layers=layers)


def _gated(experts: Sequence[Adapter], config: StaticRouterConfig, layers: Sequence[str]) -> list[Adapter]:
    """The experts with a static router's gates in their LoRA scalings."""
    gates = torch.tensor(config.gates, dtype=torch.float64).expand(len(layers), -1).tolist()
    of_layer = dict(zip(layers, gates, strict=True))
    return [
        replace(
            expert,
            layers={
                path: replace(weights, scaling=weights.scaling * of_layer[path][i])
                for path, weights in expert.layers.items()
            },
        )
        for i, expert in enumerate(experts)
    ]


class RoutingBuilder:
    """Fills one slot's routing, mixture by mixture."""

    def __init__(self, rank: int, max_experts: int, modules: Mapping[str, int], num_modules: int) -> None:
        """`rank` of the whole link, `modules` the numbers of vLLM's modules by path."""
        columns = 1 + max_experts
        self._modules = modules
        self._next = 1  # gate column
        self.routing = SlotRouting(
            score_columns=torch.zeros(rank, dtype=torch.int64),
            gate_columns=torch.zeros(rank, dtype=torch.int64),
            squares=torch.zeros(rank),
            kinds=torch.zeros(columns, dtype=torch.int64),
            mixtures=torch.zeros(columns, dtype=torch.int64),
            settings=settings_of(columns, temperature=1.0, top_k=None, top_p=None, weight=1.0),
            coefficients=torch.zeros(num_modules, rank),
            offsets=torch.zeros(num_modules, columns),
        )

    def add(self, mixture: RoutedExperts, members: Sequence[LinkMember]) -> None:
        """Route a mixture whose `members` have these rank columns. Static ones are in the factors already."""
        config, routing = mixture.config, self.routing
        if isinstance(config, StaticRouterConfig):
            return
        experts = members[: len(mixture.experts)]
        columns = slice(self._next, self._next + len(experts))
        routing.mixtures[columns] = self._next
        routing.kinds[columns] = _kind(config)
        top_p = config.top_p if isinstance(config, LinearRouterConfig) else None
        routing.settings[:, columns] = settings_of(
            len(experts), temperature=config.temperature, top_k=config.top_k, top_p=top_p, weight=mixture.weight
        )
        for i, expert in enumerate(experts):
            ranks, column = slice(expert.first, expert.first + expert.rank), self._next + i
            routing.gate_columns[ranks] = column
            if mixture.logits is None:
                routing.score_columns[ranks] = column
                self._read_values(expert, config)
            else:
                routing.score_columns[members[-1].first + i] = column
        if mixture.biases is not None:
            self._read_logits(members[-1], mixture.biases, columns)
        self._leave_out_missing(experts)
        self._next += len(experts)

    def _read_values(self, expert: LinkMember, config: RouterConfig) -> None:
        """Arrow: |c . h|, c the prototype in rank space; SpectR: the length of h."""
        if isinstance(config, SpectrConfig):
            self.routing.squares[expert.first : expert.first + expert.rank] = 1
        if not isinstance(config, ArrowConfig):
            return
        for path, weights in expert.adapter.layers.items():
            ranks = slice(expert.first, expert.first + weights.rank)
            self.routing.coefficients[self._modules[path], ranks] = strongest_direction(weights, config.rng_seed)[1]

    def _read_logits(self, logits: LinkMember, biases: Mapping[str, Tensor], columns: slice) -> None:
        for path, bias in biases.items():
            module = self._modules[path]
            self.routing.coefficients[module, logits.first : logits.first + logits.rank] = 1
            self.routing.offsets[module, columns] = bias

    def _leave_out_missing(self, experts: Sequence[LinkMember]) -> None:
        """An expert can't be chosen in a module that it doesn't adapt, and another does."""
        for path in {path for expert in experts for path in expert.adapter.layers}:
            for i, expert in enumerate(experts):
                if path not in expert.adapter.layers:
                    self.routing.offsets[self._modules[path], self._next + i] = -torch.inf


def needs_gates(mixtures: Sequence[RoutedExperts]) -> int:
    """How many experts of these mixtures have gates for each token."""
    return sum(len(m.experts) for m in mixtures if not isinstance(m.config, StaticRouterConfig))


def make_routing(
    mixtures: Sequence[tuple[RoutedExperts, Sequence[LinkMember]]],
    parts: Sequence[LinkMember],  # of the whole link
    modules: Mapping[str, int],
    num_modules: int,
) -> SlotRouting | None:
    """What routes a link's tokens; None where nothing does."""
    num_experts = needs_gates([mixture for mixture, _ in mixtures])
    if num_experts == 0:
        return None
    builder = RoutingBuilder(total_rank(parts), num_experts, modules, num_modules)
    for mixture, members in mixtures:
        builder.add(mixture, members)
    return builder.routing


def _kind(config: RouterConfig) -> int:
    if isinstance(config, LinearRouterConfig):
        return SIGMOID if config.activation == "sigmoid" else SOFTMAX
    return ARROW if isinstance(config, ArrowConfig) else SPECTR
