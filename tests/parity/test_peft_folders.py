"""Adapter folders against PEFT: what it writes is read, what is written it reads, with the same logits."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.config import VeloraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.fit import check_fits
from loraplex.adapters.peft.config import read_peft_config
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.adapters.targets import expected_targets
from loraplex.adapters.weights import Adapter, ModuleShape
from loraplex.errors import UnsupportedAdapterError
from tests.adapters.folders import module_shapes, output_module
from tests.examples import examples
from tests.tiny_models import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied embeddings and saved copies of them

INVOCATION = [5, 6, 7]
GPT2_TARGETS = ["c_attn", "c_fc", "wte"]

ADAPTERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "rank 1": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 1}),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied embeddings": ("qwen2", {"target_modules": ["down_proj", "embed_tokens"]}),
    "gpt2": ("gpt2", {"target_modules": GPT2_TARGETS, "fan_in_fan_out": True}),
    "gpt2 with its output head": ("gpt2", {"target_modules": [*GPT2_TARGETS, "lm_head"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.0\..*q_proj": 2, "v_proj": 6, r"model\.layers\.1\.mlp\.down_proj": 8},
            "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 3, "down_proj": 5.5},
        },
    ),
    "rslora with patterns": (
        "llama",
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"up_proj": 6}},
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora on embeddings": (
        "llama",
        {"target_modules": ["o_proj", "embed_tokens", "lm_head"], "use_dora": True},
    ),
    "dora on gpt2": ("gpt2", {"target_modules": [*GPT2_TARGETS, "lm_head"], "use_dora": True}),
    "alora": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "alora_invocation_tokens": INVOCATION,
            "task_type": "CAUSAL_LM",
        },
    ),
    "some layers": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "regular expression": (
        "gpt_neox",
        {"target_modules": r".*(query_key_value|dense_h_to_4h)", "exclude_modules": r".*layers\.0\..*"},
    ),
    "excluded": ("opt", {"target_modules": "all-linear", "exclude_modules": ["fc1", "out_proj"]}),
    "velora": ("llama", {"target_modules": ["q_proj"], "velora_config": VeloraConfig(num_groups=4)}),
    "monteclora": ("llama", {"target_modules": ["q_proj"], "monteclora_config": peft.MontecloraConfig()}),
    "mica": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}


def save_with_peft(
    name: str, options: Mapping[str, Any], folder: Path, dtype: torch.dtype = torch.float32
) -> peft.PeftModel:
    """Adapt a tiny model with random factors and magnitudes, save the adapter, return the adapted model."""
    base = tiny_model(name, dtype=dtype)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}), autocast_adapter_dtype=False
    )
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_magnitude" in parameter_name:
            parameter.data.mul_(torch.rand(parameter.shape) + 0.5)
        elif ".lora_" in parameter_name and "sampler" not in parameter_name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
    adapted.save_pretrained(str(folder))
    return adapted.eval()


def load_with_peft(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    base = tiny_model(name, dtype=dtype)
    return peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False).eval()


def logits(model: PreTrainedModel | peft.PeftModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(8, VOCAB_SIZE, (2, 12), generator=generator)
    input_ids[0, 4 : 4 + len(INVOCATION)] = torch.tensor(INVOCATION)
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def assert_holds_parameters_of(adapter: Adapter, adapted: peft.PeftModel) -> None:
    """Every LoRA layer of the PEFT model is in the adapter, with equal tensors and scaling, and no other."""
    layers = {
        path: module
        for path, module in adapted.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapter.layers.keys() == layers.keys()
    for path, layer in layers.items():
        weights = adapter.layers[path]
        if weights.kind == "embedding":
            lora_a, lora_b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert weights.lora_a.equal(lora_a)
        assert weights.lora_b.equal(lora_b.t())
        assert weights.lora_a.dtype == lora_a.dtype
        assert weights.scaling == layer.scaling["default"]
        if weights.magnitude is not None:
            assert weights.magnitude.equal(layer.lora_magnitude_vector["default"].weight)


@pytest.mark.parametrize("case", ADAPTERS)
def test_folder_of_peft_survives_reading_and_writing(case: str, tmp_path: Path) -> None:
    name, options = ADAPTERS[case]
    adapted = save_with_peft(name, options, tmp_path / "peft")
    base = tiny_model(name)
    adapter = read_adapter(tmp_path / "peft")
    assert_holds_parameters_of(adapter, adapted)
    check_fits(adapter, module_shapes(base), output_module=output_module(base))

    write_adapter(adapter, tmp_path / "ours")
    loaded = load_with_peft(name, tmp_path / "ours")
    assert_holds_parameters_of(adapter, loaded)
    expected = logits(adapted)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    assert not torch.allclose(expected, logits(base), atol=1e-2)  # or the comparison would be empty


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["embeddings", "dora", "gpt2"])
def test_narrow_dtypes_survive_reading_and_writing(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, options = ADAPTERS[case]
    adapted = save_with_peft(name, options, tmp_path / "peft", dtype)
    adapter = read_adapter(tmp_path / "peft")
    assert {weights.lora_b.dtype for weights in adapter.layers.values()} == {dtype}
    assert_holds_parameters_of(adapter, adapted)
    write_adapter(adapter, tmp_path / "ours")
    loaded = load_with_peft(name, tmp_path / "ours", dtype)
    torch.testing.assert_close(logits(loaded), logits(adapted), rtol=0, atol=0)


def test_copies_of_base_weights_are_those_that_peft_would_load(tmp_path: Path) -> None:
    save_with_peft("llama", {"target_modules": ["embed_tokens", "lm_head"]}, tmp_path)
    copies = read_adapter(tmp_path, check_contents=lambda *_: None).replaced
    assert copies.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    other = tiny_model("llama", seed=1)
    loaded = peft.PeftModel.from_pretrained(other, str(tmp_path)).base_model.model
    for path, copy_ in copies.items():
        assert loaded.get_submodule(path.removesuffix(".weight")).base_layer.weight.equal(copy_)


@pytest.mark.parametrize(("init", "changes"), [("pissa", True), ("olora", True), ("mica", False), ("gaussian", False)])
def test_refused_inits_are_those_that_change_the_base_weights_at_load(init: str, changes: bool, tmp_path: Path) -> None:
    save_with_peft("llama", {"target_modules": ["q_proj"], "init_lora_weights": init}, tmp_path)
    loaded = load_with_peft("llama", tmp_path).base_model.model.model.layers[0].self_attn.q_proj.base_layer
    unchanged = loaded.weight.equal(tiny_model("llama").model.layers[0].self_attn.q_proj.weight)
    assert unchanged != changes
    if changes:
        with pytest.raises(UnsupportedAdapterError, match=init):
            read_adapter(tmp_path)
    else:
        read_adapter(tmp_path)


TARGET_GRID: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj", "q_proj"]},  # no suffix of a component
    {"target_modules": ["self_attn.q_proj", "lm_head"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r"model\.layers\.1\.self_attn\.o_proj", "exclude_modules": []},
    {"target_modules": ".*embed_tokens|.*down_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-linear", "exclude_modules": ["down_proj"]},
    {"target_modules": "all-linear", "exclude_modules": ".*self_attn.*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": []},
]


def check_targets(name: str, options: Mapping[str, Any], folder: Path) -> None:
    """The settings as given and as PEFT saves them target what PEFT adapts, in its order."""
    base = tiny_model(name)
    shapes, head = module_shapes(base), output_module(base)
    config = peft.LoraConfig(**copy.deepcopy(dict(options)))
    config.save_pretrained(str(folder))
    as_given = read_peft_config(folder)
    adapted = peft.get_peft_model(base, config)
    targeted = adapted.base_model.targeted_module_names
    adapted.peft_config["default"].save_pretrained(str(folder))
    assert targeted
    assert expected_targets(as_given, shapes, output_module=head) == targeted
    assert expected_targets(read_peft_config(folder), shapes, output_module=head) == targeted


@pytest.mark.parametrize("options", TARGET_GRID, ids=str)
def test_targets_are_those_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    check_targets("llama", options, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "opt", "qwen2"])
def test_all_linear_is_that_of_peft_for_each_architecture(name: str, tmp_path: Path) -> None:
    check_targets(name, {"target_modules": "all-linear"}, tmp_path)


def test_many_full_paths_target_what_they_target_in_peft(tmp_path: Path) -> None:
    """From 20 names on, PEFT condenses target_modules to suffixes."""
    model = tiny_model("gpt2")
    model_paths = [path for path, shape in module_shapes(model).items() if shape.kind == "linear"]
    other = [f"other.{index}.linear" for index in range(20)]
    check_targets("gpt2", {"target_modules": model_paths[:3] + other}, tmp_path)


COMPONENT = st.sampled_from(["layers", "0", "1", "10", "self_attn", "mlp", "q_proj", "k_proj", "experts", "h", "a+b"])
PATH = st.lists(COMPONENT, min_size=1, max_size=6).map(".".join)
PATTERN = st.one_of(
    PATH,
    PATH.map(lambda path: path.replace(".", r"\.")),
    st.lists(
        st.one_of(COMPONENT, st.sampled_from([".*", r"\d+", "[qk]_proj", "^layers", "(q|k)_proj"])),
        max_size=4,
    ).map(r"\.".join),
)


@examples(300)
@given(
    path=PATH,
    ranks=st.dictionaries(PATTERN, st.integers(1, 9), max_size=4),
    alphas=st.dictionaries(PATTERN, st.floats(0.5, 9), max_size=4),
    rslora=st.booleans(),
)
def test_rank_and_alpha_of_a_module_are_those_of_peft(
    path: str, ranks: dict[str, int], alphas: dict[str, float], rslora: bool
) -> None:
    config = LoraConfig(r=32, lora_alpha=64, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    rank = ranks.get(get_pattern_key(ranks.keys(), path), 32)
    alpha = alphas.get(get_pattern_key(alphas.keys(), path), 64)
    assert config.rank_of(path) == rank
    assert config.alpha_of(path) == alpha
    assert config.scaling_of(path) == (alpha / rank**0.5 if rslora else alpha / rank)


@examples(300)
@given(
    path=PATH,
    targets=st.lists(PATH, max_size=3),
    excluded=st.lists(PATH, max_size=2),
    layers=st.one_of(st.none(), st.lists(st.sampled_from([0, 1, 10]), max_size=2)),
    pattern=st.sampled_from([None, [], ["layers"], ["h", "layers"], ["experts"], [r"self_attn|mlp"]]),
)
def test_targeting_of_a_module_is_that_of_peft(
    path: str, targets: list[str], excluded: list[str], layers: list[int] | None, pattern: list[str] | None
) -> None:
    pattern = None if layers is None else pattern
    theirs = peft.LoraConfig(
        target_modules=list(targets),
        exclude_modules=excluded,
        layers_to_transform=layers,
        layers_pattern=pattern,
    )
    ours = LoraConfig(
        target_modules=tuple(targets),
        exclude_modules=tuple(excluded),
        layers_to_transform=None if layers is None else tuple(layers),
        layers_pattern=None if pattern is None else tuple(pattern),
    )
    shape = ModuleShape(kind="linear", in_features=1, out_features=1)
    assert bool(expected_targets(ours, {path: shape})) == bool(check_target_module_exists(theirs, path))
