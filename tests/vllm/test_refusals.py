"""What isn't proven is refused by name: versions, seams, settings, models, folders."""

import copy
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from loraplex.errors import CapacityError, CompatibilityError, LoraplexError, MixtureError, UnsupportedEngineError
from tests.vllm.worlds import HIDDEN, engine_settings

LINKS, MIXTURES, ROUTERS = {}, {"mixtures": True}, {"routers": True}
RESIDUALS, LINKED, ATTENTION = {"residuals": True}, {"linked": 1}, {"attention": True}


@pytest.fixture(scope="module")
def config(world):
    from vllm.engine.arg_utils import EngineArgs

    settings = engine_settings(world, MIXTURES)
    return EngineArgs(**settings).create_engine_config()


def setting(section, name, value):
    def change(config):
        part = getattr(config, section) if section else config
        object.__setattr__(part, name, value)

    return change


def in_model(**properties):
    def change(config):
        model = SimpleNamespace(
            **dict.fromkeys(("is_hybrid", "is_attention_free", "is_encoder_decoder", "is_multimodal_model"), False),
            runner_type="generate",
            enable_sleep_mode=False,
        )
        vars(model).update(properties)
        object.__setattr__(config, "model_config", model)

    return change


REFUSED = [
    (LINKS, "LoRA off", setting("", "lora_config", None)),
    (LINKS, "pooling", in_model(runner_type="pooling")),
    (LINKS, "pipeline_parallel_size", setting("parallel_config", "pipeline_parallel_size", 2)),
    (MIXTURES, "data_parallel_size", setting("parallel_config", "data_parallel_size", 2)),
    (MIXTURES, "context parallelism", setting("parallel_config", "decode_context_parallel_size", 2)),
    (MIXTURES, "KV connector", setting("", "kv_transfer_config", object())),
    (MIXTURES, "KV offloading", setting("cache_config", "kv_offloading_size", 1.0)),
    (MIXTURES, "encoder cache", setting("", "ec_transfer_config", object())),
    (MIXTURES, "speculative", setting("", "speculative_config", object())),
    (MIXTURES, "causal decoder", in_model(is_hybrid=True)),
    (MIXTURES, "causal decoder", in_model(is_multimodal_model=True)),
    (MIXTURES, "microbatches", setting("parallel_config", "enable_dbo", True)),
    (MIXTURES, "asynchronous", setting("scheduler_config", "async_scheduling", True)),
    (MIXTURES, "quantized KV", setting("cache_config", "cache_dtype", "fp8")),
    (MIXTURES, "sleep", in_model(enable_sleep_mode=True)),
    (MIXTURES, "STOCK_TORCH_COMPILE", setting("compilation_config", "mode", 1)),
    (ROUTERS, "context parallelism", setting("parallel_config", "decode_context_parallel_size", 2)),
    (ROUTERS, "speculative", setting("", "speculative_config", object())),
    (ROUTERS, "causal decoder", in_model(is_multimodal_model=True)),
    (ROUTERS, "microbatches", setting("parallel_config", "enable_dbo", True)),
    (ROUTERS, "asynchronous", setting("scheduler_config", "async_scheduling", True)),
    (ROUTERS, "sleep", in_model(enable_sleep_mode=True)),
    (ROUTERS, "STOCK_TORCH_COMPILE", setting("compilation_config", "mode", 1)),
    (RESIDUALS, "compiled or recorded", setting("compilation_config", "mode", 3)),
    (RESIDUALS, "speculative", setting("", "speculative_config", object())),
    (RESIDUALS, "context parallelism", setting("parallel_config", "decode_context_parallel_size", 2)),
    (RESIDUALS, "asynchronous", setting("scheduler_config", "async_scheduling", True)),
    (LINKED, "compiled or recorded", setting("compilation_config", "mode", 3)),
    (LINKED, "KV connector", setting("", "kv_transfer_config", object())),
    (LINKED, "quantized KV", setting("cache_config", "cache_dtype", "fp8")),
    (ATTENTION, "compiled or recorded", setting("compilation_config", "mode", 3)),
    (ATTENTION, "KV offloading", setting("cache_config", "kv_offloading_size", 1.0)),
]
# What concerns the second cache alone.
TAKEN_WITH_ROUTERS = [
    ("a KV connector", setting("", "kv_transfer_config", object())),
    ("KV offloading", setting("cache_config", "kv_offloading_size", 1.0)),
    ("a quantized KV cache", setting("cache_config", "cache_dtype", "fp8")),
    ("data parallelism", setting("parallel_config", "data_parallel_size", 2)),
]


@pytest.mark.parametrize(("options", "name", "change"), REFUSED, ids=[name for _, name, _ in REFUSED])
def test_setting_is_refused_by_name(config, options, name, change):
    from vllm.config import CompilationMode

    from loraplex.vllm_plugin.options import PluginOptions
    from loraplex.vllm_plugin.refusals import check_config

    changed = copy.copy(config)
    for section in ("parallel_config", "cache_config", "scheduler_config", "compilation_config"):
        object.__setattr__(changed, section, copy.copy(getattr(config, section)))
    check_config(changed, PluginOptions(**options))
    change(changed)
    if name == "STOCK_TORCH_COMPILE":
        object.__setattr__(changed.compilation_config, "mode", CompilationMode.STOCK_TORCH_COMPILE)
    with pytest.raises(UnsupportedEngineError, match=name):
        check_config(changed, PluginOptions(**options))


def test_residuals_refuse_the_second_model_runner(config, monkeypatch):
    from loraplex.vllm_plugin.options import PluginOptions
    from loraplex.vllm_plugin.refusals import check_config

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    check_config(config, PluginOptions(routers=True))
    with pytest.raises(UnsupportedEngineError, match="second model runner"):
        check_config(config, PluginOptions(residuals=True))


def test_attention_refuses_other_platforms(config, monkeypatch):
    from vllm.platforms import current_platform

    from loraplex.vllm_plugin.options import PluginOptions
    from loraplex.vllm_plugin.refusals import check_config

    check_config(config, PluginOptions(attention=True))
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    check_config(config, PluginOptions(linked=1))
    with pytest.raises(UnsupportedEngineError, match="another platform"):
        check_config(config, PluginOptions(attention=True))


@pytest.mark.parametrize(("name", "change"), TAKEN_WITH_ROUTERS, ids=[name for name, _ in TAKEN_WITH_ROUTERS])
def test_setting_that_concerns_the_second_cache_goes_with_routers(config, name, change):
    from loraplex.vllm_plugin.options import PluginOptions
    from loraplex.vllm_plugin.refusals import check_config

    changed = copy.copy(config)
    for section in ("parallel_config", "cache_config"):
        object.__setattr__(changed, section, copy.copy(getattr(config, section)))
    change(changed)
    check_config(changed, PluginOptions(routers=True))
    with pytest.raises(UnsupportedEngineError):
        check_config(changed, PluginOptions(mixtures=True))


@pytest.mark.parametrize("variable", ["VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_LORA_ENABLE_DUAL_STREAM"])
def test_variable_is_refused_by_name(config, variable, monkeypatch):
    from loraplex.vllm_plugin.options import PluginOptions
    from loraplex.vllm_plugin.refusals import check_config

    monkeypatch.setenv(variable, "1")
    with pytest.raises(UnsupportedEngineError, match=variable):
        check_config(config, PluginOptions(mixtures=True))


@pytest.mark.vllm_smoke
def test_refusal_comes_when_the_configuration_is_made(world, register):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(UnsupportedEngineError, match="LoRA off"):
        EngineArgs(**engine_settings(world, {}, enable_lora=False)).create_engine_config()


def test_unknown_option_is_refused_when_the_configuration_is_made(world, register):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(LoraplexError, match="mixture"):
        EngineArgs(**engine_settings(world, {"mixture": True})).create_engine_config()


def test_other_version_of_vllm_is_refused():
    from loraplex.vllm_plugin import compat as seams

    with (
        mock.patch.object(seams, "version", return_value="0.33.1"),
        pytest.raises(CompatibilityError, match=r"0\.33\.1"),
    ):
        seams.check_compat()


@pytest.mark.vllm_smoke
def test_every_seam_is_in_its_place():
    from loraplex.vllm_plugin.compat import check_compat

    check_compat()


def test_seam_that_moved_is_named(monkeypatch):
    from vllm.lora import model_manager

    from loraplex.vllm_plugin.compat import check_compat

    monkeypatch.delattr(model_manager.LRUCacheLoRAModelManager, "activate_adapter")
    monkeypatch.delattr(model_manager.LoRAModelManager, "activate_adapter")
    with pytest.raises(CompatibilityError, match=r"LRUCacheLoRAModelManager\.activate_adapter is not there"):
        check_compat()


def test_parameter_that_went_is_named(monkeypatch):
    import vllm.forward_context

    from loraplex.vllm_plugin.compat import check_compat

    monkeypatch.setattr(vllm.forward_context, "override_forward_context", lambda context: None)
    with pytest.raises(CompatibilityError, match=r"override_forward_context no longer takes forward_context"):
        check_compat()


def test_attention_of_other_kinds_is_refused():
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backend import AttentionType

    from loraplex.vllm_plugin.second_cache import attention_layers

    class Mamba(AttentionLayerBase):
        def get_attn_backend(self):
            raise NotImplementedError

        def get_kv_cache_spec(self, vllm_config):
            raise NotImplementedError

    class Chunked(Attention):
        pass

    def made(kind, **attributes):
        layer = object.__new__(kind)
        layer.__dict__.update(attributes)
        return layer

    causal = {"attn_type": AttentionType.DECODER, "kv_sharing_target_layer_name": None}
    attention_layers({"layers.0": made(Attention, **causal)}, "mixtures")
    for layer, words in (
        (Mamba(), "Mamba"),
        (made(Chunked, **causal), "Chunked"),
        (made(Attention, **{**causal, "attn_type": AttentionType.ENCODER_ONLY}), "causal"),
        (made(Attention, **{**causal, "kv_sharing_target_layer_name": "layers.7"}), "layers.7"),
    ):
        with pytest.raises(UnsupportedEngineError, match=words):
            attention_layers({"layers.0": layer}, "mixtures")


@pytest.mark.parametrize(("has", "words"), [("supports_mm", "reads more than text"), ("_is_moe", "mixture-of-experts")])
def test_models_whose_layers_cant_be_gated_are_refused(has, words):
    from loraplex.vllm_plugin.model_manager import LinkModelManager
    from loraplex.vllm_plugin.options import PluginOptions

    manager = SimpleNamespace(**{"supports_mm": False, "_is_moe": False, "model": None, has: True})
    with pytest.raises(UnsupportedEngineError, match=words):
        LinkModelManager._gate_layers(manager, PluginOptions(mixtures=True))


@pytest.mark.vllm_smoke
def test_experts_of_moe_layers_are_refused_in_links():
    from loraplex.errors import UnsupportedAdapterError
    from loraplex.vllm_plugin.base_modules import LayerIndices

    experts = "model.layers.0.mlp.experts"
    places = LayerIndices({experts: object(), f"{experts}.0.gate_proj": object()}, {}, None)
    for path in (experts, f"{experts}.0.gate_proj"):
        with pytest.raises(UnsupportedAdapterError, match="experts of a mixture of experts"):
            places.name(path)


# Folders that can't be served


def loader(world, **options):
    from loraplex.vllm_plugin.base_modules import BaseModules, LayerIndices
    from loraplex.vllm_plugin.catalog import FolderCatalog
    from loraplex.vllm_plugin.link_loader import EngineLimits, LinkLoader
    from loraplex.vllm_plugin.options import PluginOptions

    plugin = PluginOptions(folder=str(world.named), **options)
    base = BaseModules(world.base.config, trust_remote_code=False)
    places = LayerIndices(dict.fromkeys(base.shapes), {}, None)
    places._modules = {path: i for i, path in enumerate(base.shapes) if "layers" in path}
    places.num_modules = len(base.shapes)
    limits = EngineLimits(max_rank=16, dtype=torch.float32, device=torch.device("cpu"), hidden_size=HIDDEN)
    catalog = FolderCatalog(plugin)
    return lambda text: LinkLoader(catalog, plugin, base, places, limits).load(1, catalog.find(text))


def test_mixture_without_a_second_cache_is_refused(world):
    with pytest.raises(MixtureError, match="second KV cache"):
        loader(world)("mix0")


def test_rank_and_experts_beyond_the_engines_are_refused(world):
    load = loader(world, mixtures=True, max_experts=4)
    assert load("mix0").rank == 15
    with pytest.raises(CapacityError, match="max_lora_rank"):
        load("mix0+materials")
    with pytest.raises(CapacityError, match="max_experts"):
        load("mix0+mix1")


def test_mixtures_with_routers_need_their_option_and_gates(world):
    from loraplex import ArrowConfig, LinearRouterConfig, MultiLoraModel, StaticRouterConfig

    model = MultiLoraModel.from_pretrained(world.model, dtype="float32")
    for name in ("protein", "materials"):
        model.load_adapter(name, world.adapters[name])
    configs = {
        "routed": ArrowConfig(),
        "trained": LinearRouterConfig(),
        "fixed": StaticRouterConfig(gates=(0.5, 0.5)),
    }
    for name, router in configs.items():
        model.create_mixture(name, ["protein", "materials"], router)
        model.save_mixture(name, world.named / name, overwrite=True)
    with pytest.raises(MixtureError, match='"routers": true'):
        loader(world)("routed")
    fixed = loader(world)("fixed")  # its gates are in the factors
    assert (fixed.rank, fixed.routing) == (12, None)
    load = loader(world, routers=True, max_experts=2)
    assert load("routed").rank == 12
    assert load("trained").rank == 14  # a column of A for each expert's logit
    with pytest.raises(CapacityError, match="max_experts"):
        load("routed+trained")
    with pytest.raises(CapacityError, match="max_lora_rank"):
        load("trained+protein")
    with pytest.raises(MixtureError, match="second KV cache"):
        load("routed+mix0")


def test_mixtures_of_one_link_need_the_base_models_scaling_pass(world):
    with pytest.raises(MixtureError, match="scaling_pass_value"):
        loader(world, mixtures=True)("mix0+mix6")


@pytest.mark.parametrize(
    ("name", "options", "targets"),
    [
        ("DoRA", {"use_dora": True}, ["q_proj"]),
        ("aLoRA", {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, ["q_proj"]),
    ],
)
def test_adapters_that_vllm_cant_run_are_refused_in_links(world, name, options, targets):
    from tests.tiny_models import random_peft_adapter

    if not (world.named / name).exists():
        random_peft_adapter(world.base, world.named / name, targets=targets, options=options)
    with pytest.raises(LoraplexError, match=name):
        loader(world)(f"{name}:0.5")


def test_embeddings_in_a_mixture_are_refused(world):
    from loraplex.xlora.config import XLoraConfig
    from tests.tiny_models import random_peft_adapter

    folder = world.named / "wide"
    if not folder.exists():
        world.adapters["wide"] = random_peft_adapter(world.base, folder, targets=["q_proj", "embed_tokens"], r=2)
        world.add_mixture("mixwide", XLoraConfig(), ["protein", "wide"])
    with pytest.raises(LoraplexError, match="embed_tokens"):
        loader(world, mixtures=True)("mixwide")


def test_residuals_need_their_option(world):
    folder = world.named / "residual"
    folder.mkdir(exist_ok=True)
    (folder / "residual_config.json").write_text(json.dumps({}))
    with pytest.raises(LoraplexError, match='"residuals": true'):
        loader(world)("residual:0.5")


def test_adapter_for_another_base_is_refused(world, tmp_path):
    from tests.tiny_models import random_peft_adapter, tiny_model

    random_peft_adapter(tiny_model("llama"), world.named / "foreign", targets=["q_proj"])
    with pytest.raises(LoraplexError, match="base"):
        loader(world)("foreign:0.5")
