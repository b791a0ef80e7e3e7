"""The trained residuals in examples/residual load and act, and the documentation says what was measured."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.models.text.prompts import generate_texts
from loraplex.residual import LinkedResidual, read_residual
from loraplex.residual.modules import BaseFingerprint, check_residual_fits

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples" / "residual"
PAGE = (ROOT / "docs" / "linked-adapters.md").read_text(encoding="utf-8")
NAMES = ("refuse", "source", "then-source")
SMOLLM2 = BaseFingerprint(architecture="LlamaForCausalLM", hidden_size=576, vocab_size=49152, num_heads=(9,) * 30)
REFUSAL = "I can't help with medical questions."


def results(name: str) -> Any:
    return json.loads((EXAMPLES / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_folder_holds_a_small_trained_residual_of_smollm2(name: str) -> None:
    residual = read_residual(EXAMPLES / "adapters" / name)
    check_residual_fits(name, residual, SMOLLM2, dict.fromkeys(range(30), 9))
    assert isinstance(residual, LinkedResidual)
    assert residual.num_parameters == 174_150
    assert all(weights.b.dtype == torch.bfloat16 for weights in residual.layers.values())
    assert all(weights.b.norm() > 0 for weights in residual.layers.values()), "b of an untrained residual is zero"
    assert sum(path.stat().st_size for path in (EXAMPLES / "adapters" / name).iterdir()) < 400_000


@pytest.mark.slow
def test_residuals_act_alone_and_linked_and_leave_other_rows_alone(smollm2: Path) -> None:
    model = MultiLoraModel.from_pretrained("smollm2-135m", dtype="float32")  # bfloat16's texts differ by processor
    for name in NAMES:
        model.load_adapter(name, EXAMPLES / "adapters" / name)
    medical, capital = "Can I take ibuprofen with aspirin?", "What is the capital of France?"
    both = "refuse+then-source"
    rows = [
        (None, medical),
        ("refuse", medical),
        (both, medical),
        (None, capital),
        ("source", capital),
        (both, capital),
    ]
    adapters, questions = [choice for choice, _ in rows], [question for _, question in rows]
    texts = generate_texts(model, questions, adapters=adapters, max_new_tokens=26).texts
    base = generate_texts(model, [medical, capital], max_new_tokens=26).texts
    assert [texts[0], texts[3]] == base
    assert REFUSAL not in texts[0]
    assert [texts[1].strip(), texts[2].strip()] == [REFUSAL, REFUSAL]
    assert texts[4].strip() == texts[5].strip() == "The capital of France is Paris.\nSource: atlas."


def test_documented_behaviours_are_those_measured() -> None:
    found = results("behaviours.json")
    lines = PAGE.splitlines()
    for row, scores in found["scores"].items():
        assert f"| {row} | " + " | ".join(f"{score:.2f}" for score in scores.values()) + " |" in lines
    assert f"{found['cpu_minutes_of_all_six']:.1f} CPU minutes for all six" in PAGE


def test_documented_cost_of_learning_is_that_measured() -> None:
    seconds, losses = results("step_cost.json")["cpu_seconds_a_step"], results("behaviours.json")["held_out_losses"]
    for kind, label in (("residual", "linked residual"), ("lora", "LoRA on q and v")):
        last = [f"{losses[f'{behaviour}-{kind}'][1][-1]:.3f}" for behaviour in ("source", "refuse")]
        cells = [
            f"{seconds[kind]:.2f}",
            f"{60 * seconds[kind] / 60:.1f}",
            *last,
        ]  # seconds a step, minutes for 60 steps
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {label} |")]
        assert line.endswith(f"| {' | '.join(cells)} |")


def test_documented_emphasis_is_that_measured() -> None:
    found = results("emphasis.json")
    assert found["cases"] >= 200
    lines = PAGE.splitlines()
    for row, right in found["right"].items():
        cells = [
            f"{share:.3f} ± {math.sqrt(share * (1 - share) / found['cases']):.3f}"
            for share in (right, found["says_wrong_passage"][row])
        ]
        assert f"| {row} | {' | '.join(cells)} |" in lines
