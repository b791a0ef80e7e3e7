import dataclasses
from collections.abc import Mapping

import pytest
import torch

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.fit import check_fits
from loraplex.adapters.targets import expected_targets
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleShape
from loraplex.errors import AdapterFormatError, BaseModelMismatchError, ConfigError

LINEAR = ModuleShape(kind="linear", in_features=16, out_features=24)
EMBEDDING = ModuleShape(kind="embedding", in_features=50, out_features=16)
BASE: Mapping[str, ModuleShape] = {
    "embed_tokens": EMBEDDING,
    **{f"layers.{layer}.{name}": LINEAR for layer in range(8) for name in ("q_proj", "v_proj")},
    "lm_head": LINEAR,
}


def adapter_for(modules: Mapping[str, ModuleShape], **settings: object) -> Adapter:
    config = LoraConfig(r=2, lora_alpha=2, base_model_name_or_path="tiny/llama", **settings)  # type: ignore[arg-type]
    layers = {
        path: LoraWeights(
            kind=module.kind,
            lora_a=torch.randn(2, module.in_features),
            lora_b=torch.randn(2, module.out_features),
            scaling=1.0,
        )
        for path, module in modules.items()
    }
    return Adapter(config=config, layers=layers)


def only(modules: Mapping[str, ModuleShape], *suffixes: str) -> dict[str, ModuleShape]:
    return {path: module for path, module in modules.items() if path.endswith(suffixes)}


def test_adapter_of_this_base_fits() -> None:
    check_fits(adapter_for(only(BASE, "q_proj"), target_modules=("q_proj",)), BASE)
    check_fits(adapter_for(only(BASE, "embed_tokens"), target_modules=("embed_tokens",)), BASE)
    all_linear = adapter_for(only(BASE, "q_proj", "v_proj"), target_modules="all-linear")
    check_fits(all_linear, BASE, output_module="lm_head")
    with pytest.raises(AdapterFormatError, match="'lm_head'"):
        check_fits(all_linear, BASE)


def test_module_that_the_base_does_not_have_is_named() -> None:
    adapter = adapter_for({"h.0.c_attn": LINEAR}, target_modules=("c_attn",))
    with pytest.raises(BaseModelMismatchError) as caught:
        check_fits(adapter, BASE)
    assert all(word in str(caught.value) for word in ("'h.0.c_attn'", "'tiny/llama'", "'embed_tokens'"))


def test_other_shape_is_named_with_both_shapes_and_five_of_many_modules() -> None:
    wider = dataclasses.replace(LINEAR, in_features=32)
    modules = dict.fromkeys(only(BASE, "q_proj"), wider)
    with pytest.raises(BaseModelMismatchError) as caught:
        check_fits(adapter_for(modules, target_modules=("q_proj",)), BASE)
    message = str(caught.value)
    assert message.startswith("8 of the adapter's 8 modules")
    assert "'layers.0.q_proj': the adapter's is 32 -> 24, the base's 16 -> 24" in message
    assert message.count("the adapter's is") == 5
    assert "'tiny/llama'" in message


def test_other_kind_is_named() -> None:
    adapter = adapter_for({"embed_tokens": dataclasses.replace(EMBEDDING, kind="linear")}, target_modules=("x",))
    with pytest.raises(BaseModelMismatchError, match="is for a linear module, the base's is an embedding"):
        check_fits(adapter, BASE)


def test_targeted_modules_without_weights_are_named() -> None:
    half = {path: BASE[path] for path in list(only(BASE, "q_proj"))[:1]}
    with pytest.raises(AdapterFormatError) as caught:
        check_fits(adapter_for(half, target_modules=("q_proj",)), BASE)
    assert "'layers.1.q_proj'" in str(caught.value)
    assert "(7 in all)" in str(caught.value)


def test_weights_for_untargeted_modules_are_named() -> None:
    adapter = adapter_for(only(BASE, "q_proj", "0.v_proj"), target_modules=("q_proj",))
    with pytest.raises(AdapterFormatError, match=r"doesn't target: 'layers\.0\.v_proj'.*target_modules is 'q_proj'"):
        check_fits(adapter, BASE)


def test_targets_need_a_setting() -> None:
    with pytest.raises(ConfigError, match="target_modules is None"):
        expected_targets(LoraConfig(), BASE)


def test_full_path_is_targeted_in_any_layer_and_suffixes_only_after_a_dot() -> None:
    config = LoraConfig(target_modules=("layers.3.q_proj", "v_proj", "proj"), layers_to_transform=(1,))
    assert expected_targets(config, BASE) == ["layers.3.q_proj"]  # no number follows a dotted prefix here
    nested = {f"model.{path}": module for path, module in BASE.items()}
    assert expected_targets(config, nested) == ["model.layers.1.v_proj"]
