"""Routers between the Triton kernels' products against float64, in triton's interpreter."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams, SpectrConfig
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.kernels.triton.work import LARGE_TILE_TOKENS
from loraplex.routers.config import RouterConfig, StaticRouterConfig
from loraplex.routers.router import LinearRouter, make_router
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.segments import RoutedGate, Segment
from tests.kernels.test_native_router import RULES
from tests.routers.formulas import gates_of, scores_of
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

IN, OUTS = 70, (50, 16, 33)
RANKS = (8, 1, 5, 16, 70)  # of the slots; the last one is no expert's


class Bank:
    """Slots with three modules each; `without` names (slot, module) that aren't there."""

    trainable = False

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        num_in: int = IN,
        ranks: Sequence[int] = RANKS,
        without: Any = (),
        device: str = "cpu",
    ) -> None:
        draw = torch.Generator().manual_seed(1)

        def weights(slot: int, module: int) -> SlotWeights:
            a = (torch.randn(ranks[slot], num_in, generator=draw) / 8).to(dtype)
            b = torch.randn(ranks[slot], OUTS[module], generator=draw).to(dtype)
            a, b = a.to(device), b.to(device)
            return SlotWeights(lora_a=a, lora_b=b, scaling=(0.5, 2.0, -1.0, 0.25, 1.0)[slot])

        made = [{module: weights(slot, module) for module in range(3)} for slot in range(len(ranks))]
        self._layers = [
            {module: each for module, each in of_slot.items() if (slot, module) not in without}
            for slot, of_slot in enumerate(made)
        ]
        cells = [[self._cell(of_slot.get(module)) for module in range(3)] for of_slot in self._layers]
        self._table = torch.tensor(cells, dtype=torch.int64, device=device)
        self._scalings = torch.tensor(
            [[each.scaling if (each := of_slot.get(m)) else 0.0 for m in range(3)] for of_slot in self._layers],
            device=device,
        )
        self._max_rank = max(ranks)

    @staticmethod
    def _cell(each: SlotWeights | None) -> list[int]:
        return [0, 0, 0] if each is None else [each.lora_a.data_ptr(), each.lora_b.data_ptr(), len(each.lora_a)]

    def layers(self, slot: int) -> dict[int, SlotWeights]:
        return self._layers[slot]

    def dora_scaled(self, slot: int) -> frozenset[int]:
        return frozenset()

    def changes(self, slot: int) -> dict[str, Any]:
        return {}

    def max_rank(self, slot: int) -> int:
        return self._max_rank

    def native_table(self) -> tuple[Tensor, Tensor]:
        return self._table, self._scalings


SPANS = ((0, 6, 0, 1.0), (6, 7, 0, 0.5), (9, 14, 1, 1.0), (14, 20, 0, -1.0))  # start, stop, router, weight
TOKENS = 23


def make_plan(bank: Bank, config: RouterConfig, spans: Any = SPANS, num_in: int = IN, **options: Any) -> RoutingPlan:
    """Rows of two mixtures of the same experts, and of plain adapters between and beside them."""
    torch.manual_seed(3)
    routers = [make_router(config, dict.fromkeys(range(3), num_in), 4) for _ in range(2)]
    for router in routers:
        if isinstance(router, LinearRouter):
            router.to(bank.native_table()[0].device)
            for bias in router.biases:
                torch.nn.init.normal_(bias)
    segments = [
        Segment(start, stop, slot, RoutedGate(routers[router], slot, weight))
        for start, stop, router, weight in spans
        for slot in range(4)
    ]
    segments += [Segment(7, 9, 1, 0.7), Segment(20, 23, 4, torch.tensor([1.0, 0.0, 2.0])), Segment(0, 6, 4, 1.0)]
    segments.sort(key=lambda segment: (segment.slot, segment.start))
    return RoutingPlan(segments, max(TOKENS, *(span[1] for span in spans)), bank, **options)


def run(plan: RoutingPlan, x: Tensor, modules: Sequence[int]) -> list[Tensor]:
    from loraplex.kernels.triton.gated import gated_lora_triton

    ys = [torch.zeros(len(x), OUTS[module], device=x.device) for module in modules]
    gated_lora_triton(ys, x, plan.factors, modules, plan.work, plan.gates.all(), plan.routes)
    return ys


def expected(plan: RoutingPlan, config: RouterConfig, x: Tensor, module: int) -> Tensor:
    """One segment after the other and one token after the other, in float64."""
    y = torch.zeros(len(x), OUTS[module], dtype=torch.float64)
    for segment, weights in plan.weights_of(module):
        a, b = weights.lora_a.double(), weights.lora_b.double()
        for token in range(segment.start, segment.stop):
            gate = segment.gate
            if isinstance(gate, RoutedGate):
                gate = gate.weight * routed_gate(plan.bank, gate, config, x[token], module)
            elif isinstance(gate, Tensor):
                gate = float(gate[token - segment.start])
            y[token] += gate * weights.scaling * ((a @ x[token].double()) @ b)
    return y


def routed_gate(bank: Any, gate: RoutedGate, config: RouterConfig, x: Tensor, module: int) -> float:
    if isinstance(config, StaticRouterConfig):
        return config.gates[gate.expert]
    found = [bank.layers(slot).get(module) for slot in range(4)]
    factors = [None if each is None else (each.lora_a, each.lora_b) for each in found]
    router = gate.router
    rows, biases = (router.weights[module], router.biases[module]) if isinstance(router, LinearRouter) else (None, None)
    scores = scores_of(config, x, factors, rows, biases)
    return gates_of(config, scores, [each is not None for each in factors])[gate.expert]


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - wanted).abs().max()) < tolerance * float(wanted.abs().max() + 1)


def inputs(num_tokens: int, dtype: torch.dtype, num_in: int = IN) -> Tensor:
    return torch.randn(num_tokens, num_in, generator=torch.Generator().manual_seed(2)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_routers_equal_float64(rule: str) -> None:
    """Three projections of one input share the launch; the second lacks two experts, the third all of them."""
    without = [(0, 1), (3, 1), *((slot, 2) for slot in range(4))]
    bank, x, config = Bank(torch.float32, without=without), inputs(TOKENS, torch.float32), RULES[rule]
    plan = make_plan(bank, config)
    for module, found in enumerate(run(plan, x, range(3))):
        assert_near(found, expected(plan, config, x, module))


@torch.no_grad()
@pytest.mark.parametrize("rule", ["arrow", "spectr", "linear, top p"])
def test_bfloat16_large_tiles_and_features_in_parts_equal_float64(rule: str) -> None:
    config = RULES[rule]
    for num_in, tokens_per_row in ((IN, LARGE_TILE_TOKENS), (1200, 1)):
        bank, x = Bank(torch.bfloat16, num_in=num_in), inputs(100, torch.bfloat16, num_in)
        plan = make_plan(bank, config, ((23, 98, 0, 1.0),), num_in, tokens_per_row=tokens_per_row)
        for module, found in zip((2, 0), run(plan, x, (2, 0)), strict=True):
            assert_near(found, expected(plan, config, x, module), 2**-7)  # `expand` rounds to the factors' dtype


@torch.no_grad()
def test_ranks_of_several_blocks_equal_float64() -> None:
    x, bank = inputs(TOKENS, torch.float32), Bank(torch.float32, ranks=(70, 3, 90, 64, 4))
    for config in (RULES["spectr"], RULES["arrow"]):
        plan = make_plan(bank, config)
        assert_near(run(plan, x, (1,))[0], expected(plan, config, x, 1))


@torch.no_grad()
def test_gates_that_are_asked_for_are_kept_without_the_weights_of_links() -> None:
    config, x = RULES["spectr"], inputs(TOKENS, torch.float32)
    bank = Bank(torch.float32)
    plan = make_plan(bank, config)
    wanted, columns = torch.zeros(3, 6 + 24), []
    for row, *_ in plan.routing[0].tolist():  # the row of the link weighted -1: tokens 14 to 19, beside each other
        start, _, slot, _ = plan.row_list[row]
        columns.append((6 + slot, 4) if start == 14 else (-1, 1))
    kept = torch.zeros_like(wanted)
    plan.routing = (*plan.routing, torch.tensor(columns), kept)  # type: ignore[misc]
    run(plan, x, (0, 2))
    for segment in plan.segments:
        if isinstance(segment.gate, RoutedGate) and segment.start == 14:
            for token in range(14, 20):
                for module in (0, 2):
                    gate = routed_gate(bank, segment.gate, config, x[token], module)
                    wanted[module, 6 + (token - 14) * 4 + segment.gate.expert] = gate
    torch.testing.assert_close(kept, wanted, rtol=1e-5, atol=1e-6)
    assert kept[0].any()


@torch.no_grad()
def test_the_comparison_sees_a_launch_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplex.kernels.triton import gated

    config, x = RULES["arrow"], inputs(TOKENS, torch.float32)
    plan = make_plan(Bank(torch.float32), config)
    monkeypatch.setattr(gated, "route", lambda *args: None)
    with pytest.raises(AssertionError):
        assert_near(run(plan, x, (0,))[0], expected(plan, config, x, 0))


@torch.no_grad()
def test_a_token_has_the_same_bits_whatever_its_neighbours_use() -> None:
    config, x = RULES["linear, two"], inputs(TOKENS, torch.float32)
    bank = Bank(torch.float32)
    together = run(make_plan(bank, config), x, (0,))[0][16]
    alone = make_plan(bank, config, ((16, 17, 0, -1.0),))
    alone.segments[:] = [segment for segment in alone.segments if segment.start == 16]
    assert torch.equal(run(alone, x, (0,))[0][16], together)


@torch.no_grad()
def test_models_and_engines_route_in_the_launches_of_q_k_and_v(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, targets = tiny_model("llama"), linear_targets("llama")
    model = MultiLoraModel(base)
    for i in range(3):
        model.load_adapter(str(i), random_peft_adapter(base, tmp_path / str(i), targets=targets, seed=i, r=2 + i))
    model.create_mixture("spectr", ["0", "1", "2"], SpectrConfig(top_k=2))
    ids = torch.randint(7, 60, (4, 4), generator=torch.Generator().manual_seed(0))
    choices = ["spectr", None, "1", "spectr:0.5+0"]
    from loraplex.kernels.triton import gated

    launched: list[int] = []
    route = gated.route
    monkeypatch.setattr(
        gated, "route", lambda x, hidden, table, modules, *args: launched.append(len(modules)) or route(
            x, hidden, table, modules, *args
        )
    )  # fmt: skip
    for _ in range(2):  # the first sees which modules share their input
        launched.clear()
        logits = model(ids, adapters=choices).logits
    assert {1, 2, 3} <= set(launched)
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    requests = [
        Request(row, adapters=choice, sampling=sampling) for row, choice in zip(ids.tolist(), choices, strict=True)
    ]
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine:
        answers = [list(result.token_ids) for result in engine.generate(requests)]
    monkeypatch.setattr("loraplex.routing.plan.choose_kernel", lambda *args, **kwargs: "segmented")
    monkeypatch.setattr("loraplex.routing.plan.triton_runs", lambda *args: False)
    launched.clear()
    wanted = model(ids, adapters=choices).logits
    assert not launched
    assert torch.allclose(logits, wanted, atol=1e-4 * float(wanted.abs().max()))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 2, "pad_token_id": 0, "eos_token_id": None}
    for row, choice in enumerate(choices):
        found = model.generate(ids[row : row + 1], adapters=[choice], **options)
        assert found[0, 4:].tolist() == answers[row]
