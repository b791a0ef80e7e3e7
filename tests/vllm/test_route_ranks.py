"""The operator that gates experts by their own values in rank space, and its buffers: without vLLM."""

import pytest
import torch

from loraplex import ArrowConfig, LinearRouterConfig, SpectrConfig, StaticRouterConfig
from loraplex.adapters.config import LoraConfig
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleShape
from loraplex.routers.folder import RouterFolder
from loraplex.vllm_plugin.concatenate import concatenate, index_members, total_rank
from loraplex.vllm_plugin.layer_view import LayerView, gate_expansion
from loraplex.vllm_plugin.link_routers import make_routing, needs_gates, routed_experts
from loraplex.vllm_plugin.routers import RouterBuffers
from loraplex.vllm_plugin.slot_routers import SlotRouters
from tests.routers.formulas import gates_of, scores_of

IN, OUT, TOKENS, SLOTS, RANK = 12, 10, 9, 3, 32
RANKS = (3, 2, 4)  # of the experts
SHAPES = {path: ModuleShape(kind="linear", in_features=IN, out_features=OUT) for path in ("first", "second")}
MODULES = {"first": 1, "second": 2}
MISSING = {("second", 1)}  # the second expert doesn't adapt the second module

CONFIGS = {
    "arrow": ArrowConfig(top_k=2, temperature=0.5),
    "arrow of all": ArrowConfig(top_k=3),
    "spectr": SpectrConfig(top_k=2, temperature=0.7),
    "softmax": LinearRouterConfig(temperature=2.0),
    "top_k": LinearRouterConfig(top_k=1),
    "top_p": LinearRouterConfig(top_p=0.6),
    "sigmoid": LinearRouterConfig(activation="sigmoid", temperature=0.5, top_k=2),
    "static": StaticRouterConfig(gates=((0.5, -1.0, 0.3), (0.2, 0.9, 2.0))),
}


class Router(RouterFolder):
    """A folder's mixture whose linear router is in memory."""

    def read_router(self, widths):
        generator = torch.Generator().manual_seed(5)
        sizes = {f"weights.{i}": (len(RANKS), width) for i, width in enumerate(widths.values())}
        sizes |= {f"biases.{i}": (len(RANKS),) for i in range(len(widths))}
        return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def experts():
    generator = torch.Generator().manual_seed(1)
    return [
        Adapter(
            config=LoraConfig(r=rank, lora_alpha=rank, target_modules=("first", "second")),
            layers={
                path: LoraWeights(
                    kind="linear",
                    lora_a=torch.randn(rank, IN, generator=generator),
                    lora_b=torch.randn(rank, OUT, generator=generator),
                    scaling=0.5 + i,
                )
                for path in SHAPES
                if (path, i) not in MISSING
            },
        )
        for i, rank in enumerate(RANKS)
    ]


def make_mixture(config, weight=1.0):
    folder = Router(folder=None, config=config, experts=dict.fromkeys("abc"), layers=(), base_model_name=None)
    return routed_experts(folder, weight, experts(), SHAPES)


def expected(config, x, path, weight=1.0):
    """sum_i gate_i scaling_i B_i A_i x, token by token."""
    place = list(SHAPES).index(path)
    found = [expert.layers.get(path) for expert in experts()]
    factors = [None if w is None else (w.lora_a, w.lora_b) for w in found]
    router = Router(folder=None, config=config, experts={}, layers=(), base_model_name=None).read_router(
        dict.fromkeys(SHAPES, IN)
    )
    y = torch.zeros(len(x), OUT, dtype=torch.float64)
    for t, token in enumerate(x.double()):
        if isinstance(config, StaticRouterConfig):
            gates = config.gates[place]
        else:
            scores = scores_of(config, token, factors, router[f"weights.{place}"], router[f"biases.{place}"])
            gates = gates_of(config, scores, [each is not None for each in factors])
        for gate, weights in zip(gates, found, strict=True):
            if weights is not None:
                a, b = weights.lora_a.double(), weights.lora_b.double()
                y[t] += gate * weight * weights.scaling * (b.t() @ (a @ token))
    return y


def slot_of(*mixtures):
    """The factors of a link of these mixtures by path, and what routes them."""
    members = [mixture.members for mixture in mixtures]
    parts = index_members([member for found in members for member in found])
    first, of_parts = 0, []
    for mixture, found in zip(mixtures, members, strict=True):
        of_parts.append((mixture, parts[first : first + len(found)]))
        first += len(found)
    factors = concatenate(parts, torch.float32)
    return factors, make_routing(of_parts, parts, MODULES, 4), total_rank(parts)


def make_slot_routers():
    return SlotRouters(max_rank=RANK)


def make_buffers(max_experts=6):
    return RouterBuffers(
        num_modules=4,
        max_tokens=TOKENS + 3,
        max_experts=max_experts,
        num_slots=SLOTS,
        max_rank=RANK,
        device=torch.device("cpu"),
    )


def padded(values):
    return torch.nn.functional.pad(values, (0, RANK - values.shape[-1]))


def run(buffers, slot_factors, slots, x, path, sum_ranks=None, share=slice(None)):
    """What a layer adds to its tokens."""
    hidden = torch.zeros(len(x), RANK)
    for t, slot in enumerate(slots):
        if slot in slot_factors:
            hidden[t] = padded(slot_factors[slot][path][0][:, share] @ x[t, share])
    gated = hidden.unsqueeze(0).clone()
    buffers.apply(gated, MODULES[path], sum_ranks)
    y = torch.zeros(len(x), OUT)
    for t, slot in enumerate(slots):
        if slot in slot_factors:
            lora_b = slot_factors[slot][path][1]
            y[t] = lora_b @ gated[0, t, : lora_b.shape[1]]
    return y


def inputs():
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("make", [make_buffers, make_slot_routers])
@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_get_the_gates_of_their_formula_beside_other_slots(kind, path, make):
    config, buffers, x = CONFIGS[kind], make(), inputs()
    mixture = make_mixture(config, 0.7)
    factors, routing, _ = slot_of(mixture)
    assert (routing is None) == isinstance(config, StaticRouterConfig)
    plain = slot_of(make_mixture(StaticRouterConfig(gates=(1.0, 1.0, 1.0))))[0]
    buffers.set_slot(1, routing)
    buffers.set_slot(0, None)
    slots = [0, 1, 1, -1, 1, 1, 0, 1, 1]
    buffers.set_tokens(slots)
    y = run(buffers, {0: plain, 1: factors}, slots, x, path)
    wanted = expected(config, x, path, 0.7)
    for t, slot in enumerate(slots):
        if slot == 1:
            torch.testing.assert_close(y[t].double(), wanted[t], rtol=1e-4, atol=1e-5)
        elif slot == -1:
            assert not y[t].any()
        else:
            both = [w.layers[path] for w in experts() if path in w.layers]
            total = sum(w.scaling * w.lora_b.t() @ (w.lora_a @ x[t]) for w in both)
            torch.testing.assert_close(y[t], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make_buffers, make_slot_routers])
def test_mixtures_of_one_link_choose_apart(make):
    first, second = CONFIGS["arrow"], CONFIGS["top_p"]
    mixtures = [make_mixture(first, 0.5), make_mixture(second, 2.0), make_mixture(CONFIGS["static"], -1.0)]
    assert needs_gates(mixtures) == 6
    factors, routing, rank = slot_of(*mixtures)
    assert rank == 3 * sum(RANKS) + len(RANKS)
    buffers, x = make(), inputs()
    buffers.set_slot(2, routing)
    buffers.set_tokens([2] * TOKENS)
    y = run(buffers, {2: factors}, [2] * TOKENS, x, "first")
    wanted = sum(
        expected(config, x, "first", weight)
        for config, weight in ((first, 0.5), (second, 2.0), (CONFIGS["static"], -1.0))
    )
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make_buffers, make_slot_routers])
@pytest.mark.parametrize("kind", ["arrow", "spectr", "top_p", "sigmoid"])
def test_workers_with_a_part_of_the_input_add_up_to_the_whole(kind, make):
    """A row-parallel layer: each of two workers has half of x and of A, and their outputs are added."""
    config, x = CONFIGS[kind], inputs()
    factors, routing, _ = slot_of(make_mixture(config))
    halves = (slice(0, 5), slice(5, IN))
    buffers = make()
    buffers.set_slot(0, routing)
    slots = [0] * TOKENS
    buffers.set_tokens(slots)
    whole = torch.stack([padded(factors["first"][0] @ token) for token in x]).unsqueeze(0)
    parts = [run(buffers, {0: factors}, slots, x, "first", lambda part: part.copy_(whole), share) for share in halves]
    torch.testing.assert_close(sum(parts).double(), expected(config, x, "first"), rtol=1e-4, atol=1e-5)
    wrong = [run(buffers, {0: factors}, slots, x, "first", None, share) for share in halves]  # each by its own part
    assert not torch.allclose(sum(wrong).double(), expected(config, x, "first"), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("make", [make_buffers, make_slot_routers])
def test_equal_scores_go_to_the_first_expert(make):
    config = LinearRouterConfig(top_k=1)
    mixture = make_mixture(config)
    routing = slot_of(mixture)[1]
    routing.offsets.zero_()
    routing.coefficients.zero_()  # all scores are 0
    buffers = make()
    buffers.set_slot(0, routing)
    buffers.set_tokens([0])
    x = torch.ones(1, 1, RANK)
    buffers.apply(x, 1)
    first = RANKS[0]
    assert x[0, 0, :first].eq(1).all()
    assert not x[0, 0, first : sum(RANKS)].any()


@pytest.mark.parametrize("make", [make_buffers, make_slot_routers])
def test_slot_that_holds_another_adapter_gates_nothing(make):
    buffers = make()
    buffers.set_slot(1, slot_of(make_mixture(CONFIGS["arrow"]))[1])
    buffers.set_tokens([1, 1])
    buffers.set_slot(1, None)
    buffers.set_tokens([1])
    x = torch.randn(2, 2, RANK)
    gated = x.clone()
    buffers.apply(gated, 1)
    assert torch.equal(gated, x)


def test_tokens_that_pad_a_graph_have_no_router():
    buffers = make_buffers()
    buffers.set_slot(1, slot_of(make_mixture(CONFIGS["spectr"]))[1])
    buffers.set_tokens([1] * 6)
    buffers.set_tokens([1])
    x = torch.randn(1, 6, RANK)
    gated = x.clone()
    buffers.apply(gated, 1)
    assert torch.equal(gated[:, 1:], x[:, 1:])
    assert not torch.equal(gated[:, 0], x[:, 0])


class Wrapper:
    """What vLLM's Punica wrappers do, without slots."""

    def add_shrink(self, buffer, x, lora_a, scale, **kwargs):
        buffer.copy_((x @ lora_a).unsqueeze(0) * scale)

    def add_expand(self, y, x, lora_b, output_slices, offset_start=0, add_inputs=True, **kwargs):
        y += x[0] @ lora_b

    def add_lora_linear(self, y, x, lora_a, lora_b, scale, output_slices, **kwargs):
        buffer = torch.empty(1, len(x), RANK)
        self.add_shrink(buffer, x, lora_a, scale, **kwargs)
        self.add_expand(y, buffer, lora_b, output_slices, add_inputs=True, **kwargs)


def test_layer_traces_as_one_graph_that_reads_the_buffers_at_run_time():
    buffers, wrapper = make_buffers(), Wrapper()
    gate_expansion(wrapper, None, buffers)
    view, summed = LayerView(wrapper, MODULES["first"]), LayerView(wrapper, MODULES["first"], lambda values: values * 2)
    x, lora_a, lora_b = torch.randn(4, 5), torch.randn(5, RANK), torch.randn(RANK, 7)

    def layer(x, view):
        y = torch.zeros(4, 7)
        view.add_lora_linear(y, x, lora_a, lora_b, 1.0, (7,))
        return y

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    routing = slot_of(make_mixture(CONFIGS["arrow"]))[1]
    for slots in ([-1] * 4, [0, -1, 0, 0]):  # the second time with other slots in the same buffers
        buffers.set_slot(0, routing)
        buffers.set_tokens(slots)
        for chosen in (view, summed):
            torch.testing.assert_close(compiled(x, chosen), layer(x, chosen))
    assert not torch.allclose(layer(x, view), x @ lora_a @ lora_b)


def test_operator_is_opaque_and_mutating():
    buffers = make_buffers()
    schema = torch.ops.loraplex.route_ranks_.default._schema
    assert [argument.alias_info is not None for argument in schema.arguments][:3] == [True, False, False]
    torch.library.opcheck(
        torch.ops.loraplex.route_ranks_.default,
        (torch.randn(2, 4, RANK), None, buffers.slots, buffers.tables, 1),
        test_utils=("test_schema", "test_faketensor"),
    )
