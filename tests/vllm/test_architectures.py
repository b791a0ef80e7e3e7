"""Other architectures inside vLLM: base, adapter, linked and mixture rows in one batch against PEFT; residuals."""

import pytest

from tests.tiny_models import linear_targets
from tests.vllm.residual_worlds import add_residuals
from tests.vllm.test_steered_attention import args_of_rows, check
from tests.vllm.worlds import LINK, add_mixtures, difference, engine, make_base, make_world, prompts

HEADS = (1, 4, 6, 7)  # of the grid: layerwise and deep; top-k; scaling_pass_value 0.5, and 1 / experts
CHOICES = [None, "protein", "materials", LINK, *(f"mix{i}" for i in HEADS), None]
# vLLM's have no output layer of their own; with small embeddings a model doesn't just repeat its last token.
GEMMA = {"query_pre_attn_scalar": 32, "tie_word_embeddings": True, "initializer_range": 0.05}
ARCHITECTURES = {  # of tests/tiny_models.py, those that vLLM serves with LoRA; what their heads of 32 need
    "mistral": {},
    "qwen2": {"use_sliding_window": False, "layer_types": None, "sliding_window": None},
    "qwen3": {},
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": {},
    "opt": {"word_embed_proj_dim": 128},
}


def targets(name):
    """PEFT can't run a mixture in OPT's feed-forward layers, which transformers gives tokens without rows."""
    return linear_targets(name)[:4] if name == "opt" else linear_targets(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_row_equals_pefts(name, tmp_path):
    base = make_base(name, **ARCHITECTURES[name])
    world = add_mixtures(make_world(tmp_path, base, targets(name)), HEADS)
    rows = list(zip(CHOICES, prompts(len(CHOICES), length=100), strict=True))
    with engine(world, {"mixtures": True}, max_loras=8, max_num_batched_tokens=96) as llm:
        cold = difference(llm, world, rows, 6)
        warm = difference(llm, world, rows, 6)
    assert cold.is_none, cold
    assert warm.is_none, warm


RESIDUALS = ["block", "linked:0.5+linked_late", "reft+protein", "linked+heard+protein", "first"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_residuals_and_steered_attention_equal_loraplexs_own(name, tmp_path):
    """Prompts are longer than a chunk and, where there are sliding windows, than a window."""
    world = make_world(tmp_path, make_base(name, **ARCHITECTURES[name]), targets(name))
    model = add_residuals(world, has_mlp=name != "opt")
    own = [*RESIDUALS, *(["ia3:0.5+protein"] if name != "opt" else [])]
    choices = [*own, None, "protein", "block", None]
    rows = list(zip(choices, prompts(len(choices), length=100), strict=True))
    extras = [*[None] * len(own), *(args_of_rows()[i] for i in (0, 3, 5, 7))]
    with engine(world, {"linked": 2, "attention": True}, max_loras=8, max_num_batched_tokens=96) as llm:
        check(model, llm, rows, extras)
        check(model, llm, rows, extras)
