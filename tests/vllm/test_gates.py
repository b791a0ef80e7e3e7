"""The gate operator and its buffers, without vLLM."""

import pytest
import torch

from loraplex.vllm_plugin.gates import PLAIN, BatchGates, GateBuffers, SlotMixture
from loraplex.vllm_plugin.layer_view import LayerView, gate_expansion, passes_keywords_on
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.head import ScalingHead
from loraplex.xlora.mixture import kept_scalings

MODULES, TOKENS, EXPERTS, SLOTS, RANK, HIDDEN = 4, 10, 3, 2, 6, 8


def make_buffers():
    return GateBuffers(
        num_modules=MODULES,
        max_tokens=TOKENS,
        max_experts=EXPERTS,
        num_slots=SLOTS,
        max_rank=RANK,
        device=torch.device("cpu"),
    )


@pytest.fixture
def buffers():
    buffers = make_buffers()
    buffers.gates.copy_(torch.rand(buffers.gates.shape))
    buffers.gates[..., PLAIN] = 1
    buffers.set_columns(1, torch.tensor([1, 1, 2, 2, 3]))
    buffers.set_slots([0, 1, -1, 1])
    buffers.is_on = True
    return buffers


def expected_gates(buffers, first, num_slices, num_tokens):
    gates = torch.empty(num_slices, num_tokens, RANK)
    for s in range(num_slices):
        for t in range(num_tokens):
            for r in range(RANK):
                gates[s, t, r] = buffers.gates[first + s, t, buffers.columns[buffers.slots[t], r]]
    return gates


def test_gate_multiplies_every_rank_column_by_its_own_gate(buffers):
    x = torch.randn(2, 4, RANK)
    gated = x.clone()
    buffers.apply(gated, 1)
    assert torch.equal(gated, x * expected_gates(buffers, 1, 2, 4))
    assert torch.equal(gated[:, [0, 2]], x[:, [0, 2]])  # tokens of a plain adapter and of none
    assert not torch.equal(gated[:, 1], x[:, 1])


def test_slices_may_be_tensors_of_their_own(buffers):
    x = torch.randn(3, 4, RANK)
    together, apart = x.clone(), tuple(part.clone() for part in x)
    buffers.apply(together, 0)
    buffers.apply(apart, 0)
    assert torch.equal(together, torch.stack(apart))


def test_tokens_that_pad_a_graph_have_no_slot(buffers):
    buffers.set_slots([1, 1, 1, 1, 1, 1])
    buffers.set_slots([1])
    x = torch.randn(1, 6, RANK)
    gated = x.clone()
    buffers.apply(gated, 0)
    assert torch.equal(gated[:, 1:], x[:, 1:])


def test_operator_traces_as_one_node_and_reads_the_buffers_at_run_time(buffers):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(x, lora_a, lora_b):
        h = x @ lora_a
        buffers.apply(h.unsqueeze(0), 2)
        return h @ lora_b

    buffers.is_always_on, buffers.is_on = True, False  # as on a GPU
    x, lora_a, lora_b = torch.randn(4, 5), torch.randn(5, RANK), torch.randn(RANK, 7)
    for seed in range(2):  # the second time with other gates and slots in the same buffers, and the same graph
        torch.manual_seed(seed)
        buffers.gates[..., 1:] = torch.rand(MODULES, TOKENS, EXPERTS)
        buffers.set_slots([1, 0, 1, -1] if seed else [0, 1, -1, 1])
        expected = ((x @ lora_a) * expected_gates(buffers, 2, 1, 4)[0]) @ lora_b
        torch.testing.assert_close(layer(x, lora_a, lora_b), expected)


def test_operator_is_opaque_and_mutating():
    schema = torch.ops.loraplex.gate_ranks_.default._schema
    assert [argument.alias_info is not None for argument in schema.arguments][:2] == [True, False]
    torch.library.opcheck(
        torch.ops.loraplex.gate_ranks_.default,
        (torch.randn(2, 4, RANK), *vars_of(make_buffers()), 1),
        test_utils=("test_schema", "test_faketensor"),
    )


def vars_of(buffers):
    return buffers.gates, buffers.columns, buffers.slots


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


class Deaf(Wrapper):
    def add_lora_linear(self, y, x, lora_a, lora_b, scale, output_slices, **kwargs):
        Wrapper.add_lora_linear(self, y, x, lora_a, lora_b, scale, output_slices)


def test_layer_view_gates_its_layer_and_traces(buffers):
    wrapper = Wrapper()
    gate_expansion(wrapper, buffers)
    view = LayerView(wrapper, 3)
    buffers.is_always_on = True
    x, lora_a, lora_b = torch.randn(4, 5), torch.randn(5, RANK), torch.randn(RANK, 7)

    def layer(x):
        y = torch.zeros(4, 7)
        view.add_lora_linear(y, x, lora_a, lora_b, 1.0, (7,))
        return y

    expected = ((x @ lora_a) * expected_gates(buffers, 3, 1, 4)[0]) @ lora_b
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    plain = torch.zeros(4, 7)
    wrapper.add_lora_linear(plain, x, lora_a, lora_b, 1.0, (7,))  # an embedding says no module, and isn't gated
    torch.testing.assert_close(plain, x @ lora_a @ lora_b)


def test_wrapper_that_drops_keywords_is_noticed():
    assert passes_keywords_on(Wrapper)
    assert not passes_keywords_on(Deaf)


def make_use(config=None, first_column=1, weight=1.0):
    config = config or XLoraConfig(layerwise_scalings=True, top_k_lora=1, global_scaling_weight=0.5)
    head = ScalingHead(config, hidden_size=HIDDEN, num_experts=2, num_layers=2).eval()
    return SlotMixture(
        name="science",
        config=config,
        weight=weight,
        head=head.requires_grad_(False),
        layer_of_module=torch.tensor([0, 1, 1, 0]),
        first_column=first_column,
    )


def test_gates_of_the_main_pass_are_those_of_the_head(buffers):
    gates, use = BatchGates(buffers), make_use(weight=0.7)
    gates.set_slot(1, (use,), torch.tensor([1, 1, 2, 0]))
    gates.set_tokens([0, 1, -1, 1])
    gates.begin_scaling_pass()
    assert not buffers.gates[:, [1, 3], :3].any()  # the base model: experts and linked adapters are off
    assert buffers.gates[:, [0, 2], PLAIN].eq(1).all()
    hidden = torch.randn(4, HIDDEN)
    gates.begin_main_pass(hidden)
    kept = kept_scalings(use.head(hidden[[1, 3]]), use.config) * (0.5 * 0.7)  # [tokens, layers, experts]
    for module, layer in enumerate([0, 1, 1, 0]):
        torch.testing.assert_close(buffers.gates[module, [1, 3], 1:3], kept[:, layer])
    assert buffers.gates[..., PLAIN].eq(1).all()


def test_scaling_pass_with_a_value_runs_the_experts_without_the_links_weight(buffers):
    config = XLoraConfig(scaling_pass_value=None, global_scaling_weight=2.0)
    gates = BatchGates(buffers)
    gates.set_slot(0, (make_use(config, weight=0.3),), torch.tensor([1, 2]))
    gates.set_tokens([0])
    gates.begin_scaling_pass()
    assert buffers.is_on
    assert buffers.gates[:, 0, 1:3].eq(0.5 * 2.0).all()
    assert not buffers.gates[:, 0, PLAIN].any()


def test_batch_without_its_scaling_pass_is_stopped(buffers):
    from loraplex.errors import MixtureError

    gates = BatchGates(buffers)
    gates.set_slot(1, (make_use(),), torch.tensor([1, 2]))
    gates.set_tokens([0, 0])
    gates.check_gated()  # no mixture in it
    gates.set_tokens([0, 1])
    with pytest.raises(MixtureError, match="scaling pass"):
        gates.check_gated()
    gates.set_tokens([0, 1])
    with pytest.raises(MixtureError, match="scaling pass"):
        gates.set_tokens([0, 1])  # the next batch begins


def test_slot_with_another_adapter_is_plain_again(buffers):
    gates = BatchGates(buffers)
    gates.set_slot(1, (make_use(),), torch.tensor([1, 2]))
    gates.set_slot(1, (), None)
    gates.set_tokens([1])
    assert gates.groups == ()
    assert not buffers.columns[1].any()
