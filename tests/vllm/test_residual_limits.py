"""Residuals that can't be served inside vLLM are refused when they are loaded; without an engine."""

import dataclasses
import json

import pytest
import torch
from peft import IA3Config, get_peft_model

from loraplex.errors import BaseModelMismatchError, CapacityError, ConfigError, LoraplexError, UnsupportedAdapterError
from loraplex.residual import parse_positions, write_residual
from loraplex.residual.layers import AttentionLayers
from loraplex.vllm_plugin.link_residuals import ResidualLimits
from loraplex.vllm_plugin.options import PluginOptions
from tests.residual.tiny_interventions import random_block_vector
from tests.residual.tiny_residuals import random_linked
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def layers():
    return AttentionLayers(tiny_model("llama"))


@pytest.fixture
def limits(layers):
    """An engine with caches for one linked residual of rank 4 at most, at the second layer alone."""
    return ResidualLimits(
        config=tiny_model("llama").config,
        identity=layers.identity,
        num_heads=layers.num_heads,
        sites=frozenset((site, block) for site in ("attention", "block") for block in (0, 1)),
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


def test_gates_and_pyrefts_folders_are_refused_with_what_to_do(limits, tmp_path):
    ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(tiny_model("llama"), ia3).save_pretrained(tmp_path / "ia3")
    with pytest.raises(UnsupportedAdapterError, match="IA3"):
        limits.read(tmp_path / "ia3", 1.0)
    folder = tmp_path / "pyreft"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin").write_bytes(b"")
    with pytest.raises(UnsupportedAdapterError, match="loraplex convert"):
        limits.read(folder, 1.0)


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
