"""Decoder layers of many architectures run in one call, and what they decode is what transformers and PEFT decode."""

import pytest
import torch

from loraplex.engine.worker import native_ops
from loraplex.engine.worker.fusion import layer_stack
from tests.architectures.checks import Case, check_engine, check_engine_in_bfloat16
from tests.architectures.decode_path import ONE_CALL, decode_path, paths_on_page
from tests.architectures.variants import ARCHS

pytestmark = pytest.mark.needs("compiler")
# By what they have beside Llama's parts.
STACKED = (
    *("llama", "mistral", "qwen2"),
    *("qwen3", "olmo2", "olmo3"),  # norms of queries and keys; norms behind the modules
    *("gemma", "gemma2", "gemma3_text"),  # 1 + weight, four norms, soft caps, two kinds of rotary positions
    *("phi", "gpt_neox", "stablelm", "cohere", "cohere2"),  # LayerNorm, parallel, partial rotary, pairs
    *("phi3", "gpt2", "opt", "nemotron"),  # joined projections, weights [in, out], learned positions, other activations
    *("olmo", "granite-real", "starcoder2", "glm", "smollm3", "ernie4_5", "exaone4"),
    *("qwen3_moe", "mixtral", "granitemoeshared"),  # experts: softmax, normalised or not, beside shared modules
    *("glm4_moe", "gpt_oss", "qwen2_moe"),  # sigmoid and corrections; pairs clamped, weights [in, out]; a shared gate
)
SLOW = ("olmoe", "flex_olmo", "granitemoe", "dots1", "ernie4_5_moe", "minimax_m2", "solar_open", "hy_v3")
NAMES = [*STACKED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_decodes_what_the_model_decodes(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []  # tokens and layers of each call
    run = native_ops.decode_layers

    def counted(x: torch.Tensor, layers: torch.Tensor, *args: object) -> torch.Tensor:
        made.append((len(x), len(layers)))
        return run(x, layers, *args)

    monkeypatch.setattr(layer_stack.native_ops, "decode_layers", counted)
    case = Case(name)
    check = check_engine if dtype == torch.float32 else check_engine_in_bfloat16
    check(case)
    num_layers = case.oracle.base.config.num_hidden_layers
    assert (len(case.rows), num_layers) in made or any(
        tokens > 1 and layers == num_layers for tokens, layers in made
    ), "rows with and without adapters go through all layers in one call"


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_are_stacked(name: str) -> None:
    assert decode_path(name) == ONE_CALL


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ARCHS])
def test_the_page_tells_each_variants_path(name: str) -> None:
    assert paths_on_page()[name] == decode_path(name)
