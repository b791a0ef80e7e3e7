"""The adapters in examples/ are chosen by questions of their domains, on the real model."""

import json
from pathlib import Path

import pytest

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams

ROOT = Path(__file__).parents[2]
NAMES = ("quantum", "materials", "protein", "peptides")


def questions(name: str) -> list[str]:
    lines = (ROOT / "data" / name / "test.jsonl").read_text().splitlines()[:4]
    return [json.loads(line)["messages"][0]["content"] for line in lines]


@pytest.mark.slow
def test_examples_choose_their_domains_and_other_prompts_the_base_model(smollm2: Path) -> None:
    model = MultiLoraModel.from_pretrained(smollm2, dtype="bfloat16")
    for name in NAMES:
        model.load_adapter(name, ROOT / "examples" / "adapters" / name)
    asked = [(name, question) for name in NAMES for question in questions(name)]
    asked += [(None, "Write a haiku about winter."), (None, "Who painted the Mona Lisa?")]
    requests = [
        Request([{"role": "user", "content": text}], adapters="auto", sampling=SamplingParams(max_tokens=2))
        for _, text in asked
    ]
    with Engine(model, EngineConfig()) as engine:
        results = engine.generate(requests)
    assert [None if result.auto is None else result.auto.name for result in results] == [name for name, _ in asked]
    assert all(result.auto is not None and result.error is None for result in results)
