"""Routers in the compiled kernel give what they give in torch, for every rule, token and set of experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.kernels.native import gated_lora_native, native_available
from loraplex.routers.config import ArrowConfig, LinearRouterConfig, RouterConfig, SpectrConfig, StaticRouterConfig
from loraplex.routers.router import make_router
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.segments import RoutedGate, Segment
from tests.parts import skip_here

IN, OUT, TOKENS = 70, 50, 23
RULES: dict[str, RouterConfig] = {
    "arrow": ArrowConfig(top_k=2, temperature=0.3),
    "arrow of all": ArrowConfig(top_k=9),
    "spectr": SpectrConfig(temperature=0.4),
    "spectr, one": SpectrConfig(top_k=1),
    "linear": LinearRouterConfig(temperature=1.5),
    "linear, two": LinearRouterConfig(top_k=2),
    "linear, top p": LinearRouterConfig(top_p=0.7),
    "linear, nearly all": LinearRouterConfig(top_p=1.0),
    "sigmoid": LinearRouterConfig(activation="sigmoid", temperature=0.5),
    "sigmoid, two": LinearRouterConfig(activation="sigmoid", top_k=2),
    "static": StaticRouterConfig(gates=(0.5, 0.0, -1.5, 2.0)),
}


class Bank:
    """Slots with one module each, whose weights are of any rank; a slot may lack the module."""

    trainable = False

    def __init__(self, weights: Sequence[SlotWeights | None]) -> None:
        self._layers = [{} if each is None else {0: each} for each in weights]
        entries = [
            (0, 0, 0) if each is None else (each.lora_a.data_ptr(), each.lora_b.data_ptr(), len(each.lora_a))
            for each in weights
        ]
        self._table = torch.tensor(entries, dtype=torch.int64).view(-1, 1, 3)
        self._scalings = torch.tensor([[0.0 if each is None else each.scaling] for each in weights])

    def layers(self, slot: int) -> Mapping[int, SlotWeights]:
        return self._layers[slot]

    def dora_scaled(self, slot: int) -> frozenset[int]:
        return frozenset()

    def changes(self, slot: int) -> dict[int, Any]:
        return {}

    def expert_table(self) -> None:
        return None

    def dropout(self, slot: int) -> tuple[float, None]:
        return 0.0, None

    def max_rank(self, slot: int) -> int:
        return 16

    def native_table(self) -> tuple[Tensor, Tensor]:
        return self._table, self._scalings


def make_bank(dtype: torch.dtype, *, without: Sequence[int] = ()) -> Bank:
    generator = torch.Generator().manual_seed(1)

    def weights(slot: int) -> SlotWeights | None:
        rank = (8, 1, 5, 16, 4)[slot]
        a = torch.randn(rank, IN, generator=generator).to(dtype) / 8
        b = torch.randn(rank, OUT, generator=generator).to(dtype)
        return None if slot in without else SlotWeights(lora_a=a, lora_b=b, scaling=(0.5, 2.0, -1.0, 0.25, 1.0)[slot])

    return Bank([weights(slot) for slot in range(5)])


def make_plan(bank: Bank, config: RouterConfig) -> RoutingPlan:
    """Rows of one mixture with other weights, of another one with the same experts, and of plain adapters between."""
    torch.manual_seed(3)
    routers: list[Any] = [make_router(config, {0: IN}, 4) for _ in range(2)]
    spans = ((0, 6, routers[0], 1.0), (6, 7, routers[0], 0.5), (9, 14, routers[1], 1.0), (14, 20, routers[0], 1.0))
    segments = [
        Segment(start, stop, slot, RoutedGate(router, slot, weight))
        for start, stop, router, weight in spans
        for slot in range(4)
    ]
    segments += [Segment(7, 9, 1, 0.7), Segment(20, 23, 4, torch.tensor([1.0, 0.0, 2.0])), Segment(0, 6, 4, 1.0)]
    segments.sort(key=lambda segment: (segment.slot, segment.start))
    return RoutingPlan(segments, TOKENS, bank)


@pytest.mark.parametrize("without", [(), (2,), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_native_router_gives_what_torch_gives(rule: str, dtype: torch.dtype, without: Sequence[int]) -> None:
    if not native_available():
        skip_here("the compiled kernel")
    bank = make_bank(dtype, without=without)
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(2)).to(dtype)
    plan = make_plan(bank, RULES[rule])
    assert plan.routes_in_call
    found = gated_lora_native(torch.zeros(TOKENS, OUT), x, *plan.native_arguments(0))
    plan.route(0, x)
    expected = torch.zeros(TOKENS, OUT, dtype=torch.float64)
    for segment, weights in plan.weights_of(0):
        part = slice(segment.start, segment.stop)
        gates = torch.as_tensor(plan.gates.of_segment(segment, 0)).double().expand(segment.stop - segment.start)
        u = x[part].double() @ weights.lora_a.double().t()
        expected[part] += gates[:, None] * weights.scaling * (u @ weights.lora_b.double())
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max() + 1)
    for token in range(TOKENS):  # alone: the same bits
        own = [s._replace(start=0, stop=1) for s in plan.segments if s.start <= token < s.stop]
        gates = [
            s.gate[token - old.start : token - old.start + 1] if isinstance(s.gate, Tensor) else s.gate
            for s, old in zip(own, [s for s in plan.segments if s.start <= token < s.stop], strict=True)
        ]
        own = [s._replace(gate=gate) for s, gate in zip(own, gates, strict=True)]
        alone = RoutingPlan(own, 1, bank)
        y = gated_lora_native(torch.zeros(1, OUT), x[token : token + 1].contiguous(), *alone.native_arguments(0))
        assert torch.equal(y[0], found[token])


def test_scaling_of_zero_leaves_scores_to_torch() -> None:
    bank = make_bank(torch.float32)
    bank.layers(0)[0].__dict__["scaling"] = 0.0
    assert not make_plan(bank, SpectrConfig()).routes_in_call
