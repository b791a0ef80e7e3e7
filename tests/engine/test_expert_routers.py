"""How a router chooses is told by trying it, whatever its architecture is; one that chooses otherwise isn't known."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraplex.engine.worker.fusion.expert_parts import near_ties, read_router, weights_of
from loraplex.engine.worker.fusion.layer_parts import RouterPart, Scores, tensor_at
from loraplex.engine.worker.fusion.part_run import PartRun
from tests.architectures.variants import make_config, make_model

SOFTMAX, SIGMOID = Scores.SOFTMAX, Scores.SIGMOID
# By architecture: scores, whether they are normalised, and whether something is added to what the choice goes by.
KNOWN: dict[str, tuple[Scores, bool, bool]] = {
    "qwen3_moe": (SOFTMAX, False, False),
    "mixtral": (SOFTMAX, True, False),
    "granitemoe": (SOFTMAX, True, False),  # a softmax of the chosen ones
    "gpt_oss": (SOFTMAX, True, False),
    "minimax_m2": (SIGMOID, True, True),  # given by the module around it
    "glm4_moe": (SIGMOID, True, True),
    "ernie4_5_moe": (SOFTMAX, True, True),
    "lfm2_moe": (SIGMOID, True, True),
}


def routers(base: nn.Module) -> list[nn.Module]:
    return [module for module in base.modules() if type(module).__name__.lower().endswith("router")]


def run_of(base: Any, router: nn.Module, ids: Tensor) -> PartRun:
    """How a router ran in a pass."""
    runs: list[PartRun] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        runs.append(PartRun(path, module, args[0].clone(), returned[0].clone(), args, kwargs, returned))

    path = next(name for name, module in base.named_modules() if module is router)
    handle = router.register_forward_hook(note, with_kwargs=True)
    base(ids)
    handle.remove()
    return runs[0]


def read(name: str, dtype: torch.dtype, **settings: Any) -> tuple[RouterPart | None, PartRun, Any]:
    config = make_config(name)
    for key, value in settings.items():
        assert hasattr(config, key), key
        setattr(config, key, value)
    base = make_model(name, config=config).to(dtype)
    for path, buffer in base.named_buffers():
        if "bias" in path:
            buffer.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    run = run_of(base, routers(base)[-1], torch.arange(3, 50)[None])
    return read_router(base, run, dtype), run, base


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KNOWN)
def test_the_rule_of_every_architecture_is_found(name: str, dtype: torch.dtype) -> None:
    part, run, base = read(name, dtype)
    assert part is not None
    scores, normalises, has_correction = KNOWN[name]
    assert (part.scores, part.normalises, part.correction is not None) == (scores, normalises, has_correction)
    assert (part.num_experts, part.top_k, part.num_groups) == (4, 2, 1)
    numbers = next(value for value in run.returned if not value.is_floating_point())
    weights = next(value for value in run.returned[1:] if value.is_floating_point())
    correction = None if part.correction is None else tensor_at(base, part.correction).float().flatten()
    ours = weights_of(run.output.float(), part, correction)
    clear = ~near_ties(run.output, part, correction, dtype)
    theirs = torch.zeros_like(ours).scatter(1, numbers, weights.float())
    assert clear.sum() > len(clear) / 2
    torch.testing.assert_close(ours[clear], theirs[clear], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@torch.no_grad()
def test_groups_and_factors_are_found() -> None:
    settings = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    part, *_ = read("glm4_moe", torch.float32, routed_scaling_factor=2.5, norm_topk_prob=False, **settings)
    assert part is not None
    assert (part.num_experts, part.top_k, part.num_groups, part.top_groups) == (12, 3, 4, 2)
    assert (part.factor, part.normalises, part.scores) == (2.5, False, SIGMOID)
    assert part.correction is not None
    assert part.correction.endswith("e_score_correction_bias")


@torch.no_grad()
def test_another_rule_is_not_known() -> None:
    assert read("phimoe", torch.float32)[0] is None  # which masks experts far below the best one


@torch.no_grad()
def test_tokens_between_two_experts_are_told() -> None:
    part = RouterPart(path="", num_experts=4, top_k=2, scores=SOFTMAX, normalises=True, rounds=False)
    logits = torch.tensor([[3.0, 2.0, 2.0 + 1e-6, 0.0], [3.0, 2.0, 1.0, 0.0], [2.0, 2.0, 0.0, 0.0]])
    assert near_ties(logits, part, None, torch.float32).tolist() == [True, False, False]
    far = torch.tensor([[300.0, 2.0, 2.0, 0.0], [300.0, 300.0, 300.0, 0.0]])  # softmax leaves the second expert nothing
    assert near_ties(far, part, None, torch.float32).tolist() == [False, True]
    rounded = torch.tensor([[3.0, 2.0, 1.98, 0.0], [3.0, 2.0, 1.0, 0.0]])
    assert near_ties(rounded, part, None, torch.bfloat16).tolist() == [True, False]
