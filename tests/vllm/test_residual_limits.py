"""Residuals that can't be served inside vLLM are refused when they are loaded; without an engine."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, get_peft_model

from loraplex.errors import BaseModelMismatchError, CapacityError, ConfigError, LoraplexError, UnsupportedAdapterError
from loraplex.layers.base.modules import adaptable_modules
from loraplex.residual import GateResidual, parse_positions, write_residual
from loraplex.residual.layers import AttentionLayers
from loraplex.vllm_plugin.link_residuals import ResidualLimits
from loraplex.vllm_plugin.model_gates import GateModules
from loraplex.vllm_plugin.options import PluginOptions
from tests.residual.tiny_interventions import random_block_vector
from tests.residual.tiny_residuals import random_linked
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def layers():
    return AttentionLayers(tiny_model("llama"))


class Layer:
    """A LoRA layer of vLLM's as far as gates ask about it: `slices` of this worker's output, of a whole `sizes`."""

    def __init__(self, sizes, *, is_row=False, size_in=64, rank=0, num_workers=1):
        self.n_slices, self.tp_size = len(sizes), num_workers
        self.output_slices = tuple(sizes if is_row else (size // num_workers for size in sizes))
        self.base_layer = SimpleNamespace(**({"input_is_parallel": True} if is_row else {}))
        self._rank, self._in = rank, size_in // num_workers

    def slice_lora_a(self, a):  # RowParallelLinearWithLoRA
        return a[:, self._rank * self._in : (self._rank + 1) * self._in]

    def slice_lora_b(self, b):  # MergedQKVParallelLinearWithLoRA, ColumnParallelLinearWithLoRA
        if self.n_slices == 1:
            return b[self._rank * self.output_slices[0] : (self._rank + 1) * self.output_slices[0]]
        return [
            None if own is None else own[self._rank * size : (self._rank + 1) * size]
            for own, size in zip(b, self.output_slices, strict=True)
        ]


def gate_modules(**worker):
    """The tiny Llama's layers as vLLM packs them, and as it splits them over workers."""
    base = tiny_model("llama")
    inner = base.config.intermediate_size
    layers, packed = {}, {}
    for block in range(2):
        attn, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        layers[f"{attn}.qkv_proj"] = Layer([64, 32, 32], **worker)
        packed[f"{attn}.qkv_proj"] = [f"{attn}.{part}_proj" for part in "qkv"]
        layers[f"{attn}.o_proj"] = Layer([64], is_row=True, **worker)
        layers[f"{mlp}.gate_up_proj"] = Layer([inner, inner], **worker)
        packed[f"{mlp}.gate_up_proj"] = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        layers[f"{mlp}.down_proj"] = Layer([64], is_row=True, size_in=inner, **worker)
    return GateModules(layers, packed, lambda path: path, adaptable_modules(base), "lm_head")


@pytest.fixture
def limits(layers):
    """An engine with caches for one linked residual of rank 4 at most, at the second layer alone."""
    return ResidualLimits(
        config=tiny_model("llama").config,
        identity=layers.identity,
        num_heads=layers.num_heads,
        sites=frozenset((site, block) for site in ("attention", "block") for block in (0, 1)),
        gates=gate_modules(),
        num_linked=1,
        linked_layers={1: 4},
        device=torch.device("cpu"),
    )


def written(residual, folder):
    write_residual(residual, folder)
    return folder


def test_what_fits_is_read(limits, layers, tmp_path):
    link = limits.read(written(random_linked(layers, 1, at=[1]), tmp_path / "linked"), 0.5)
    assert (link.name, link.weight, sorted(link.residual.layers)) == ("linked", 0.5, [1])
    vector = random_block_vector(tiny_model("llama"), 1, "attention", parse_positions("f2+l3"))
    assert limits.read(written(vector, tmp_path / "vector"), 1.0).residual.site == "attention"


def test_linked_residuals_beyond_the_caches_are_refused(limits, layers, tmp_path):
    with pytest.raises(CapacityError, match=r"attention layers \[0\]"):
        limits.read(written(random_linked(layers, 1), tmp_path / "everywhere"), 1.0)
    with pytest.raises(UnsupportedAdapterError, match="rank 5"):
        limits.read(written(random_linked(layers, 1, r=5, at=[1]), tmp_path / "wide"), 1.0)
    chain = [limits.read(written(random_linked(layers, i, at=[1]), tmp_path / f"{i}"), 1.0) for i in range(2)]
    limits.check_chain(chain[:1])
    with pytest.raises(CapacityError, match='"linked": 2'):
        limits.check_chain(chain)
    with pytest.raises(CapacityError, match='"linked": 1'):
        dataclasses.replace(limits, num_linked=0, linked_layers={}).check_chain(chain[:1])


def test_residuals_of_other_models_and_sites_are_refused(limits, tmp_path):
    other = AttentionLayers(tiny_model("gpt2"))
    with pytest.raises(BaseModelMismatchError, match="GPT2LMHeadModel"):
        limits.read(written(random_linked(other, 1), tmp_path / "other"), 1.0)
    with pytest.raises(BaseModelMismatchError, match="mlp"):
        limits.read(written(random_block_vector(tiny_model("llama"), 1, "mlp"), tmp_path / "mlp"), 1.0)
    with pytest.raises(BaseModelMismatchError, match=r"layers \[2\]"):
        limits.read(written(random_block_vector(tiny_model("llama"), 1, at=(1, 2)), tmp_path / "deep"), 1.0)


def test_pyrefts_folders_are_refused_with_what_to_do(limits, tmp_path):
    folder = tmp_path / "pyreft"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin").write_bytes(b"")
    with pytest.raises(UnsupportedAdapterError, match="loraplex convert"):
        limits.read(folder, 1.0)


def test_ia3_becomes_the_gates_of_vllms_layers(limits, tmp_path):
    ia3 = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    torch.manual_seed(0)
    peft = get_peft_model(tiny_model("llama"), ia3)
    peft.save_pretrained(tmp_path / "ia3")
    found = limits.read(tmp_path / "ia3", 0.5).residual
    attn, down = (peft.base_model.model.model.layers[1].get_submodule(path) for path in ("self_attn", "mlp.down_proj"))
    k, v = (getattr(attn, f"{part}_proj").ia3_l["default"].detach().flatten() for part in "kv")
    whole = found.outputs["model.layers.1.self_attn.qkv_proj"]
    torch.testing.assert_close(whole, torch.cat([torch.ones(64), k, v]))
    torch.testing.assert_close(found.inputs["model.layers.1.mlp.down_proj"], down.ia3_l["default"].detach().flatten())
    assert len(found.outputs) == len(found.inputs) == 2


def test_gates_are_split_over_workers_as_layers_are():
    draw = torch.Generator().manual_seed(0)
    size = tiny_model("llama").config.intermediate_size
    q, v, o, inner = (torch.rand(n, generator=draw) for n in (64, 32, 64, size))
    block = "model.layers.0"
    residual = GateResidual(
        outputs={f"{block}.self_attn.q_proj": q, f"{block}.self_attn.v_proj": v, f"{block}.self_attn.o_proj": o},
        inputs={f"{block}.mlp.down_proj": inner},
    )
    for rank in (0, 1):
        local = gate_modules(rank=rank, num_workers=2).local(residual)
        own = torch.cat([q.chunk(2)[rank], torch.ones(16), v.chunk(2)[rank]])
        assert local.outputs[f"{block}.self_attn.qkv_proj"].equal(own)
        assert local.outputs[f"{block}.self_attn.o_proj"].equal(o)  # behind the sum over workers
        assert local.inputs[f"{block}.mlp.down_proj"].equal(inner.chunk(2)[rank])


def test_gates_that_vllms_layers_have_no_place_for_are_refused(limits, tmp_path):
    def folder(name, **gates):
        return written(GateResidual(**gates), tmp_path / name)

    one = {"model.layers.0.self_attn.q_proj": torch.rand(64)}
    with pytest.raises(UnsupportedAdapterError, match="q_proj"):  # qkv_proj reads once
        limits.read(folder("one", inputs=one), 1.0)
    same = {f"model.layers.0.self_attn.{part}_proj": next(iter(one.values())) for part in "qkv"}
    read = limits.read(folder("same", inputs=same), 1.0).residual
    assert list(read.inputs) == ["model.layers.0.self_attn.qkv_proj"]
    with pytest.raises(UnsupportedAdapterError, match="lm_head"):
        limits.read(folder("head", outputs={"lm_head": torch.rand(tiny_model("llama").config.vocab_size)}), 1.0)
    with pytest.raises(BaseModelMismatchError, match="other sizes"):
        limits.read(folder("wide", outputs={"model.layers.0.self_attn.q_proj": torch.rand(63)}), 1.0)


def test_damaged_folders_are_refused(limits, tmp_path):
    folder = written(random_block_vector(tiny_model("llama"), 1), tmp_path / "damaged")
    settings = json.loads((folder / "residual_config.json").read_text())
    (folder / "residual_config.json").write_text(json.dumps(settings | {"hidden_size": 7}))
    with pytest.raises(LoraplexError):
        limits.read(folder, 1.0)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("residuals", 1, "residuals is 1"),
        ("attention", "yes", "attention is 'yes'"),
        ("linked", -1, "0 to 8"),
        ("linked", 9, "0 to 8"),
        ("linked", True, "0 to 8"),
        ("attention_layers", [], "a list of layer numbers"),
        ("attention_layers", [0, -1], "a list of layer numbers"),
        ("attention_layers", [1, 1], "twice"),
        ("attention_layers", "all", "a list of layer numbers"),
    ],
)
def test_options_that_cant_be_used_are_refused(option, value, words):
    with pytest.raises(ConfigError, match=words):
        PluginOptions(**{option: value})


def test_link_may_name_a_control_vector_by_its_file(tmp_path):
    from loraplex.residual import write_control_vector
    from loraplex.vllm_plugin.catalog import FolderCatalog

    vector = random_block_vector(tiny_model("llama"), 1, at=(1,))
    write_control_vector(vector, tmp_path / "calm.gguf", model_type="llama")
    (tmp_path / "named").mkdir()
    write_control_vector(vector, tmp_path / "named" / "calm.gguf", model_type="llama")
    catalog = FolderCatalog(PluginOptions(folder=str(tmp_path / "named")))
    assert catalog.find("calm:0.5") == ((tmp_path / "named" / "calm.gguf", 0.5),)
    assert catalog.find(str(tmp_path / "named" / "calm.gguf")) == ((tmp_path / "named" / "calm.gguf", 1.0),)
    with pytest.raises(LoraplexError, match="lies outside"):
        catalog.find(str(tmp_path / "calm.gguf"))
    (tmp_path / "named" / "out.gguf").symlink_to(tmp_path / "calm.gguf")
    with pytest.raises(LoraplexError, match="out"):
        catalog.find("out")
