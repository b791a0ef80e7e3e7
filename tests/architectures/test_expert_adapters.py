"""Every row with adapters of stacked experts and routers is what PEFT gives it alone."""

from pathlib import Path

import peft
import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import LoraplexError
from tests.architectures.checks import (
    CHOICES,
    NUM_NEW,
    assert_close,
    assert_far,
    assert_same_answer,
    check_forward,
    check_generate,
)
from tests.architectures.expert_adapters import EXPERTS, ExpertCase, target_parameters, write_expert_adapter
from tests.architectures.variants import W, make_model

COMMON = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "qwen2_moe", "granitemoe")
OTHERS = ("nemotron_h", "phimoe", "flex_olmo", "glm4_moe_lite", "ernie4_5_moe", "qwen3_next")
NAMES = [*COMMON, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
# The choice of experts may turn at a last bit, so whole rows run in each of the ways that transformers has.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> ExpertCase:
    return ExpertCase(request.param)


def test_parameters_of_every_kind_are_adapted() -> None:
    assert target_parameters(make_model("qwen3_moe")) == (
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.gate.weight",
    )
    assert "mlp.router.weight" in target_parameters(make_model("gpt_oss"))


def test_forward_of_every_row_equals_peft_alone(case: ExpertCase) -> None:
    check_forward(case)


def test_generate_of_every_row_equals_peft_alone(case: ExpertCase) -> None:
    check_generate(case)


@torch.no_grad()
def test_engine_answers_every_request_as_peft_alone(case: ExpertCase) -> None:
    choices = (*CHOICES, None)
    prompts = [*case.rows, case.rows[1].flip(0)]
    sampling = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, logprobs=1)
    requests = [
        Request(prompt.tolist(), adapters=choice, sampling=sampling)
        for prompt, choice in zip(prompts, choices, strict=True)
    ]
    with Engine(case.model(), EngineConfig(cache_bytes=2**22, max_step_tokens=W, max_length=3 * W + 9)) as engine:
        results = engine.generate(requests)
        again = engine.generate(requests[:2])  # whose prompts the prefix cache knows
    for prompt, choice, result in zip(prompts + prompts[:2], choices + choices[:2], results + again, strict=True):
        assert result.error is None, f"{choice}: {result.error}"
        assert result.logprobs is not None, "log probabilities were asked for"
        expected = case.oracle.steps(choice, prompt, None, NUM_NEW)
        chosen = [step.logprob for step in result.logprobs]
        assert_same_answer(list(result.token_ids), chosen, expected, f"engine, {choice}, {len(prompt)} tokens")


@torch.no_grad()
def test_rows_without_adapters_are_the_base_model_to_the_bit(case: ExpertCase) -> None:
    inputs = case.inputs([0, 0, 1, 1])
    expected = make_model(case.name)(**inputs).logits
    logits = case.model()(**inputs, adapters=[None, "0", None, "0:0.5+1"]).logits
    for row in (0, 2):
        assert logits[row].equal(expected[row]), f"row {row}"
    for row in (1, 3):
        assert_far(logits[row], expected[row], f"the adapters of row {row}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_every_implementation_of_experts_gives_what_peft_gives_with_it(name: str, implementation: str) -> None:
    case = ExpertCase(name)
    case.oracle.base.set_experts_implementation(implementation)
    case.oracle.model("0").base_model.model.set_experts_implementation(implementation)
    model = case.model()
    model.base.set_experts_implementation(implementation)
    inputs = case.inputs([0, 0, 0, 0])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits = model(**inputs, adapters=list(CHOICES)).logits
    for row, choice in enumerate(CHOICES):
        expected = case.oracle.logits(choice, ids[row], mask[row])
        assert_close(logits[row], expected, f"{choice}")
    alone = case.oracle.base(**inputs).logits
    assert logits[0].equal(alone[0]), "a row without adapters isn't the base model's to the bit"


@pytest.mark.parametrize("native", [True, False])
@torch.no_grad()
def test_adapters_of_different_parameters_and_ranks_share_a_batch(
    native: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts without router, the router alone, one parameter of some layers; with rank patterns and rsLoRA."""
    if not native:
        monkeypatch.setattr("loraplex.kernels.dispatch.native_available", lambda: False)
    folder, base = tmp_path_factory.mktemp("adapters"), make_model("qwen3_moe")
    pattern = {"rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {r".*layers\.1.*down_proj": 7}}
    folders = {
        "experts": write_expert_adapter(base, folder / "experts", EXPERTS, **pattern),
        "router": write_expert_adapter(base, folder / "router", ("gate.weight",), targets=(), seed=2),
        "down": write_expert_adapter(base, folder / "down", ("layers.1.mlp.experts.down_proj",), r=6, seed=3),
        "rs": write_expert_adapter(base, folder / "rs", ("down_proj", "gate.weight"), seed=4, use_rslora=True),
    }
    model = MultiLoraModel(make_model("qwen3_moe"))
    for name, path in folders.items():
        model.load_adapter(name, path)
    rows = ["down", None, *folders, "down"]
    ids = torch.randint(3, 110, (len(rows), 11), generator=torch.Generator().manual_seed(0))
    logits = model(ids, adapters=rows).logits
    for row, name in enumerate(rows):
        expected = alone(name, folders, ids[row])
        assert_close(logits[row], expected, f"row {row}, {name}")
        if name is not None:
            assert_far(expected, base(ids[row : row + 1]).logits[0], name)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_in_bfloat16_rows_are_as_near_to_float32_as_peft_in_bfloat16(name: str) -> None:
    """DeepSeek's router computes in float32 then. By the median: a last bit may send a token to another expert."""
    case = ExpertCase(name)
    model = MultiLoraModel(make_model(name).to(torch.bfloat16))
    for adapter, folder in case.folders.items():
        model.load_adapter(adapter, folder)
    inputs = case.inputs([0, 0])
    ids = inputs["input_ids"]
    logits = model(**inputs, adapters=["0", None]).logits[0].float()
    exact, rounded = (peft_logits(name, case.folders["0"], ids[:1], dtype) for dtype in (torch.float32, torch.bfloat16))
    error, noise = ((other - exact).abs().median().item() for other in (logits, rounded))
    assert error <= 1.5 * noise, f"off by {error:.2g}, PEFT by {noise:.2g}"
    assert (make_model(name)(ids[:1]).logits[0] - exact).abs().median() > 5 * noise


def peft_logits(name: str, folder: Path, ids: torch.Tensor, runs_in: torch.dtype) -> torch.Tensor:
    """One row of a model with bfloat16's weights, by PEFT."""
    base = make_model(name).to(torch.bfloat16).to(runs_in)
    model = peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(runs_in)
    return model(ids).logits[0].float()


def alone(name: str | None, folders, ids: torch.Tensor) -> torch.Tensor:
    """One row by PEFT."""
    base = make_model("qwen3_moe")
    model = base if name is None else peft.PeftModel.from_pretrained(base, str(folders[name])).eval()
    return model(ids[None]).logits[0]


@pytest.mark.parametrize(
    ("name", "parameters", "options", "words"),
    [
        ("minimax_m2", ("gate.weight",), {}, "gate.weight"),  # whose router takes more than hidden states
        (
            "llama4_text",
            ("experts.gate_up_proj",),
            {},
            "experts.gate_up_proj",
        ),  # whose experts have a code of their own
        ("gpt_oss", ("experts.gate_up_proj_bias",), {}, "gate_up_proj_bias"),
        ("llama", ("q_proj.weight",), {}, "name the weight of a linear module in target_modules"),
    ],
)
def test_other_parameters_are_refused_by_name(
    name: str, parameters: tuple[str, ...], options: dict, words: str, tmp_path
) -> None:
    base = make_model(name)
    folder = write_expert_adapter(base, tmp_path / "a", parameters, targets=(), **options)
    model = MultiLoraModel(base)
    with pytest.raises(LoraplexError, match=words):
        model.load_adapter("a", folder)
    assert model.names() == []
