"""lm-eval over its `local-completions` model, on tasks made here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.server.tiny_server import Running, character_tokenizer

pytestmark = [pytest.mark.needs("lm_eval"), pytest.mark.slow, pytest.mark.timeout(900)]

QUESTIONS = [
    {"question": "DNA is a", "choices": [" molecule", " mineral"], "answer": 0},
    {"question": "Silk is a", "choices": [" protein fibre", " kind of glass"], "answer": 0},
    {"question": "Quartz is a", "choices": [" mineral", " peptide"], "answer": 0},
]
CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
GENERATION_TASK = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 5, temperature: 0.0, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(server: Running, model: str, folder: Path) -> dict[str, list[dict]]:
    """The samples of both tasks."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "choice.yaml").write_text(CHOICE_TASK.format(file=data))
    (folder / "generation.yaml").write_text(GENERATION_TASK.format(file=data))
    character_tokenizer().save_pretrained(folder / "tokenizer")
    arguments = f"model={model},base_url={server.url}/v1/completions,tokenizer={folder / 'tokenizer'},max_length=256"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "tiny_choice,tiny_generation", "--include_path", str(folder), "--log_samples"]
    run = subprocess.run([*command, "--output_path", str(folder / "out")], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    files = (folder / "out").rglob("samples_*.jsonl")
    return {file.name.split("_2")[0]: [json.loads(line) for line in file.open()] for file in files}


def loglikelihood(server: Running, model: str, context: str, answer: str) -> tuple[float, bool]:
    """Of the answer's tokens, and whether each is the likeliest; computed by the model itself."""
    tokenizer = server.model.tokenizer
    ids = tokenizer(context + answer)["input_ids"]
    with torch.no_grad():
        logits = server.model(torch.tensor([ids]), adapters=[model]).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)
    places = range(len(ids) - len(answer), len(ids))
    total = sum(float(logprobs[place - 1, ids[place]]) for place in places)
    return total, all(int(logits[place - 1].argmax()) == ids[place] for place in places)


@pytest.mark.parametrize("model", ["a", "mix-ab"])
def test_loglikelihoods_and_answers_are_the_models(server, tmp_path, model):
    samples = evaluate(server, model, tmp_path)
    choices = samples["samples_tiny_choice"]
    assert len(choices) == len(QUESTIONS)
    for sample in choices:
        question = sample["doc"]
        for (told, is_greedy), choice in zip(sample["filtered_resps"], question["choices"], strict=True):
            total, greedy = loglikelihood(server, model, question["question"], choice)
            assert float(told) == pytest.approx(total, abs=1e-2)
            assert str(is_greedy) == str(greedy)
    for sample in samples["samples_tiny_generation"]:
        text = sample["doc"]["question"]
        answer = server.client().completions.create(model=model, prompt=text, max_tokens=5, temperature=0)
        assert sample["resps"][0][0] == answer.choices[0].text
